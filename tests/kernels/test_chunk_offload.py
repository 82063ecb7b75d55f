"""Offloading puts every chunk of the heads that recall where the store keeps it, and nothing else."""

import pytest
import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.chunk_offload import chunk_offload
from hybridkv_kernels.recall.tables import STORE_BLOCK
from kernel_cases import nan_pool
from recall_cases import bits, index


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("layers", "first", "chunks", "head_size", "dtype"),
    [
        (2, [5, -1, 80], 67, 64, torch.float32),
        (3, [-1, 0], 1, 80, torch.bfloat16),
        (1, [130, 0, -1, 63], 61, 128, torch.float16),
        (2, [-1, -1], 3, 64, torch.float32),
    ],
)
def test_copies_every_chunk(
    backend: Backend,
    layers: int,
    first: list[int],
    chunks: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    heads, num_store = len(first), 5
    source = torch.randperm(chunks + 2)[:chunks].int()
    # Rows of tables: not aligned to 16 bytes.
    store_blocks = torch.stack((torch.zeros(num_store), torch.randperm(num_store) + 1)).int().to(device)[1]
    chunk_first = torch.stack((torch.zeros(heads), torch.tensor(first))).int().to(device)[1]
    pool = nan_pool(chunks + 2, layers, heads, head_size, dtype, device)
    store = nan_pool((num_store + 1) * STORE_BLOCK, 1, 1, head_size, dtype, device)
    for layer in range(layers):
        want = store.clone()
        for head in range(heads):
            for chunk in range(chunks):
                if first[head] < 0:
                    continue
                page = torch.randn(PAGE, 2 * head_size, device=device).to(dtype)
                pool[(int(source[chunk]) * layers + layer) * heads + head] = page
                logical = first[head] + chunk
                block = int(store_blocks[logical // STORE_BLOCK])
                want[block * STORE_BLOCK + logical % STORE_BLOCK] = page
        before = pool.clone()
        chunk_offload(pool, store, source.to(device), store_blocks, chunk_first, layer, layers, backend)
        assert torch.equal(bits(store), bits(want))
        assert torch.equal(bits(pool), bits(before))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pages_past_two_billion_elements(backend: Backend, device: torch.device) -> None:
    """Memory that is never touched is never committed, so tensors this large cost nothing on a CPU."""
    # So far away even when counted in int32.
    pages = 2 * (2**31 + 2**22) // (PAGE * 2 * 64) // STORE_BLOCK * STORE_BLOCK
    large = torch.empty(pages, PAGE, 128, dtype=torch.bfloat16, device=device)
    small = torch.zeros(STORE_BLOCK, PAGE, 128, dtype=large.dtype, device=device)
    page = torch.randn(PAGE, 128, device=device).to(large.dtype)
    first = index([3], device)
    small[9] = page
    chunk_offload(
        small, large, index([9], device), index([pages // STORE_BLOCK - 1], device), first, 0, 1, backend
    )
    assert torch.equal(large[pages - STORE_BLOCK + 3], page)
    large[pages - 1] = -page
    chunk_offload(large, small, index([pages - 1], device), index([0], device), first, 0, 1, backend)
    assert torch.equal(small[3], -page)


def test_no_chunks_are_nothing(device: torch.device) -> None:
    pool = nan_pool(1, 1, 1, 64, torch.float32, device)
    nothing, one = index([], device), index([0], device)
    chunk_offload(pool, pool, nothing, one, one, 0, 1, "triton")


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    pool = nan_pool(2, 1, 1, 64, torch.float32, device)
    one = index([0], device)
    with pytest.raises(ValueError, match="store must be of the pool's dtype"):
        chunk_offload(pool, pool.half(), one, one, one, 0, 1)
    with pytest.raises(ValueError, match="store must be contiguous"):
        chunk_offload(pool, pool[..., :64], one, one, one, 0, 1)
    with pytest.raises(ValueError, match="source_blocks"):
        chunk_offload(pool, pool, one.long(), one, one, 0, 1)
    with pytest.raises(ValueError, match="store_blocks"):
        chunk_offload(pool, pool, one, one[None], one, 0, 1)
    with pytest.raises(ValueError, match="chunk_first"):
        chunk_offload(pool, pool, one, one, one.float(), 0, 1)
    with pytest.raises(ValueError, match="layer 1"):
        chunk_offload(pool, pool, one, one, one, 1, 1)
