"""The copy to the host store in plain torch: the reference, and the CPU path."""

import torch
from torch import Tensor

from ..recall.chunks import store_pages


def chunk_offload(
    pool: Tensor,
    store: Tensor,
    source_blocks: Tensor,
    store_blocks: Tensor,
    chunk_first: Tensor,
    layer: int,
    num_layers: int,
) -> None:
    """See `hybridkv_kernels.chunk_offload.chunk_offload`."""
    heads = chunk_first.shape[0]
    head = (chunk_first >= 0).nonzero()
    chunk = torch.arange(source_blocks.shape[0], device=pool.device)
    source = (source_blocks.long() * num_layers + layer) * heads + head
    store[store_pages(store_blocks, chunk_first[head] + chunk)] = pool[source]
