"""The cache write as one Triton launch: a program per token."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions, await_launch_before, next_power_of_2, overlap
from ..pages import PAGE


@triton.jit(do_not_specialize=["layer"])
def cache_write_kernel(
    key: tl.tensor,
    value: tl.tensor,
    pool: tl.tensor,
    slot_mapping: tl.tensor,
    layer: tl.tensor,
    stride_key_row: tl.tensor,
    stride_key_head: tl.tensor,
    stride_value_row: tl.tensor,
    stride_value_head: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Write all KV heads of token `program_id(0)`."""
    await_launch_before(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row)
    if slot < 0:
        return
    head = tl.arange(0, HEADS_PAD)[:, None].to(tl.int64)
    dim = tl.arange(0, HEAD_PAD)[None, :]
    mask = (head < HEADS) & (dim < HEAD_SIZE)
    page = (slot // PAGE * LAYERS + layer) * HEADS + head
    to = pool + (page * PAGE + slot % PAGE) * (2 * HEAD_SIZE) + dim
    k = tl.load(key + row * stride_key_row + head * stride_key_head + dim, mask=mask)
    v = tl.load(value + row * stride_value_row + head * stride_value_head + dim, mask=mask)
    tl.store(to, k, mask=mask)
    tl.store(to + HEAD_SIZE, v, mask=mask)


@functools.cache
def launch_options(num_layers: int, num_kv_heads: int, head_size: int) -> LaunchOptions:
    """How `cache_write_kernel` is compiled for a model's shape."""
    constexprs = {
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "HEADS_PAD": next_power_of_2(num_kv_heads),
        "HEAD_SIZE": head_size,
        "HEAD_PAD": next_power_of_2(head_size),
    }
    elements = constexprs["HEADS_PAD"] * constexprs["HEAD_PAD"]
    # A thread moves 8 elements of K and 8 of V in most shapes: one 16-byte access each in 16-bit dtypes.
    num_warps = min(max(elements // (32 * 8), 1), 16)
    return LaunchOptions(constexprs, num_warps=num_warps, num_stages=1)


def cache_write(
    key: Tensor, value: Tensor, pool: Tensor, slot_mapping: Tensor, layer: int, num_layers: int
) -> None:
    """See `hybridkv_kernels.cache_write.cache_write`."""
    rows, heads, head_size = key.shape
    cache_write_kernel[(rows,)](
        key,
        value,
        pool,
        slot_mapping,
        layer,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        **launch_options(num_layers, heads, head_size).kwargs(),
        **overlap(pool.device),
    )
