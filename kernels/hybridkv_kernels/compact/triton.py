"""The copy into the arena as one Triton launch: a program per run of tokens of one head."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions, next_power_of_2
from ..pages import PAGE


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["source_blocks", "arena_blocks"])
def compact_kernel(
    pool: tl.tensor,
    dest: tl.tensor,
    source_blocks: tl.tensor,
    arena_blocks: tl.tensor,
    extents: tl.tensor,
    tokens: tl.tensor,
    PAGE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    ROW: tl.constexpr,
    ROW_PAD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Move the kept ones of TILE tokens of (layer, head) `program_id(1)`; K and V of a token are one row."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = tl.load(dest + head * tokens + token, mask=token < tokens, other=-1)
    if tl.max(position, axis=0) < 0:
        return
    # Rows of dropped tokens are masked, so a page with nothing kept is never loaded.
    kept = position >= 0
    source = tl.load(source_blocks + token // PAGE, mask=kept, other=0).to(tl.int64) * BLOCK_PAGES + head
    logical = tl.load(extents + head * 2) + position // PAGE
    block = tl.load(arena_blocks + logical // BLOCK_PAGES, mask=kept, other=0).to(tl.int64)
    target = block * BLOCK_PAGES + logical % BLOCK_PAGES
    element = tl.arange(0, ROW_PAD)[None, :]
    mask = kept[:, None] & (element < ROW)
    row = tl.load(pool + ((source * PAGE + token % PAGE) * ROW)[:, None] + element, mask=mask)
    tl.store(pool + ((target * PAGE + position % PAGE) * ROW)[:, None] + element, row, mask=mask)


@functools.cache
def launch_options(num_layers: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> LaunchOptions:
    """How `compact_kernel` is compiled for a model's shape."""
    row_pad = next_power_of_2(2 * head_size)
    constexprs = {
        "PAGE": PAGE,
        "BLOCK_PAGES": num_layers * num_kv_heads,
        "ROW": 2 * head_size,
        "ROW_PAD": row_pad,
        # 16 KiB in flight per program.
        "TILE": max(16 * 1024 // (row_pad * dtype.itemsize), PAGE),
    }
    return LaunchOptions(constexprs, num_warps=4, num_stages=1)


def compact(pool: Tensor, dest: Tensor, source_blocks: Tensor, arena_blocks: Tensor, extents: Tensor) -> None:
    """See `hybridkv_kernels.compact.compact`."""
    layers, heads, tokens = dest.shape
    options = launch_options(layers, heads, pool.shape[-1] // 2, pool.dtype)
    grid = (triton.cdiv(tokens, options.constexprs["TILE"]), layers * heads)
    compact_kernel[grid](pool, dest, source_blocks, arena_blocks, extents, tokens, **options.kwargs())
