"""Copy a prompt's chunks of recalling heads into the host store."""

import torch
from torch import Tensor

from ..pages import Backend, check_index, check_pool, require, use_triton
from ..recall.checks import check_store
from . import naive
from . import triton as fused

__all__ = ["chunk_offload"]


def chunk_offload(
    pool: Tensor,
    store: Tensor,
    source_blocks: Tensor,
    store_blocks: Tensor,
    chunk_first: Tensor,
    layer: int,
    num_layers: int,
    backend: Backend = "auto",
) -> None:
    """Copy each recalling head's pages of one layer of one prompt to the store.

    Chunk c of head h, page `source_blocks[c] * (L*H) + layer*H + h` of the pool, goes to logical store page
    `j = chunk_first[h] + c`, which is page `store_blocks[j // 64] * 64 + j % 64` of the store.

    Args:
        pool: [num_blocks*L*H, 16, 2*D], contiguous; bf16, fp16 or fp32.
        store: [M, 16, 2*D], contiguous, the pool's dtype and device (on a GPU a mapped view of pinned host
            memory); written.
        source_blocks: [n] int32, the block ids of the prompt's full pages.
        store_blocks: [C] int32, the ids of the request's store blocks.
        chunk_first: [H] int32, the layer's first logical store pages; -1 for a head that does not recall.
        layer: index of the layer, 0..L-1.
        num_layers: L.
        backend: `auto` is Triton on CUDA tensors, torch elsewhere.

    Raises:
        ValueError: for a shape, dtype, stride, layer or backend that does not fit. Indices are not checked.
    """
    check_pool(pool, pool.shape[-1] // 2)
    check_store(pool, store)
    check_index("source_blocks", source_blocks, torch.int32, -1)
    check_index("store_blocks", store_blocks, torch.int32, -1)
    check_index("chunk_first", chunk_first, torch.int32, -1)
    require(0 <= layer < num_layers, f"layer {layer} is not within 0..{num_layers - 1}")
    if source_blocks.shape[0] == 0:
        return
    copy = fused.chunk_offload if use_triton(backend, pool) else naive.chunk_offload
    copy(pool, store, source_blocks, store_blocks, chunk_first, layer, num_layers)
