"""The choice of hot chunks as one Triton launch: a program per row and head."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..extent_decode.tables import DecodeTables
from ..launch import LaunchOptions, await_launch_before, next_power_of_2, overlap
from ..pages import PAGE
from ..recall.layout import INDEX_BYTES, LandmarkLayout
from ..recall.paging import arena_page, selecting_head
from ..recall.tables import RecallTables
from ..recall.work import RecallWork

# Chunks whose keys a program holds in registers; a longer prompt's go through memory, as many at a time.
LARGEST_TILE = 2048
# Weights that a program looks at together: 64 a thread, or a member's of one tile.
WEIGHTS = 16384


@triton.jit
def weights_of(
    weights: tl.tensor,
    member: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    stride_chunks: tl.tensor,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Log-weights [M, N] of chunks for members of the group, -inf where they count nothing."""
    inside = (member < GROUP)[:, None] & (chunk < chunks)[None, :]
    at = weights + member.to(tl.int64)[:, None] * stride_chunks + chunk[None, :]
    weight = tl.load(at, mask=inside, other=float("-inf"))
    # NaN fails the comparison too.
    return tl.where(weight < float("inf"), weight, float("-inf"))


@triton.jit
def add_up(weight: tl.tensor, best: tl.tensor, total: tl.tensor) -> tl.tensor:
    """(the largest weight [M] so far, the sum [M] of all so far, relative to it), with `weight` [M, N]."""
    new_best = tl.maximum(best, tl.max(weight, axis=1))
    finite = tl.where(new_best == float("-inf"), 0.0, new_best)
    return new_best, total * tl.exp2(best - finite) + tl.sum(tl.exp2(weight - finite[:, None]), axis=1)


@triton.jit
def keys_of(
    weight: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    pin_first: tl.tensor,
    pin_recent: tl.tensor,
) -> tl.tensor:
    """Keys [N], int32, that order chunks by the largest of their shares of `weight` [M, N]; -1 past the last.

    The bits of non-negative floats order like the floats, and one key above them all is for pinned chunks.
    """
    best = tl.where(best == float("-inf"), 0.0, best)
    # At least 1, the best chunk's own, unless no chunk has a weight.
    norm = best + tl.log2(tl.maximum(total, 1.0))
    share = tl.max(weight - norm[:, None], axis=0)
    # No share is above 0, except where log2, an approximation, makes it so.
    key = 0x7FFFFFFE - tl.abs(tl.minimum(share, 0.0)).to(tl.int32, bitcast=True)
    key = tl.where((chunk < pin_first) | (chunk >= chunks - pin_recent), 0x7FFFFFFF, key)
    return tl.where(chunk < chunks, key, -1)


@triton.jit
def count_reaching(
    key: tl.tensor,
    waiting: tl.tensor,
    candidate: tl.tensor,
    chunks: tl.tensor,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """How many keys reach each of 8 candidates; the keys are `key` if WHOLE, else they are read."""
    # A difference shifted like that is -1 where it is negative; none overflows.
    if WHOLE:
        reach = TILE + tl.sum((key[None, :] - candidate[:, None]) >> 31, axis=1)
    else:
        reach = tl.zeros((8,), tl.int32)
        for start in range(0, chunks, TILE):
            index = start + tl.arange(0, TILE)
            part = tl.load(waiting + index, mask=index < chunks, other=-1)
            reach += TILE + tl.sum((part[None, :] - candidate[:, None]) >> 31, axis=1)
    return reach


@triton.jit
def find_threshold(
    key: tl.tensor,
    waiting: tl.tensor,
    chunks: tl.tensor,
    wanted: tl.tensor,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The largest threshold that `wanted` keys reach, or less, if no more reach it; and how many do.

    A digit of three bits at a time, since each waits for the one before; a few digits mostly tell the keys
    apart.

    Args:
        key: `[TILE]` int32, all keys if WHOLE; below 0 they do not count.
        waiting: to all keys otherwise.
        chunks: keys that count.
        wanted: at most as many.
    """
    digit = tl.arange(0, 8)
    threshold = tl.full((), 0, tl.int32)
    shift = tl.full((), 28, tl.int32)
    reached = chunks
    while (reached > wanted) & (shift >= 0):
        candidate = threshold | (digit << shift)
        reach = count_reaching(key, waiting, candidate, chunks, WHOLE, TILE)
        # Digit 0 always does.
        fits = reach >= wanted
        threshold = tl.max(tl.where(fits, candidate, 0), axis=0)
        reached = tl.min(tl.where(fits, reach, 0x7FFFFFFF), axis=0)
        # The last bit alone is looked at with two that are known: what they would add does not fit.
        shift = tl.where(shift == 1, 0, shift - 3)
    return threshold, reached


@triton.jit
def choose(
    pool: tl.tensor,
    arena_row: tl.tensor,
    weights: tl.tensor,
    num_arriving: tl.tensor,
    arriving_list: tl.tensor,
    leaving_list: tl.tensor,
    counter: tl.tensor,
    chunks: tl.tensor,
    hot_slots: tl.tensor,
    landmarks: tl.tensor,
    pin_first: tl.tensor,
    pin_recent: tl.tensor,
    stride_chunks: tl.tensor,
    BLOCK_PAGES: tl.constexpr,
    GROUP: tl.constexpr,
    PLACES: tl.constexpr,
    PAGE_INTS: tl.constexpr,
    SLOT_INT: tl.constexpr,
    TILE: tl.constexpr,
    MEMBERS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Choose the hot chunks of one head, of at most TILE chunks if WHOLE: the last one's key is searched for.

    Otherwise keys wait where the missing chunks will be listed: the list never overtakes the chunks that were
    looked at. The barriers keep the threads' writes of keys, reads of keys and writes of the list in order.

    Pointers are to what is the head's, or its slot's, in the buffers of `RecallWork`.
    """
    chunk = tl.arange(0, TILE)
    key = tl.full((TILE,), -1, tl.int32)
    # Not unrolled: the loads of all members would come first, and fill the registers.
    for first in range(0, GROUP, MEMBERS):
        member = first + tl.arange(0, MEMBERS)
        best = tl.full((MEMBERS,), float("-inf"), tl.float32)
        total = tl.zeros((MEMBERS,), tl.float32)
        if WHOLE:
            weight = weights_of(weights, member, chunk, chunks, stride_chunks, GROUP)
            best, total = add_up(weight, best, total)
            key = tl.maximum(key, keys_of(weight, best, total, chunk, chunks, pin_first, pin_recent))
        else:
            parts = tl.cdiv(chunks, TILE)
            # Twice over all parts, in one loop: two would need registers for the addresses of both.
            for step in range(0, 2 * parts):
                start = step % parts * TILE
                index = start + chunk
                weight = weights_of(weights, member, index, chunks, stride_chunks, GROUP)
                if step < parts:
                    best, total = add_up(weight, best, total)
                else:
                    part = keys_of(weight, best, total, index, chunks, pin_first, pin_recent)
                    earlier = tl.load(arriving_list + index, mask=(index < chunks) & (first > 0), other=-1)
                    tl.debug_barrier()
                    tl.store(arriving_list + index, tl.maximum(part, earlier), mask=index < chunks)
            tl.debug_barrier()
    threshold, reached = find_threshold(key, arriving_list, chunks, hot_slots, WHOLE, TILE)
    room = hot_slots
    # Rarely more keys are equal to the threshold than there is room for.
    if reached > hot_slots:
        for start in range(0, chunks, TILE):
            if not WHOLE:
                key = tl.load(arriving_list + start + chunk, mask=start + chunk < chunks, other=-1)
            room -= tl.sum((key > threshold).to(tl.int32), axis=0)

    words = pool.to(tl.pointer_type(tl.int32))
    equal_before = tl.full((), 0, tl.int32)
    # Chunks that arrived, and 65536 times those that left.
    seen = tl.full((), 0, tl.int32)
    for start in range(0, chunks, TILE):
        index = start + chunk
        inside = index < chunks
        page = arena_page(arena_row, landmarks + index // PLACES, inside, BLOCK_PAGES)
        entry = words + (page * PAGE_INTS + SLOT_INT + index % PLACES)
        hot_slot = tl.load(entry, mask=inside, other=-1)
        if WHOLE:
            waiting = key
        else:
            waiting = tl.load(arriving_list + index, mask=inside, other=-1)
            tl.debug_barrier()
        chosen = waiting >= threshold
        if reached > hot_slots:
            equal = (waiting == threshold).to(tl.int32)
            fits = equal_before + tl.cumsum(equal, axis=0) <= room
            chosen = (waiting > threshold) | ((equal != 0) & fits)
            equal_before += tl.sum(equal, axis=0)
        arriving = chosen & (hot_slot < 0)
        leaving = (chosen == 0) & (hot_slot >= 0)
        both = arriving.to(tl.int32) + (leaving.to(tl.int32) << 16)
        before = seen + tl.cumsum(both, axis=0) - both
        tl.store(entry, -1, mask=leaving)
        tl.store(leaving_list + (before >> 16 & 0xFFFF), hot_slot, mask=leaving)
        tl.store(arriving_list + (before & 0xFFFF), index, mask=arriving)
        seen += tl.sum(both, axis=0)
    arrived = seen & 0xFFFF
    tl.store(num_arriving, arrived)
    tl.atomic_add(counter, (hot_slots - arrived).to(tl.int64), sem="relaxed")
    tl.atomic_add(counter + 1, arrived.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["layer", "interval", "pin_first", "pin_recent", "stride_chunks"])
def chunk_select_kernel(
    pool: tl.tensor,
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    log_weight: tl.tensor,
    num_missing: tl.tensor,
    missing: tl.tensor,
    freed: tl.tensor,
    counters: tl.tensor,
    layer: tl.tensor,
    interval: tl.tensor,
    pin_first: tl.tensor,
    pin_recent: tl.tensor,
    stride_arena: tl.tensor,
    stride_chunks: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PLACES: tl.constexpr,
    PAGE_INTS: tl.constexpr,
    SLOT_INT: tl.constexpr,
    TILE: tl.constexpr,
    MEMBERS: tl.constexpr,
    LONGER: tl.constexpr,
    MEMBERS_LONGER: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Choose the hot chunks of item `program_id(0)`."""
    item = tl.program_id(0)
    slot, chunks, hot_slots, landmarks = selecting_head(
        row_slot,
        row_len,
        extents,
        chunk_first,
        prompt_len,
        item,
        layer,
        interval,
        PAGE,
        LAYERS,
        HEADS,
        PLACES,
    )
    await_launch_before(OVERLAP)
    if chunks == 0:
        tl.store(num_missing + item, 0)
        return
    arena_row = arena + slot.to(tl.int64) * stride_arena
    weights = log_weight + item.to(tl.int64) * GROUP * stride_chunks
    if chunks <= TILE:
        choose(
            pool,
            arena_row,
            weights,
            num_missing + item,
            missing + item.to(tl.int64) * stride_chunks,
            freed + item.to(tl.int64) * stride_chunks,
            counters + slot.to(tl.int64) * 2,
            chunks,
            hot_slots,
            landmarks,
            pin_first,
            pin_recent,
            stride_chunks,
            LAYERS * HEADS,
            GROUP,
            PLACES,
            PAGE_INTS,
            SLOT_INT,
            TILE,
            MEMBERS,
            True,
        )
    elif LONGER:
        choose(
            pool,
            arena_row,
            weights,
            num_missing + item,
            missing + item.to(tl.int64) * stride_chunks,
            freed + item.to(tl.int64) * stride_chunks,
            counters + slot.to(tl.int64) * 2,
            chunks,
            hot_slots,
            landmarks,
            pin_first,
            pin_recent,
            stride_chunks,
            LAYERS * HEADS,
            GROUP,
            PLACES,
            PAGE_INTS,
            SLOT_INT,
            TILE,
            MEMBERS_LONGER,
            False,
        )


@functools.cache
def launch_options(
    num_layers: int, num_kv_heads: int, group: int, max_chunks: int, layout: LandmarkLayout
) -> LaunchOptions:
    """How `chunk_select_kernel` is compiled for a model's shape and the longest prompt."""
    tile = min(next_power_of_2(max_chunks), LARGEST_TILE)
    constexprs = {
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "GROUP": group,
        "PLACES": layout.places,
        "PAGE_INTS": layout.page_bytes // INDEX_BYTES,
        "SLOT_INT": layout.slot_offset // INDEX_BYTES,
        "TILE": tile,
        "MEMBERS": min(next_power_of_2(group), WEIGHTS // tile),
        "LONGER": max_chunks > tile,
        # Of a longer prompt half as many, as more of it is known at a time.
        "MEMBERS_LONGER": min(next_power_of_2(group), max(WEIGHTS // tile // 2, 1)),
    }
    # The many reductions cost more the more warps there are, and it runs beside other heads' attention.
    return LaunchOptions(constexprs, num_warps=8, num_stages=1)


def chunk_select(
    pool: Tensor,
    row_slot: Tensor,
    row_len: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    layout: LandmarkLayout,
    work: RecallWork,
    interval: int,
    pin_first: int,
    pin_recent: int,
    early: bool,
) -> None:
    """See `hybridkv_kernels.chunk_select.chunk_select`."""
    heads = decode.num_kv_heads
    _, group, max_chunks = work.log_weight.shape
    chunk_select_kernel[(row_slot.shape[0] * heads,)](
        pool,
        row_slot,
        row_len,
        decode.extents,
        decode.arena,
        recall.chunk_first,
        recall.prompt_len,
        work.log_weight,
        work.num_missing,
        work.missing,
        work.freed,
        work.counters,
        layer,
        interval,
        pin_first,
        pin_recent,
        decode.arena.stride(0),
        max_chunks,
        **launch_options(decode.num_layers, heads, group, max_chunks, layout).kwargs(),
        **overlap(pool.device, early),
    )
