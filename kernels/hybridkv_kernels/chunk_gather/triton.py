"""The fetch of missing chunks as one Triton launch: several programs per row and head, whole pages each."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions, await_launch_before, next_power_of_2, overlap
from ..pages import PAGE
from ..recall.layout import INDEX_BYTES, LandmarkLayout
from ..recall.paging import arena_page, recalling_head
from ..recall.tables import STORE_BLOCK, RecallTables
from ..recall.work import RecallWork
from ..tables import DecodeTables

# Pages of one head on their way at once: enough to fill the link to the host with few rows.
SPLIT = 8


@triton.jit(do_not_specialize=["layer"])
def chunk_gather_kernel(
    pool: tl.tensor,
    store: tl.tensor,
    row_slot: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    blocks: tl.tensor,
    chunk_first: tl.tensor,
    store_blocks: tl.tensor,
    prompt_len: tl.tensor,
    num_missing: tl.tensor,
    missing: tl.tensor,
    freed: tl.tensor,
    layer: tl.tensor,
    stride_arena: tl.tensor,
    stride_blocks: tl.tensor,
    stride_store: tl.tensor,
    stride_chunks: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
    PAGE_INTS: tl.constexpr,
    PAGE_PAD: tl.constexpr,
    SLOT_INT: tl.constexpr,
    STORE_BLOCK: tl.constexpr,
    HAS_STORE: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Fetch every SPLIT-th missing chunk of item `program_id(0)`; a page is copied as it is, as int32."""
    BLOCK_PAGES: tl.constexpr = LAYERS * HEADS
    item = tl.program_id(0)
    slot, chunks, _, landmarks, first_chunk = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES
    )
    await_launch_before(OVERLAP)
    item_lists = item.to(tl.int64) * stride_chunks
    index = tl.program_id(1)
    count = tl.load(num_missing + item)
    # Without a wait for the count: there are lists for no chunk, too, and nobody looks at what is stale.
    chunk = tl.load(missing + item_lists + tl.minimum(index, stride_chunks - 1))
    hot_slot = tl.load(freed + item_lists + tl.minimum(index, stride_chunks - 1))
    first = landmarks + tl.cdiv(chunks, PLACES)
    slot = slot.to(tl.int64)
    arena_row = arena + slot * stride_arena
    words = pool.to(tl.pointer_type(tl.int32))
    element = tl.arange(0, PAGE_PAD)
    while index < count:
        if HAS_STORE:
            logical = first_chunk + chunk
            block = tl.load(store_blocks + slot * stride_store + logical // STORE_BLOCK).to(tl.int64)
            source = block * STORE_BLOCK + logical % STORE_BLOCK
            page = store.to(tl.pointer_type(tl.int32)) + source * PAGE_INTS
        else:
            block = tl.load(blocks + slot * stride_blocks + chunk).to(tl.int64)
            page = words + (block * BLOCK_PAGES + layer * HEADS + item % HEADS) * PAGE_INTS
        target = arena_page(arena_row, first + hot_slot, hot_slot >= 0, BLOCK_PAGES)
        landmark = arena_page(arena_row, landmarks + chunk // PLACES, chunk >= 0, BLOCK_PAGES)
        data = tl.load(page + element, mask=element < PAGE_INTS)
        tl.store(words + target * PAGE_INTS + element, data, mask=element < PAGE_INTS)
        tl.store(words + (landmark * PAGE_INTS + SLOT_INT + chunk % PLACES), hot_slot)
        index += SPLIT
        chunk = tl.load(missing + item_lists + index, mask=index < count, other=0)
        hot_slot = tl.load(freed + item_lists + index, mask=index < count, other=0)


@functools.cache
def launch_options(
    num_layers: int, num_kv_heads: int, layout: LandmarkLayout, has_store: bool
) -> LaunchOptions:
    """How `chunk_gather_kernel` is compiled for a model's shape."""
    page_ints = layout.page_bytes // INDEX_BYTES
    constexprs = {
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "PLACES": layout.places,
        "PAGE_INTS": page_ints,
        "PAGE_PAD": next_power_of_2(page_ints),
        "SLOT_INT": layout.slot_offset // INDEX_BYTES,
        "STORE_BLOCK": STORE_BLOCK,
        "HAS_STORE": has_store,
        "SPLIT": SPLIT,
    }
    return LaunchOptions(constexprs, num_warps=4 if page_ints <= 2048 else 8, num_stages=1)


def chunk_gather(
    pool: Tensor,
    store: Tensor | None,
    row_slot: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    layout: LandmarkLayout,
    work: RecallWork,
    early: bool,
) -> None:
    """See `hybridkv_kernels.chunk_gather.chunk_gather`."""
    heads = decode.num_kv_heads
    chunk_gather_kernel[(row_slot.shape[0] * heads, SPLIT)](
        pool,
        pool if store is None else store,
        row_slot,
        decode.extents,
        decode.arena,
        decode.blocks,
        recall.chunk_first,
        recall.store_blocks,
        recall.prompt_len,
        work.num_missing,
        work.missing,
        work.freed,
        layer,
        decode.arena.stride(0),
        decode.blocks.stride(0),
        recall.store_blocks.stride(0),
        work.max_chunks,
        **launch_options(decode.num_layers, heads, layout, store is not None).kwargs(),
        **overlap(pool.device, early),
    )
