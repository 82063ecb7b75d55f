"""Copy the tokens that stay into a request's arena."""

import torch
from torch import Tensor

from ..pages import PAGE, Backend, check_index, check_pool, require, use_triton
from . import naive
from . import triton as fused

__all__ = ["compact"]


def compact(
    pool: Tensor,
    dest: Tensor,
    source_blocks: Tensor,
    arena_blocks: Tensor,
    extents: Tensor,
    backend: Backend = "auto",
) -> None:
    """Copy each head's kept tokens from the prompt's blocks into its extent, for all layers and heads at
    once.

    A kept token goes to logical arena page `j = first + dest // 16`, offset `dest % 16`; logical page j is
    physical page `arena_blocks[j // (L*H)] * (L*H) + j % (L*H)`. The rest of an extent's last page is left
    as it was. No block may be in both `source_blocks` and `arena_blocks`: tokens are copied in no particular
    order.

    Args:
        pool: [num_blocks*L*H, 16, 2*D], contiguous; bf16, fp16 or fp32; written in place.
        dest: [L, H, T] int32, T a multiple of 16: a token's position within its head's extent, -1 drops it.
            No two tokens of a head may share a position.
        source_blocks: [T/16] int32, the prompt's block ids.
        arena_blocks: [A] int32, the arena's block ids.
        extents: [L, H, 2] int32, (first logical arena page, length in tokens) of each head.
        backend: `auto` is Triton on CUDA tensors, torch elsewhere.

    Raises:
        ValueError: for a shape, dtype, stride or backend that does not fit. Indices are not checked.
    """
    check_pool(pool, pool.shape[-1] // 2)
    check_index("dest", dest, torch.int32, -1, -1, -1)
    layers, heads, tokens = dest.shape
    require(tokens % PAGE == 0, f"dest covers {tokens} tokens, which is no multiple of {PAGE}")
    check_index("source_blocks", source_blocks, torch.int32, tokens // PAGE)
    check_index("arena_blocks", arena_blocks, torch.int32, -1)
    check_index("extents", extents, torch.int32, layers, heads, 2)
    if tokens == 0:
        return
    copy = fused.compact if use_triton(backend, pool) else naive.compact
    copy(pool, dest, source_blocks, arena_blocks, extents)
