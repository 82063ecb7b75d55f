"""The device function that the plan and the decode kernel must agree on: how many pages a head has."""

import triton
import triton.language as tl


@triton.jit
def head_lengths(
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    tail_start: tl.tensor,
    item: tl.tensor,
    items: tl.tensor,
    layer: tl.tensor,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
) -> tl.tensor:
    """(slot, first logical page, extent tokens, first tail position, tail tokens) of each item.

    An item is `row * HEADS + head`. Lengths are 0 for padding rows and past the last item.
    """
    inside = item < items
    slot = tl.load(row_slot + item // HEADS, mask=inside, other=-1)
    length = tl.load(row_len + item // HEADS, mask=inside, other=0)
    live = slot >= 0
    entry = extents + ((slot.to(tl.int64) * LAYERS + layer) * HEADS + item % HEADS) * 2
    first = tl.load(entry, mask=live, other=0)
    extent = tl.load(entry + 1, mask=live, other=0)
    start = tl.load(tail_start + slot, mask=live, other=0)
    tail = tl.where(live, tl.maximum(length - start, 0), 0)
    return slot, first, extent, start, tail
