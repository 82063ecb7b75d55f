"""The cache write puts each token where its slot says, and touches nothing else."""

import pytest
import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.cache_write import cache_write
from kernel_cases import nan_pool, strided_heads

LAYERS, BLOCKS = 3, 4


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("heads", "head_size", "dtype"),
    [(1, 64, torch.float32), (2, 80, torch.bfloat16), (3, 128, torch.float16)],
)
def test_writes_where_the_slots_say(
    backend: Backend, heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    slots = [5, -1, 16, 63, 31, -1, 48]
    key = strided_heads(len(slots), heads, head_size, dtype, device)
    value = strided_heads(len(slots), heads, head_size, dtype, device)
    pool = nan_pool(BLOCKS, LAYERS, heads, head_size, dtype, device)
    expected = pool.clone()
    for token, slot in enumerate(slots):
        for head in range(heads if slot >= 0 else 0):
            page = expected[(slot // PAGE * LAYERS + 1) * heads + head]
            page[slot % PAGE] = torch.cat((key[token, head], value[token, head]))

    cache_write(key, value, pool, torch.tensor(slots, device=device), 1, LAYERS, backend)

    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens_is_no_work(backend: Backend, device: torch.device) -> None:
    key = torch.empty(0, 2, 64, device=device)
    pool = nan_pool(1, 1, 2, 64, torch.float32, device)
    cache_write(key, key, pool, torch.empty(0, dtype=torch.int64, device=device), 0, 1, backend)
    assert pool.isnan().all()


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    key = torch.zeros(1, 2, 64, device=device)
    pool = nan_pool(1, 1, 2, 64, torch.float32, device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="slot_mapping"):
        cache_write(key, key, pool, slots.int(), 0, 1)
    with pytest.raises(ValueError, match="dtype"):
        cache_write(key.half(), key.half(), pool, slots, 0, 1)
    with pytest.raises(ValueError, match="layer"):
        cache_write(key, key, pool, slots, 1, 1)
    with pytest.raises(ValueError, match="pool"):
        cache_write(key[..., :32], key[..., :32], pool, slots, 0, 1)
    with pytest.raises(ValueError, match="backend"):
        cache_write(key, key, pool, slots, 0, 1, "cuda")  # type: ignore[arg-type]
