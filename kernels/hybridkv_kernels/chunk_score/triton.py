"""The chunk scores in Triton: queries are rotated once, then codes go through the tensor cores as bytes."""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..extent_decode.work_list import WorkList, split_of
from ..launch import (
    FULL_PRECISION,
    LaunchOptions,
    await_launch_before,
    next_power_of_2,
    overlap,
    widen_dots,
)
from ..pages import PAGE
from ..recall.hardware import by_hardware
from ..recall.landmarks import Landmarks
from ..recall.layout import STEP_BYTES, LandmarkLayout
from ..recall.paging import arena_page, recalling_head, selecting_head
from ..recall.tables import RecallTables
from ..recall.work import RecallWork, members, span_pad
from ..tables import DecodeTables

# The least M of a tensor-core dot.
GROUP_PAD = 16
# Chunks of a tile of scores, and columns of the tile of a page's mean, which has one of use.
TILE_CHUNKS = 2
MEAN_PAD = 8
# Most steps of a query's digits: two signed bytes, the higher one times 256.
LARGEST_LEVEL = 32512


@triton.jit(do_not_specialize=["layer", "interval"])
def prepare_kernel(
    query: tl.tensor,
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    rotation: tl.tensor,
    digits: tl.tensor,
    terms: tl.tensor,
    layer: tl.tensor,
    interval: tl.tensor,
    scale_log2: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PART: tl.constexpr,
    RUNS: tl.constexpr,
    SPAN: tl.constexpr,
    SPAN_PAD: tl.constexpr,
    LARGEST_LEVEL: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Rotate the query group of item `program_id(0)`; run `program_id(1)` of its dimensions, as digits.

    No rotated dimension is larger than the query is long: so each run knows the step that all use. What is
    read of a run's codes is its place in half a byte times as large, so the run's levels are as much smaller.
    """
    item = tl.program_id(0)
    _, chunks, _, _ = selecting_head(
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
    run = tl.program_id(1)
    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, SPAN_PAD)
    in_span = column < SPAN
    # All loads are under way before a dot waits for one; the rotation's do not wait for the launch before.
    turns = ()
    for start in tl.static_range(0, HEAD_PAD, PART):
        dim = start + tl.arange(0, PART)
        turns += (  # type: ignore[assignment]
            tl.load(
                rotation + dim[:, None] * HEAD_SIZE + run * SPAN + column[None, :],
                mask=(dim < HEAD_SIZE)[:, None] & in_span[None, :],
                other=0.0,
            ),
        )
    await_launch_before(OVERLAP)
    if chunks == 0:
        return
    row = (item // HEADS).to(tl.int64)
    group = query + row * stride_query_row + (item % HEADS * GROUP + member)[:, None] * stride_query_head
    queries = ()
    for start in tl.static_range(0, HEAD_PAD, PART):
        dim = start + tl.arange(0, PART)
        known = (member < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
        queries += (tl.load(group + dim[None, :], mask=known, other=0.0),)  # type: ignore[assignment]
    rotated = tl.zeros((GROUP_PAD, SPAN_PAD), tl.float32)
    squares = tl.zeros((GROUP_PAD,), tl.float32)
    for part in tl.static_range(HEAD_PAD // PART):
        # Not scaled yet: so values of 16 bits are exact.
        q: tl.tensor = queries[part].to(tl.float32)
        rotated = tl.dot(q, turns[part], rotated, input_precision=PRECISION)
        squares += tl.sum(q * q, axis=1)
    step = tl.maximum(tl.sqrt(squares) * tl.abs(scale_log2), 1e-30) / LARGEST_LEVEL
    weight = (1 << (run % (RUNS // 2) * (8 // RUNS))).to(tl.float32)
    scaled = rotated * scale_log2 / (step * weight)[:, None]
    level = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int32)
    high = (level + 128) >> 8
    written = member < MEMBERS
    item = item.to(tl.int64)
    to = digits + ((item * RUNS + run) * (2 * MEMBERS) + member)[:, None] * SPAN_PAD + column[None, :]
    mask = written[:, None] & in_span[None, :]
    tl.store(to, high.to(tl.int8), mask=mask)
    tl.store(to + MEMBERS * SPAN_PAD, (level - 256 * high).to(tl.int8), mask=mask)
    to_terms = terms + item * ((1 + RUNS) * MEMBERS) + member
    tl.store(to_terms + (1 + run) * MEMBERS, weight * tl.sum(level, axis=1), mask=written)
    tl.store(to_terms, step, mask=written & (run == 0))


@triton.jit
def codes_of(
    packed: tl.tensor, run: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """The codes at `run` of all bytes, times what their place in half a byte makes of them."""
    SHIFT: tl.constexpr = run * BITS // 4 * 4
    MASK: tl.constexpr = (2**BITS - 1) << (run * BITS - SHIFT)
    if INTERPRETED:
        return ((packed.to(tl.uint8, bitcast=True) >> SHIFT) & MASK).to(tl.int8)
    # Four bytes a time; what is shifted in from a neighbour is masked out.
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 $0, t, {0x01010101 * MASK}; }}",
        "=r,r",
        [packed],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def whole_products(products: tl.tensor, MEMBERS: tl.constexpr) -> tl.tensor:
    """The products [MEMBERS, N] of levels, from those [2 * MEMBERS, N] of their high and low digits."""
    by_digit = tl.reshape(products, (2, MEMBERS, products.shape[1]))
    high, low = tl.split(tl.permute(by_digit, (1, 2, 0)))
    return (256 * high + low).to(tl.float32)


@triton.jit(do_not_specialize=["items", "layer", "max_chunks"])
def sketch_kernel(
    pool: tl.tensor,
    row_slot: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    offsets: tl.tensor,
    work: tl.tensor,
    digits: tl.tensor,
    terms: tl.tensor,
    log_weight: tl.tensor,
    items: tl.tensor,
    layer: tl.tensor,
    max_chunks: tl.tensor,
    stride_arena: tl.tensor,
    stride_offsets: tl.tensor,
    stride_work: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    SPAN_PAD: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    LEVEL_OFFSET: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    MEAN_PAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Log-weights of the chunks of split `program_id(0)`'s landmark pages, from their sketches.

    Tokens are the columns of the products and the members' digits the rows, so that what a chunk's tokens are
    reduced by lies mostly in one thread. Places are scored even where the last page has no chunk: nothing of
    them is stored.
    """
    RUNS: tl.constexpr = 8 // BITS
    TOKENS: tl.constexpr = TILE_CHUNKS * PAGE
    item, split, splits = split_of(offsets, work, tl.program_id(0), items, layer, stride_offsets, stride_work)
    slot, chunks, _, landmarks, _ = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES
    )
    await_launch_before(OVERLAP)
    if splits == 0:
        return
    pages = tl.cdiv(chunks, PLACES)
    share = tl.cdiv(pages, splits)
    arena_row = arena + slot.to(tl.int64) * stride_arena
    item = item.to(tl.int64)
    member = tl.arange(0, MEMBERS)
    column = tl.arange(0, SPAN_PAD)
    digit_rows = digits + item * (RUNS * 2 * MEMBERS * SPAN_PAD)
    digit_rows += tl.arange(0, 2 * MEMBERS)[:, None] * SPAN_PAD + column[None, :]
    item_terms = terms + item * ((1 + RUNS) * MEMBERS) + member
    zero = tl.zeros((MEMBERS,), tl.float32)
    query_digits = ()
    for run in tl.static_range(RUNS):
        query_digits += (tl.load(digit_rows + run * (2 * MEMBERS * SPAN_PAD)),)  # type: ignore[assignment]
        zero += tl.load(item_terms + (1 + run) * MEMBERS)
    # A sketch's level is 2 * code - 1, of two bits 2 * code - 3.
    zero *= -0.5 * (2**BITS - 1)
    slope = 2.0 * tl.load(item_terms)
    of_mean = (column < SPAN)[:, None] & (tl.arange(0, MEAN_PAD) == 0)[None, :]
    for index in range(split * share, tl.minimum(split * share + share, pages)):
        page = arena_page(arena_row, landmarks + index, index >= 0, LAYERS * HEADS)
        base = (pool + page * (PAGE * 2 * HEAD_SIZE)).to(tl.pointer_type(tl.uint8))
        scales = (base + SCALE_OFFSET).to(tl.pointer_type(tl.float16))
        levels = (base + LEVEL_OFFSET).to(tl.pointer_type(tl.int8))
        mean_product = tl.zeros((2 * MEMBERS, MEAN_PAD), tl.int32)
        # In half a byte a run's levels are worth 2^BITS times as much as those of the run before.
        for within in tl.static_range(RUNS // 2 - 1, -1, -1):
            mean_product <<= BITS
            for half in tl.static_range(0, RUNS, RUNS // 2):
                mean = tl.load(levels + ((half + within) * SPAN + column)[:, None], mask=of_mean, other=0)
                mean_product = tl.dot(query_digits[half + within], mean, mean_product, out_dtype=tl.int32)
        mean_step = 0.5 * tl.load(levels.to(tl.pointer_type(tl.float32)) - 1)
        around = tl.sum(whole_products(mean_product, MEMBERS), axis=1) * (slope * mean_step)
        scale = tl.load(scales + tl.arange(0, TOKENS))
        for first in range(0, PLACES, TILE_CHUNKS):
            # The last tile begins early enough to end with the page.
            place = tl.minimum(first, PLACES - TILE_CHUNKS)
            token = place * PAGE + tl.arange(0, TOKENS)
            # A tile ahead: there is work to do while it comes.
            following = tl.minimum(first + TILE_CHUNKS, PLACES - TILE_CHUNKS) * PAGE
            next_scale = tl.load(scales + following + tl.arange(0, TOKENS))
            codes_of_tokens = base + token[:, None] * SPAN + column[None, :]
            if SPAN == SPAN_PAD:
                packed = tl.load(codes_of_tokens)
            else:
                packed = tl.load(codes_of_tokens, mask=(column < SPAN)[None, :], other=0)
            packed = tl.trans(packed.to(tl.int8, bitcast=True))
            product = tl.zeros((2 * MEMBERS, TOKENS), tl.int32)
            for run in tl.static_range(RUNS):
                codes = codes_of(packed, run, BITS, INTERPRETED)
                product = tl.dot(query_digits[run], codes, product, out_dtype=tl.int32)
            # In units of the slope, which is positive.
            logits = (whole_products(product, MEMBERS) + zero[:, None]) * scale.to(tl.float32)[None, :]
            by_chunk = tl.reshape(logits, (MEMBERS, TILE_CHUNKS, PAGE))
            best = tl.max(by_chunk, axis=2)
            best *= slope[:, None]
            above = by_chunk * slope[:, None, None] - best[:, :, None]
            total = tl.sum(by_hardware(above, "ex2", INTERPRETED), axis=2)
            weight = around[:, None] + best + by_hardware(total, "lg2", INTERPRETED)
            chunk = index * PLACES + place + tl.arange(0, TILE_CHUNKS)
            to = log_weight + (item * GROUP + member)[:, None] * max_chunks + chunk[None, :]
            tl.store(to, weight, mask=(member < GROUP)[:, None] & (chunk < chunks)[None, :])
            scale = next_scale


@triton.jit(do_not_specialize=["items", "layer", "max_chunks"])
def bound_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    row_slot: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    offsets: tl.tensor,
    work: tl.tensor,
    log_weight: tl.tensor,
    items: tl.tensor,
    layer: tl.tensor,
    max_chunks: tl.tensor,
    scale_log2: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_arena: tl.tensor,
    stride_offsets: tl.tensor,
    stride_work: tl.tensor,
    KIND: tl.constexpr,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PART: tl.constexpr,
    PLACES: tl.constexpr,
    DATA_ELEMENTS: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Log-weights of the chunks of split `program_id(0)`'s landmark pages, from mean keys or from bounds."""
    item, split, splits = split_of(offsets, work, tl.program_id(0), items, layer, stride_offsets, stride_work)
    slot, chunks, _, landmarks, _ = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES
    )
    await_launch_before(OVERLAP)
    if splits == 0:
        return
    share = tl.cdiv(tl.cdiv(chunks, PLACES), splits) * PLACES
    end = tl.minimum(split * share + share, chunks)
    member = tl.arange(0, GROUP_PAD)
    row = (item // HEADS).to(tl.int64)
    group = query + row * stride_query_row + (item % HEADS * GROUP + member)[:, None] * stride_query_head
    arena_row = arena + slot.to(tl.int64) * stride_arena
    for first in range(split * share, end, TILE_CHUNKS):
        chunk = first + tl.arange(0, TILE_CHUNKS)
        live = chunk < end
        page = arena_page(arena_row, landmarks + chunk // PLACES, live, LAYERS * HEADS)
        data = pool + page * (PAGE * 2 * HEAD_SIZE) + (chunk % PLACES) * DATA_ELEMENTS
        logits = tl.zeros((TILE_CHUNKS, GROUP_PAD), tl.float32)
        for start in tl.static_range(0, HEAD_PAD, PART):
            dim = start + tl.arange(0, PART)
            mask = live[:, None] & (dim < HEAD_SIZE)[None, :]
            values = tl.load(data[:, None] + dim[None, :], mask=mask, other=0.0)
            # For each tile anew: there are no registers to keep it in.
            known = (member < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
            q = tl.load(group + dim[None, :], mask=known, other=0.0)
            if WIDEN:
                q, values = q.to(tl.float32), values.to(tl.float32)
            if KIND == "mean":
                logits = tl.dot(values, tl.trans(q), logits, input_precision=PRECISION)
            else:
                largest = tl.load(data[:, None] + (HEAD_SIZE + dim)[None, :], mask=mask, other=0.0)
                if WIDEN:
                    largest = largest.to(tl.float32)
                # Triton 3.6 takes minimum and maximum of bf16 in fp32.
                zero = tl.zeros_like(q)
                below = tl.minimum(q, zero).to(q.dtype)
                logits = tl.dot(values, tl.trans(below), logits, input_precision=PRECISION)
                above = tl.maximum(q, zero).to(q.dtype)
                logits = tl.dot(largest, tl.trans(above), logits, input_precision=PRECISION)
        to = log_weight + (item.to(tl.int64) * GROUP + member)[None, :] * max_chunks + chunk[:, None]
        tl.store(to, logits * scale_log2, mask=live[:, None] & (member < GROUP)[None, :])


def _sketch_shape(num_layers: int, num_kv_heads: int, group: int, layout: LandmarkLayout) -> dict[str, Any]:
    return {
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "PLACES": layout.places,
        "GROUP": group,
        "MEMBERS": members(group),
        "HEAD_SIZE": layout.head_size,
        "SPAN": layout.span,
        "SPAN_PAD": span_pad(layout),
    }


@functools.cache
def prepare_options(
    num_layers: int, num_kv_heads: int, group: int, layout: LandmarkLayout, dtype: torch.dtype
) -> LaunchOptions:
    """How `prepare_kernel` is compiled for a model's shape."""
    head_pad = next_power_of_2(layout.head_size)
    constexprs = {
        **_sketch_shape(num_layers, num_kv_heads, group, layout),
        "GROUP_PAD": GROUP_PAD,
        "HEAD_PAD": head_pad,
        "PART": min(head_pad, 32 if dtype == torch.float32 else 64),
        "RUNS": 8 // layout.sketch_bits,
        "LARGEST_LEVEL": LARGEST_LEVEL,
        # The rotation's own rounding does not matter.
        "PRECISION": FULL_PRECISION if dtype == torch.float32 else "tf32",
    }
    return LaunchOptions(constexprs, num_warps=4, num_stages=1)


@functools.cache
def sketch_options(num_layers: int, num_kv_heads: int, group: int, layout: LandmarkLayout) -> LaunchOptions:
    """How `sketch_kernel` is compiled for a model's shape."""
    constexprs = {
        **_sketch_shape(num_layers, num_kv_heads, group, layout),
        "BITS": layout.sketch_bits,
        "SCALE_OFFSET": layout.scale_offset,
        "LEVEL_OFFSET": layout.mean_offset + STEP_BYTES,
        "TILE_CHUNKS": TILE_CHUNKS,
        "MEAN_PAD": MEAN_PAD,
        "INTERPRETED": bool(knobs.runtime.interpret),
    }
    return LaunchOptions(constexprs, num_warps=1, num_stages=3)


@functools.cache
def bound_options(
    num_layers: int, num_kv_heads: int, group: int, layout: LandmarkLayout, dtype: torch.dtype
) -> LaunchOptions:
    """How `bound_kernel` is compiled for a model's shape."""
    full, head_pad = dtype == torch.float32, next_power_of_2(layout.head_size)
    constexprs = {
        "KIND": layout.kind,
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "GROUP": group,
        "GROUP_PAD": GROUP_PAD,
        "HEAD_SIZE": layout.head_size,
        "PLACES": layout.places,
        "HEAD_PAD": head_pad,
        "PART": min(head_pad, 128),
        "DATA_ELEMENTS": layout.data_bytes // layout.itemsize,
        "TILE_CHUNKS": 16 if full else 64,
        "PRECISION": "ieee" if full else "tf32",
        "WIDEN": widen_dots(dtype),
    }
    return LaunchOptions(constexprs, num_warps=8 if full else 4, num_stages=1)


def chunk_score(
    query: Tensor,
    pool: Tensor,
    row_slot: Tensor,
    row_len: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    scale: float,
    landmarks: Landmarks,
    work: RecallWork,
    plan: WorkList,
    interval: int,
    early: bool,
) -> None:
    """See `hybridkv_kernels.chunk_score.chunk_score`."""
    rows, num_q_heads, _ = query.shape
    heads = decode.num_kv_heads
    shape = (decode.num_layers, heads, num_q_heads // heads)
    layout = landmarks.layout
    scale_log2 = scale * math.log2(math.e)
    items = rows * heads
    programs = min(items * layout.pages(work.max_chunks), plan.programs(rows))
    where = (
        row_slot,
        decode.extents,
        decode.arena,
        recall.chunk_first,
        recall.prompt_len,
        plan.offsets,
        plan.work,
    )
    strides = (decode.arena.stride(0), plan.offsets.stride(0), plan.work.stride(0))
    if not layout.sketch_bits:
        bound_kernel[(programs,)](
            query,
            pool,
            *where,
            work.log_weight,
            items,
            layer,
            work.max_chunks,
            scale_log2,
            query.stride(0),
            query.stride(1),
            *strides,
            **bound_options(*shape, layout, pool.dtype).kwargs(),
            **overlap(pool.device, early),
        )
        return
    prepare_kernel[(items, 8 // layout.sketch_bits)](
        query,
        row_slot,
        row_len,
        decode.extents,
        recall.chunk_first,
        recall.prompt_len,
        landmarks.rotation,
        work.digits,
        work.terms,
        layer,
        interval,
        scale_log2,
        query.stride(0),
        query.stride(1),
        **prepare_options(*shape, layout, pool.dtype).kwargs(),
        **overlap(pool.device, early),
    )
    sketch_kernel[(programs,)](
        pool,
        *where,
        work.digits,
        work.terms,
        work.log_weight,
        items,
        layer,
        work.max_chunks,
        *strides,
        **sketch_options(*shape, layout).kwargs(),
        **overlap(pool.device, early=True),
    )
