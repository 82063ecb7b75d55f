"""Compaction moves every kept token to its place in the bag of pages, and only those."""

import pytest
import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.compact import compact
from kernel_cases import nan_pool


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("layers", "heads", "tokens", "head_size", "dtype"),
    [
        (2, 3, 96, 64, torch.float32),
        (1, 1, 16, 80, torch.bfloat16),
        (2, 2, 272, 128, torch.float16),
    ],
)
def test_moves_what_is_kept(
    backend: Backend,
    layers: int,
    heads: int,
    tokens: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    block_pages = layers * heads
    dest = torch.full((layers, heads, tokens), -1, dtype=torch.int32)
    extents = torch.zeros(layers, heads, 2, dtype=torch.int32)
    next_page = 0
    for order in torch.randperm(block_pages).tolist():
        layer, head = divmod(order, heads)
        # From all tokens of the first head to none of the last, in any order.
        length = tokens - tokens * order // max(block_pages - 1, 1)
        dest[layer, head, torch.randperm(tokens)[:length]] = torch.randperm(length).int()
        extents[layer, head] = torch.tensor([next_page, length])
        next_page += -(-length // PAGE)
    num_arena = -(-next_page // block_pages)
    ids = torch.randperm(tokens // PAGE + num_arena).int()
    source, arena = ids[: tokens // PAGE], ids[tokens // PAGE :]

    pool = nan_pool(len(ids), layers, heads, head_size, dtype, device)
    expected = pool.clone()
    for layer in range(layers):
        for head in range(heads):
            for token in range(tokens):
                position = int(dest[layer, head, token])
                if position < 0:
                    continue
                row = torch.randn(2 * head_size, device=device).to(dtype)
                old = (source[token // PAGE], token % PAGE)
                logical = int(extents[layer, head, 0]) + position // PAGE
                new = int(arena[logical // block_pages]) * block_pages + logical % block_pages
                for tensor in (pool, expected):
                    tensor[int(old[0]) * block_pages + layer * heads + head, old[1]] = row
                expected[new, position % PAGE] = row

    compact(pool, *(t.to(device) for t in (dest, source, arena, extents)), backend)

    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    pool = nan_pool(2, 1, 1, 64, torch.float32, device)
    dest = torch.zeros(1, 1, 16, dtype=torch.int32, device=device)
    block = torch.zeros(1, dtype=torch.int32, device=device)
    extents = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="multiple of 16"):
        compact(pool, dest[..., :15].contiguous(), block, block, extents)
    with pytest.raises(ValueError, match="dest"):
        compact(pool, dest.long(), block, block, extents)
    with pytest.raises(ValueError, match="source_blocks"):
        compact(pool, dest, block.repeat(2), block, extents)
    with pytest.raises(ValueError, match="extents"):
        compact(pool, dest, block, block, extents[0])
