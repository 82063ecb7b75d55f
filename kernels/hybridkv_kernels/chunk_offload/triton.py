"""The copy to the host store as one Triton launch: a program per page."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions, next_power_of_2
from ..pages import PAGE
from ..recall.layout import INDEX_BYTES
from ..recall.tables import STORE_BLOCK


# Slices of tables: no two of them need be aligned alike.
@triton.jit(
    do_not_specialize=["layer"],
    do_not_specialize_on_alignment=["source_blocks", "store_blocks", "chunk_first"],
)
def chunk_offload_kernel(
    pool: tl.tensor,
    store: tl.tensor,
    source_blocks: tl.tensor,
    store_blocks: tl.tensor,
    chunk_first: tl.tensor,
    layer: tl.tensor,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_INTS: tl.constexpr,
    PAGE_PAD: tl.constexpr,
    STORE_BLOCK: tl.constexpr,
) -> None:
    """Copy chunk `program_id(0)` of head `program_id(1)`; a page is copied as it is, as int32."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(chunk_first + head)
    if first < 0:
        return
    block = tl.load(source_blocks + chunk).to(tl.int64)
    source = (block * LAYERS + layer) * HEADS + head
    logical = first + chunk
    target = tl.load(store_blocks + logical // STORE_BLOCK).to(tl.int64) * STORE_BLOCK + logical % STORE_BLOCK
    element = tl.arange(0, PAGE_PAD)
    inside = element < PAGE_INTS
    data = tl.load(pool.to(tl.pointer_type(tl.int32)) + source * PAGE_INTS + element, mask=inside)
    tl.store(store.to(tl.pointer_type(tl.int32)) + target * PAGE_INTS + element, data, mask=inside)


@functools.cache
def launch_options(num_layers: int, num_kv_heads: int, head_size: int, itemsize: int) -> LaunchOptions:
    """How `chunk_offload_kernel` is compiled for a model's shape."""
    page_ints = PAGE * 2 * head_size * itemsize // INDEX_BYTES
    constexprs = {
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "PAGE_INTS": page_ints,
        "PAGE_PAD": next_power_of_2(page_ints),
        "STORE_BLOCK": STORE_BLOCK,
    }
    return LaunchOptions(constexprs, num_warps=4 if page_ints <= 2048 else 8, num_stages=1)


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
    options = launch_options(num_layers, heads, pool.shape[-1] // 2, pool.itemsize)
    chunk_offload_kernel[(source_blocks.shape[0], heads)](
        pool, store, source_blocks, store_blocks, chunk_first, layer, **options.kwargs()
    )
