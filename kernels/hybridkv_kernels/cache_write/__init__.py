"""Write new keys and values into their pages."""

import torch
from torch import Tensor

from ..pages import Backend, check_index, check_pool, require, use_triton
from . import naive
from . import triton as fused

__all__ = ["cache_write"]


def cache_write(
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    layer: int,
    num_layers: int,
    backend: Backend = "auto",
) -> None:
    """Write one layer's keys and values of N tokens into the pool, in place.

    Args:
        key: [N, H, D], the pool's dtype; any strides in the first two dims (a view of a fused qkv, say).
        value: [N, H, D], likewise.
        pool: [num_blocks*num_layers*H, 16, 2*D], contiguous; bf16, fp16 or fp32.
        slot_mapping: [N] int64, `block*16 + offset` of each token; negative skips the token.
        layer: index of the layer, 0..num_layers-1.
        num_layers: layers in a block.
        backend: `auto` is Triton on CUDA tensors, torch elsewhere.

    Raises:
        ValueError: for a shape, dtype, stride, layer or backend that does not fit.
    """
    require(key.dim() == 3 and key.shape == value.shape, "key and value must both be [N, H, D]")
    check_pool(pool, key.shape[2], key, value)
    check_index("slot_mapping", slot_mapping, torch.int64, key.shape[0])
    require(0 <= layer < num_layers, f"layer {layer} is not within 0..{num_layers - 1}")
    if key.shape[0] == 0:
        return
    write = fused.cache_write if use_triton(backend, pool) else naive.cache_write
    write(key, value, pool, slot_mapping, layer, num_layers)
