"""Build the landmarks of the heads that recall, once a prompt is computed."""

import torch
from torch import Tensor

from ..pages import PAGE, Backend, check_index, check_pool, require, use_triton
from ..recall.landmarks import Landmarks
from . import naive
from . import triton as fused

__all__ = ["landmark_build"]


def landmark_build(
    pool: Tensor,
    source_blocks: Tensor,
    arena_blocks: Tensor,
    extents: Tensor,
    chunk_first: Tensor,
    dest: Tensor,
    landmarks: Landmarks,
    backend: Backend = "auto",
) -> None:
    """Write the landmarks of all layers' recalling heads of one prompt into the pages before their extents.

    Also written: for each chunk the hot slot that holds it. A sketch is a level b for each dimension of r,
    the key less the mean of its landmark page's keys in a random rotation, and one scale for each token,
    `|r|^2 / (r . b)` (RaBitQ's rescale, Gao and Long 2024). With one bit b is the sign of r; with two it is
    the sign times 3 where |r| is above the token's mean |r|, and times 1 elsewhere. The mean is kept as int8
    levels of one step, and what that rounds away is in r.

    Args:
        pool: [num_blocks*L*H, 16, 2*D], contiguous; bf16, fp16 or fp32; written in place.
        source_blocks: [n] int32, the prompt's full blocks: its n chunks.
        arena_blocks: [A] int32, the arena's block ids.
        extents: [L, H, 2] int32, (first logical arena page, length in tokens): a recalling head's hot slots.
        chunk_first: [L, H] int32, -1 for heads that do not recall, which are left alone.
        dest: [L, H, 16*n] int32, tokens' positions in the extents as for `compact`; -1 for a chunk that is
            not hot. A recalling head keeps whole chunks.
        landmarks: kind, layout and rotation.
        backend: `auto` is Triton on CUDA tensors, torch elsewhere.

    Raises:
        ValueError: for a shape, dtype, stride or backend that does not fit. Indices are not checked.
    """
    layout = landmarks.layout
    check_pool(pool, layout.head_size)
    require(pool.dtype.itemsize == layout.itemsize, f"the layout is for {layout.itemsize} bytes an element")
    chunks = source_blocks.shape[0]
    check_index("source_blocks", source_blocks, torch.int32, -1)
    check_index("arena_blocks", arena_blocks, torch.int32, -1)
    check_index("extents", extents, torch.int32, -1, -1, 2)
    layers, heads, _ = extents.shape
    check_index("chunk_first", chunk_first, torch.int32, layers, heads)
    check_index("dest", dest, torch.int32, layers, heads, chunks * PAGE)
    if chunks == 0:
        return
    build = fused.landmark_build if use_triton(backend, pool) else naive.landmark_build
    build(pool, source_blocks, arena_blocks, extents, chunk_first, dest, landmarks)
