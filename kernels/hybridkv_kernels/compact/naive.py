"""The copy into the arena in plain torch: the reference, and the CPU path."""

from torch import Tensor

from ..pages import PAGE


def compact(pool: Tensor, dest: Tensor, source_blocks: Tensor, arena_blocks: Tensor, extents: Tensor) -> None:
    """See `hybridkv_kernels.compact.compact`."""
    layers, heads, _ = dest.shape
    block_pages = layers * heads
    position = dest.flatten(0, 1)
    head, token = (position >= 0).nonzero(as_tuple=True)
    position = position[head, token].long()
    source = source_blocks[token // PAGE].long() * block_pages + head
    logical = extents[..., 0].flatten()[head].long() + position // PAGE
    target = arena_blocks[logical // block_pages].long() * block_pages + logical % block_pages
    pool[target, position % PAGE] = pool[source, token % PAGE]
