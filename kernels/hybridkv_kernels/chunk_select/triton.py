"""The choice of hot chunks as one Triton launch: a program per row and head."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..launch import LaunchOptions, await_launch_before, next_power_of_2, overlap
from ..pages import PAGE
from ..recall.hardware import by_hardware
from ..recall.layout import INDEX_BYTES, LandmarkLayout
from ..recall.paging import arena_page, selecting_head
from ..recall.tables import RecallTables
from ..recall.work import WEIGHTS_PAST_END, RecallWork
from ..tables import DecodeTables
from .naive import NOTHING

# Chunks whose keys a program holds in registers; a longer prompt's go through memory, as many at a time.
LARGEST_TILE = WEIGHTS_PAST_END
# Weights that a program looks at together: 64 a thread, or a member's of one tile.
WEIGHTS = 16384
# Not more: the many reductions cost more the more warps there are, and it runs beside other heads' attention.
# Nor fewer than have 15 keys of a tile each, which are counted in four bits.
THREADS = 256
# The largest finite number, for weights that are infinite.
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def weights_of(
    weights: tl.tensor,
    member: tl.tensor,
    start: tl.tensor,
    chunks: tl.tensor,
    stride_chunks: tl.tensor,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    TILE: tl.constexpr,
    EACH: tl.constexpr,
) -> tl.tensor:
    """Log-weights [M, TILE] of the group's members for chunks from `start` on; -inf where they count nothing.

    All loads are under way before the first is waited for: there is no mask for chunks past the last, as more
    predicates than there are would put the loads one after the other.
    """
    WIDTH: tl.constexpr = TILE // EACH
    # In three dimensions, as what a thread loads then lies constants apart.
    step = tl.arange(0, EACH)[None, :, None] * WIDTH
    thread = tl.arange(0, WIDTH)[None, None, :]
    at = weights + start + member.to(tl.int64)[:, None, None] * stride_chunks + thread + step
    if GROUP % MEMBERS == 0:
        weight = tl.load(at)
    else:
        weight = tl.load(at, mask=(member < GROUP)[:, None, None], other=float("-inf"))
    weight = tl.reshape(weight, (MEMBERS, TILE))
    most = tl.where(start + tl.arange(0, TILE) < chunks, LARGEST, float("-inf"))
    # The larger of NaN and a number is the number.
    return tl.minimum(tl.maximum(weight, float("-inf")), most[None, :])


@triton.jit
def in_order(x: tl.tensor) -> tl.tensor:
    """Bits of floats as int32 that have their order, and back."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def largest(weight: tl.tensor, EACH: tl.constexpr) -> tl.tensor:
    """The largest [M] of [M, N], by integers, whose largest in a warp is one instruction."""
    by_thread = tl.reshape(weight, (weight.shape[0], EACH, weight.shape[1] // EACH))
    of_thread = tl.max(by_thread, axis=1)
    of_all = tl.max(in_order(of_thread.to(tl.int32, bitcast=True)), axis=1)
    return in_order(of_all).to(tl.float32, bitcast=True)


@triton.jit
def add_up(weight: tl.tensor, best: tl.tensor, total: tl.tensor, EACH: tl.constexpr) -> tl.tensor:
    """(the largest weight [M] so far, the sum [M] of all so far, relative to it), with `weight` [M, N]."""
    new_best = tl.maximum(best, largest(weight, EACH))
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
    NOTHING: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """Keys [N] that order chunks by the largest of their shares of `weight` [M, N]; -1 past the last chunk.

    A key has 30 bits: the share's logarithm as a fixed-point number, which is 0 for NOTHING and less. The
    largest of all keys is for pinned chunks.
    """
    best = tl.where(best == float("-inf"), 0.0, best)
    # At least 1, the best chunk's own, unless no chunk has a weight.
    norm = best + by_hardware(tl.maximum(total, 1.0), "lg2", INTERPRETED)
    share = tl.max(weight - norm[:, None], axis=0)
    # No share is above 0, except where log2, an approximation, makes it so.
    share = tl.minimum(tl.maximum(share, NOTHING), 0.0)
    key = tl.maximum(0x3FFFFFFE + (share * (0x40000000 / -NOTHING)).to(tl.int32), 0)
    key = tl.where((chunk < pin_first) | (chunk >= chunks - pin_recent), 0x3FFFFFFF, key)
    return tl.where(chunk < chunks, key, -1)


@triton.jit
def count_reaching(key: tl.tensor, threshold: tl.tensor, shift: tl.tensor, EACH: tl.constexpr) -> tl.tensor:
    """How many keys [N] reach the threshold with a digit 1 to 7 at `shift`: words [4, T] that add up to it.

    Word i counts for digit i + 1 in its lower half and for i + 5 in its upper half, of which the last is 0.
    """
    digit = tl.minimum(tl.maximum((key - threshold) >> shift, 0), 7)
    # Four bits count the keys of a thread with a digit or more: a key counts with its own and all below.
    reach = tl.full((), 0x1111111, tl.int32) >> (28 - 4 * digit)
    reach = tl.sum(tl.reshape(reach, (EACH, key.shape[0] // EACH)), axis=0)
    return (reach[None, :] >> (4 * tl.arange(0, 4))[:, None]) & 0x000F000F


@triton.jit
def find_threshold(
    key: tl.tensor,
    waiting: tl.tensor,
    chunks: tl.tensor,
    wanted: tl.tensor,
    WHOLE: tl.constexpr,
    EACH: tl.constexpr,
) -> tl.tensor:
    """The largest threshold that `wanted` keys reach, or less, if no more reach it; and how many do.

    A digit of three bits at a time, since each waits for the one before; a few digits mostly tell the keys
    apart.

    Args:
        key: `[N]` int32, all keys if WHOLE; below 0 they do not count.
        waiting: to all keys otherwise, of which N are read at a time.
        chunks: keys that count.
        wanted: at most as many; if 0, no key reaches the threshold.
    """
    threshold = tl.full((), 0, tl.int32)
    shift = tl.full((), 27, tl.int32)
    reached = chunks
    while (reached > wanted) & (shift >= 0):
        if WHOLE:
            counts = count_reaching(key, threshold, shift, EACH)
        else:
            counts = tl.zeros((4, key.shape[0] // EACH), tl.int32)
            for start in range(0, chunks, key.shape[0]):
                index = start + tl.arange(0, key.shape[0])
                part = tl.load(waiting + index, mask=index < chunks, other=-1)
                counts += count_reaching(part, threshold, shift, EACH)
        counts = tl.sum(counts, axis=1)
        low, high = counts & 0xFFFF, (counts >> 16) & 0xFFFF
        low_fits, high_fits = low >= wanted, high >= wanted
        threshold += tl.sum(low_fits.to(tl.int32) + high_fits.to(tl.int32), axis=0) << shift
        fewest = tl.minimum(tl.where(low_fits, low, reached), tl.where(high_fits, high, reached))
        reached = tl.min(fewest, axis=0)
        shift -= 3
    return threshold, reached


@triton.jit
def entry_of(
    pool: tl.tensor,
    page: tl.tensor,
    chunk: tl.tensor,
    PLACES: tl.constexpr,
    PAGE_INTS: tl.constexpr,
    SLOT_INT: tl.constexpr,
) -> tl.tensor:
    """Where the landmark page of a chunk says what hot slot it has."""
    words = pool.to(tl.pointer_type(tl.int32))
    return words + (page.to(tl.int64) * PAGE_INTS + SLOT_INT + chunk % PLACES)


@triton.jit
def find_hot_slots(
    pool: tl.tensor,
    arena_row: tl.tensor,
    landmarks: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    BLOCK_PAGES: tl.constexpr,
    PLACES: tl.constexpr,
    PAGE_INTS: tl.constexpr,
    SLOT_INT: tl.constexpr,
) -> tl.tensor:
    """(landmark page, hot slot) of chunks [N]; -1 for the slot where they are not hot, or past the last."""
    inside = chunk < chunks
    page = arena_page(arena_row, landmarks + chunk // PLACES, inside, BLOCK_PAGES).to(tl.int32)
    entry = entry_of(pool, page, chunk, PLACES, PAGE_INTS, SLOT_INT)
    return page, tl.load(entry, mask=inside, other=-1)


@triton.jit
def number(x: tl.tensor, EACH: tl.constexpr) -> tl.tensor:
    """Of each element of [N] the sum of those before it, first of its thread's own, and then of all threads.

    Elements of a thread lie N / EACH apart.
    """
    by_thread = tl.reshape(x, (EACH, x.shape[0] // EACH))
    total = tl.sum(by_thread, axis=0)
    before = (tl.cumsum(total, axis=0) - total)[None, :] + tl.cumsum(by_thread, axis=0) - by_thread
    return tl.reshape(before, (x.shape[0],))


@triton.jit
def list_moves(
    pool: tl.tensor,
    key: tl.tensor,
    chunk: tl.tensor,
    page: tl.tensor,
    hot_slot: tl.tensor,
    threshold: tl.tensor,
    ties: tl.tensor,
    room: tl.tensor,
    moved: tl.tensor,
    arriving_list: tl.tensor,
    leaving_list: tl.tensor,
    PLACES: tl.constexpr,
    PAGE_INTS: tl.constexpr,
    SLOT_INT: tl.constexpr,
    EACH: tl.constexpr,
) -> tl.tensor:
    """Of chunks [N], append to the lists those that arrive and the slots of those that leave.

    If there are `ties`, there is `room` for the first of the keys that are equal to the threshold.

    Returns:
        The room that is left, and the chunks that `moved` before or now: 65536 times those that left, and
        those that arrived.
    """
    chosen = key >= threshold
    if ties:
        equal = (key == threshold).to(tl.int32)
        chosen = (key > threshold) | ((equal != 0) & (tl.cumsum(equal, axis=0) <= room))
        room -= tl.sum(equal, axis=0)
    arriving = chosen & (hot_slot < 0)
    leaving = (chosen == 0) & (hot_slot >= 0)
    moves = arriving.to(tl.int32) + (leaving.to(tl.int32) << 16)
    before = moved + number(moves, EACH)
    tl.store(entry_of(pool, page, chunk, PLACES, PAGE_INTS, SLOT_INT), -1, mask=leaving)
    tl.store(leaving_list + (before >> 16 & 0xFFFF), hot_slot, mask=leaving)
    tl.store(arriving_list + (before & 0xFFFF), chunk, mask=arriving)
    return room, moved + tl.sum(moves, axis=0)


@triton.jit
def choose(
    pool: tl.tensor,
    arena_row: tl.tensor,
    weights: tl.tensor,
    num_arriving: tl.tensor,
    arriving_list: tl.tensor,
    leaving_list: tl.tensor,
    counter: tl.tensor,
    page: tl.tensor,
    hot_slot: tl.tensor,
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
    NOTHING: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    EACH: tl.constexpr,
    MEMBERS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Choose the hot chunks of one head, of at most TILE chunks if WHOLE: the last one's key is searched for.

    Otherwise keys wait where the missing chunks will be listed: the list never overtakes the chunks that were
    looked at. The barriers keep the threads' writes of keys, reads of keys and writes of the list in order.

    Pointers are to what is the head's, or its slot's, in the buffers of `RecallWork`; `page` and `hot_slot`
    are of the first TILE chunks.
    """
    chunk = tl.arange(0, TILE)
    key = tl.full((TILE,), -1, tl.int32)
    # Not unrolled: the loads of all members would come first, and fill the registers.
    for first in range(0, GROUP, MEMBERS):
        member = first + tl.arange(0, MEMBERS)
        best = tl.full((MEMBERS,), float("-inf"), tl.float32)
        total = tl.zeros((MEMBERS,), tl.float32)
        if WHOLE:
            weight = weights_of(weights, member, 0, chunks, stride_chunks, GROUP, MEMBERS, TILE, EACH)
            best, total = add_up(weight, best, total, EACH)
            part = keys_of(weight, best, total, chunk, chunks, pin_first, pin_recent, NOTHING, INTERPRETED)
            key = tl.maximum(key, part)
        else:
            parts = tl.cdiv(chunks, TILE)
            # Twice over all parts, in one loop: two would need registers for the addresses of both.
            for step in range(0, 2 * parts):
                start = step % parts * TILE
                index = start + chunk
                weight = weights_of(weights, member, start, chunks, stride_chunks, GROUP, MEMBERS, TILE, EACH)
                if step < parts:
                    best, total = add_up(weight, best, total, EACH)
                else:
                    part = keys_of(
                        weight, best, total, index, chunks, pin_first, pin_recent, NOTHING, INTERPRETED
                    )
                    earlier = tl.load(arriving_list + index, mask=(index < chunks) & (first > 0), other=-1)
                    tl.debug_barrier()
                    tl.store(arriving_list + index, tl.maximum(part, earlier), mask=index < chunks)
            tl.debug_barrier()
    threshold, reached = find_threshold(key, arriving_list, chunks, hot_slots, WHOLE, EACH)
    room = hot_slots
    # Rarely more keys are equal to the threshold than there is room for.
    ties = reached > hot_slots
    if ties:
        for start in range(0, chunks, TILE):
            if not WHOLE:
                key = tl.load(arriving_list + start + chunk, mask=start + chunk < chunks, other=-1)
            room -= tl.sum((key > threshold).to(tl.int32), axis=0)
    moved = tl.full((), 0, tl.int32)
    for start in range(0, chunks, TILE):
        index = start + chunk
        if not WHOLE:
            page, hot_slot = find_hot_slots(
                pool, arena_row, landmarks, index, chunks, BLOCK_PAGES, PLACES, PAGE_INTS, SLOT_INT
            )
            key = tl.load(arriving_list + index, mask=index < chunks, other=-1)
            tl.debug_barrier()
        room, moved = list_moves(
            pool,
            key,
            index,
            page,
            hot_slot,
            threshold,
            ties,
            room,
            moved,
            arriving_list,
            leaving_list,
            PLACES,
            PAGE_INTS,
            SLOT_INT,
            EACH,
        )
    arrived = moved & 0xFFFF
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
    NOTHING: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    EACH: tl.constexpr,
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
    arena_row = arena + slot.to(tl.int64) * stride_arena
    # Known before the weights are.
    page, hot_slot = find_hot_slots(
        pool, arena_row, landmarks, tl.arange(0, TILE), chunks, LAYERS * HEADS, PLACES, PAGE_INTS, SLOT_INT
    )
    await_launch_before(OVERLAP)
    if chunks == 0:
        tl.store(num_missing + item, 0)
        return
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
            page,
            hot_slot,
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
            NOTHING,
            INTERPRETED,
            TILE,
            EACH,
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
            page,
            hot_slot,
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
            NOTHING,
            INTERPRETED,
            TILE,
            EACH,
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
        "NOTHING": NOTHING,
        "INTERPRETED": bool(knobs.runtime.interpret),
        "TILE": tile,
        "EACH": -(-tile // THREADS),
        "MEMBERS": min(next_power_of_2(group), WEIGHTS // tile),
        "LONGER": max_chunks > tile,
        # Of a longer prompt half as many, as more of it is known at a time.
        "MEMBERS_LONGER": min(next_power_of_2(group), max(WEIGHTS // tile // 2, 1)),
    }
    return LaunchOptions(constexprs, num_warps=THREADS // 32, num_stages=1)


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
