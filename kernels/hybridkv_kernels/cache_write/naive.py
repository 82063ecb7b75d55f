"""The cache write in plain torch: the reference, and the CPU path."""

import torch
from torch import Tensor

from ..pages import PAGE


def cache_write(
    key: Tensor, value: Tensor, pool: Tensor, slot_mapping: Tensor, layer: int, num_layers: int
) -> None:
    """See `hybridkv_kernels.cache_write.cache_write`."""
    heads = key.shape[1]
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    first_page = (slots // PAGE * num_layers + layer) * heads
    pages = first_page[:, None] + torch.arange(heads, device=pool.device)
    pool[pages, (slots % PAGE)[:, None]] = torch.cat((key[kept], value[kept]), dim=-1)
