"""Device functions that the recall kernels share: which head an item is, and where its landmarks lie."""

import triton
import triton.language as tl


@triton.jit
def recalling_head(
    row_slot: tl.tensor,
    extents: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    item: tl.tensor,
    layer: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
) -> tl.tensor:
    """(slot, chunks, hot slots, first logical landmark page, first logical store page) of an item.

    An item is `row*H + head`. All counts are 0, and the store page -1, for padding rows and for heads that
    do not recall.
    """
    slot = tl.load(row_slot + item // HEADS)
    live = slot >= 0
    head = (slot.to(tl.int64) * LAYERS + layer) * HEADS + item % HEADS
    # None of these loads waits for another.
    first_chunk = tl.load(chunk_first + head, mask=live, other=-1)
    first = tl.load(extents + head * 2, mask=live, other=0)
    hot = tl.load(extents + head * 2 + 1, mask=live, other=0) // PAGE
    chunks = tl.load(prompt_len + slot, mask=live, other=0) // PAGE
    recalls = first_chunk >= 0
    chunks = tl.where(recalls, chunks, 0)
    hot = tl.where(recalls, hot, 0)
    return slot, chunks, hot, first - tl.cdiv(chunks, PLACES), first_chunk


@triton.jit
def selecting_head(
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    item: tl.tensor,
    layer: tl.tensor,
    interval: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
) -> tl.tensor:
    """(slot, chunks, hot slots, first logical landmark page) as `recalling_head`, of heads that select now.

    That is, of rows that are on a selecting step; chunks are 0 for others.
    """
    length = tl.load(row_len + item // HEADS)
    slot, chunks, hot, landmarks, _ = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES
    )
    start = tl.load(prompt_len + slot, mask=slot >= 0, other=0)
    selects = (length - 1 - start) % interval == 0
    return slot, tl.where(selects, chunks, 0), hot, landmarks


@triton.jit
def arena_page(
    arena_row: tl.tensor, logical: tl.tensor, mask: tl.tensor, BLOCK_PAGES: tl.constexpr
) -> tl.tensor:
    """Physical page (int64) of logical arena pages; 0 where the mask is off."""
    block = tl.load(arena_row + logical // BLOCK_PAGES, mask=mask, other=0).to(tl.int64)
    return tl.where(mask, block * BLOCK_PAGES + logical % BLOCK_PAGES, 0)
