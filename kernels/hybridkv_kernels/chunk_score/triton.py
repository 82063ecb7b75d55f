"""The chunk scores in Triton: queries are rotated once, then codes go through the tensor cores as bytes."""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..extent_decode.tables import DecodeTables
from ..landmark_build.triton import RopeConstants, rope_constants
from ..launch import FULL_PRECISION, LaunchOptions, next_power_of_2, widen_dots
from ..pages import PAGE
from ..recall.landmarks import Landmarks
from ..recall.layout import LandmarkLayout
from ..recall.paging import arena_page, recalling_head
from ..recall.tables import RecallTables
from ..recall.work import RecallWork, members, span_pad

# The least M of a tensor-core dot.
GROUP_PAD = 16
# Positions of a tile of waves; programs that share an item's tiles, at least, and of all items, about.
WAVE_TILE = 64
WAVE_PROGRAMS = 6
ALL_WAVE_PROGRAMS = 512
# Chunks of a tile of scores. Smaller or larger ones, and whole pages at once, were slower on an H200.
TILE_CHUNKS = 2
# Most steps of a query's digits: two signed bytes, the higher one times 256.
LARGEST_LEVEL = 32512


@triton.jit
def rotate_run(
    heads: tl.tensor,
    centre: tl.tensor,
    rotation: tl.tensor,
    digits: tl.tensor,
    terms: tl.tensor,
    member: tl.tensor,
    run: tl.tensor,
    scale_log2: tl.tensor,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PART: tl.constexpr,
    SPAN: tl.constexpr,
    SPAN_PAD: tl.constexpr,
    LARGEST_LEVEL: tl.constexpr,
    ROTARY: tl.constexpr,
    FULL_PRECISION: tl.constexpr,
) -> None:
    """Write one run of the rotated queries as digits, their sum, and with the first run the other terms.

    No rotated dimension is larger than the query is long: so each run knows the step that all use.
    """
    in_group = member < GROUP
    column = tl.arange(0, SPAN_PAD)
    in_span = column < SPAN
    rotated = tl.zeros((member.shape[0], SPAN_PAD), tl.float32)
    squares = tl.zeros((member.shape[0],), tl.float32)
    still = tl.zeros((member.shape[0],), tl.float32)
    for start in tl.static_range(0, HEAD_PAD, PART):
        dim = start + tl.arange(0, PART)
        known = in_group[:, None] & (dim < HEAD_SIZE)[None, :]
        q = tl.load(heads + dim[None, :], mask=known, other=0.0).to(tl.float32) * scale_log2
        turn = tl.load(
            rotation + dim[:, None] * HEAD_SIZE + run * SPAN + column[None, :],
            mask=(dim < HEAD_SIZE)[:, None] & in_span[None, :],
            other=0.0,
        )
        rotated = tl.dot(q, turn, rotated, input_precision=FULL_PRECISION)
        squares += tl.sum(q * q, axis=1)
        own = tl.load(centre + dim, mask=(dim >= ROTARY) & (dim < HEAD_SIZE), other=0.0)
        still += tl.sum(q * own[None, :], axis=1)
    step = tl.maximum(tl.sqrt(squares), 1e-30) / LARGEST_LEVEL
    scaled = rotated / step[:, None]
    level = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int32)
    high = (level + 128) >> 8
    written = member < MEMBERS
    to = digits + (run * (2 * MEMBERS) + member)[:, None] * SPAN_PAD + column[None, :]
    mask = written[:, None] & in_span[None, :]
    tl.store(to, high.to(tl.int8), mask=mask)
    tl.store(to + MEMBERS * SPAN_PAD, (level - 256 * high).to(tl.int8), mask=mask)
    to_terms = terms + member
    tl.store(to_terms + (2 + run) * MEMBERS, tl.sum(level, axis=1).to(tl.float32), mask=written)
    first = written & (run == 0)
    tl.store(to_terms, step, mask=first)
    tl.store(to_terms + MEMBERS, still, mask=first)


@triton.jit
def wave_dot(
    angle: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    sums: tl.tensor,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLIT: tl.constexpr,
) -> tl.tensor:
    """`sums` and the product of angles, exact in their type, with fp32 weights: two parts with SPLIT."""
    if SPLIT:
        if WIDEN:
            angle, high, low = angle.to(tl.float32), high.to(tl.float32), low.to(tl.float32)
        sums = tl.dot(angle, tl.trans(low), sums, input_precision=PRECISION)
    else:
        angle = angle.to(tl.float32)
    return tl.dot(angle, tl.trans(high), sums, input_precision=PRECISION)


@triton.jit
def tabulate_waves(
    heads: tl.tensor,
    centre: tl.tensor,
    cos_sin: tl.tensor,
    axis: tl.tensor,
    harmonics: tl.tensor,
    waves: tl.tensor,
    member: tl.tensor,
    on: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    stride: tl.tensor,
    wave_positions: tl.tensor,
    scale_log2: tl.tensor,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    WAVE_TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    NEOX: tl.constexpr,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Write the waves of every `stride`-th position tile from `begin` to `end`: a column a member and axis.

    A query's product with the turned centre is, for each frequency, `a cos t + b sin t`, where t is the
    position on one axis. The first program leaves the weights a and b as harmonics.
    """
    pair = tl.arange(0, PAIRS)
    in_pair = pair < ROTARY // 2
    if NEOX:
        first = pair
        second = pair + ROTARY // 2
    else:
        first = 2 * pair
        second = 2 * pair + 1
    turns = (member < GROUP)[:, None] & in_pair[None, :]
    if AXES > 1:
        turns = turns & (tl.load(axis + pair, mask=in_pair, other=-1)[None, :] == on[:, None])
    else:
        turns = turns & (on == 0)[:, None]
    q_first = tl.load(heads + first[None, :], mask=turns, other=0.0).to(tl.float32) * scale_log2
    q_second = tl.load(heads + second[None, :], mask=turns, other=0.0).to(tl.float32) * scale_log2
    c_first = tl.load(centre + first, mask=in_pair, other=0.0)[None, :]
    c_second = tl.load(centre + second, mask=in_pair, other=0.0)[None, :]
    cosine = q_first * c_first + q_second * c_second
    sine = q_second * c_first - q_first * c_second
    to_pair = harmonics + pair[None, :] * MEMBERS + member[:, None]
    tl.store(to_pair, cosine, mask=turns & (begin == 0))
    tl.store(to_pair + ROTARY // 2 * MEMBERS, sine, mask=turns & (begin == 0))
    cosine_low = cosine
    sine_low = sine
    if SPLIT:
        cosine_whole = cosine
        sine_whole = sine
        cosine = cosine_whole.to(cos_sin.dtype.element_ty)
        sine = sine_whole.to(cos_sin.dtype.element_ty)
        cosine_low = (cosine_whole - cosine.to(tl.float32)).to(cosine.dtype)
        sine_low = (sine_whole - sine.to(tl.float32)).to(sine.dtype)
    stored = (member < MEMBERS) & (on < AXES)
    for position_first in range(begin, end, stride):
        position = position_first + tl.arange(0, WAVE_TILE)
        inside = position < end
        angle = cos_sin + position[:, None] * ROTARY + pair[None, :]
        both = inside[:, None] & in_pair[None, :]
        wave = tl.zeros((WAVE_TILE, member.shape[0]), tl.float32)
        cos = tl.load(angle, mask=both, other=0.0)
        sin = tl.load(angle + ROTARY // 2, mask=both, other=0.0)
        wave = wave_dot(cos, cosine, cosine_low, wave, PRECISION, WIDEN, SPLIT)
        wave = wave_dot(sin, sine, sine_low, wave, PRECISION, WIDEN, SPLIT)
        to = waves + (on.to(tl.int64)[None, :] * wave_positions + position[:, None]) * MEMBERS
        tl.store(to + member[None, :], wave, mask=inside[:, None] & stored[None, :])


@triton.jit(do_not_specialize=["layer", "interval", "wave_positions"])
def prepare_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    position_end: tl.tensor,
    rotation: tl.tensor,
    cos_sin: tl.tensor,
    axis: tl.tensor,
    digits: tl.tensor,
    terms: tl.tensor,
    harmonics: tl.tensor,
    waves: tl.tensor,
    layer: tl.tensor,
    interval: tl.tensor,
    wave_positions: tl.tensor,
    scale_log2: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_arena: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PART: tl.constexpr,
    PLACES: tl.constexpr,
    RESERVED: tl.constexpr,
    SPAN: tl.constexpr,
    SPAN_PAD: tl.constexpr,
    LARGEST_LEVEL: tl.constexpr,
    WAVE_TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
    FULL_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Rotate the query group of item `program_id(0)`, and take its product with the head's centre apart.

    The first programs of an item take a run of rotated dimensions each, the others tiles of positions.
    """
    RUNS: tl.constexpr = HEAD_SIZE // SPAN
    item = tl.program_id(0)
    slot, _, _, landmark, first_chunk = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES, RESERVED
    )
    if first_chunk < 0:
        return
    if (tl.load(row_len + item // HEADS) - 1 - tl.load(prompt_len + slot)) % interval != 0:
        return
    arena_row = arena + slot.to(tl.int64) * stride_arena
    page = arena_page(arena_row, landmark, first_chunk >= 0, LAYERS * HEADS)
    centre = (pool + page * (PAGE * 2 * HEAD_SIZE)).to(tl.pointer_type(tl.float32))
    row = (item // HEADS).to(tl.int64)
    group = query + row * stride_query_row + item % HEADS * GROUP * stride_query_head
    item = item.to(tl.int64)
    run = tl.program_id(1)
    if run < RUNS:
        member = tl.arange(0, GROUP_PAD)
        rotate_run(
            group + member[:, None] * stride_query_head,
            centre,
            rotation,
            digits + item * (RUNS * 2 * MEMBERS * SPAN_PAD),
            terms + item * ((2 + RUNS) * MEMBERS),
            member,
            run,
            scale_log2,
            GROUP,
            MEMBERS,
            HEAD_SIZE,
            HEAD_PAD,
            PART,
            SPAN,
            SPAN_PAD,
            LARGEST_LEVEL,
            ROTARY,
            FULL_PRECISION,
        )
    elif ROPE:
        column = tl.arange(0, COLUMNS)
        tabulate_waves(
            group + (column % MEMBERS)[:, None] * stride_query_head,
            centre,
            cos_sin,
            axis,
            harmonics + item * (ROTARY * MEMBERS),
            waves + item * (AXES * MEMBERS) * wave_positions,
            column % MEMBERS,
            column // MEMBERS,
            (run - RUNS) * WAVE_TILE,
            tl.minimum(tl.load(position_end + slot), wave_positions),
            (tl.num_programs(1) - RUNS) * WAVE_TILE,
            wave_positions,
            scale_log2,
            GROUP,
            MEMBERS,
            WAVE_TILE,
            PAIRS,
            NEOX,
            AXES,
            ROTARY,
            PRECISION,
            WIDEN,
            SPLIT,
        )


@triton.jit
def codes_of(
    packed: tl.tensor, run: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """The codes at `run` of all bytes, as int8."""
    if INTERPRETED:
        return ((packed.to(tl.uint8, bitcast=True) >> (run * BITS)) & (2**BITS - 1)).to(tl.int8)
    # Four bytes a time; what is shifted in from a neighbour is masked out.
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t; shr.b32 t, $1, {run * BITS}; and.b32 $0, t, {0x01010101 * (2**BITS - 1)}; }}",
        "=r,r",
        [packed],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def far_waves(
    harmonics: tl.tensor,
    cos_sin: tl.tensor,
    axis: tl.tensor,
    positions: tl.tensor,
    far: tl.tensor,
    member: tl.tensor,
    MEMBERS: tl.constexpr,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
) -> tl.tensor:
    """The product with the turned centre, [members, tokens], of tokens beyond the waves: one by one."""
    result = tl.zeros((MEMBERS, far.shape[0]), tl.float32)
    for pair in range(ROTARY // 2):
        position = positions[0]
        if AXES > 1:
            on_axis = tl.load(axis + pair)
            for on in tl.static_range(1, AXES):
                position = tl.where(on_axis == on, positions[on], position)
        angle = cos_sin + position * ROTARY + pair
        cos = tl.load(angle, mask=far, other=0.0).to(tl.float32)
        sin = tl.load(angle + ROTARY // 2, mask=far, other=0.0).to(tl.float32)
        cosine = tl.load(harmonics + pair * MEMBERS + member)
        sine = tl.load(harmonics + (ROTARY // 2 + pair) * MEMBERS + member)
        result += cosine[:, None] * cos[None, :] + sine[:, None] * sin[None, :]
    return result


@triton.jit
def by_hardware(x: tl.tensor, OP: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """2^x for `ex2`, log2 of x for `lg2`: one instruction, which takes denormal numbers for 0."""
    if INTERPRETED:
        return tl.exp2(x) if OP == "ex2" else tl.log2(x)
    return tl.inline_asm_elementwise(
        f"{OP}.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit(do_not_specialize=["layer", "interval", "max_chunks", "wave_positions"])
def sketch_kernel(
    pool: tl.tensor,
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    position_end: tl.tensor,
    digits: tl.tensor,
    terms: tl.tensor,
    harmonics: tl.tensor,
    waves: tl.tensor,
    cos_sin: tl.tensor,
    axis: tl.tensor,
    log_weight: tl.tensor,
    layer: tl.tensor,
    interval: tl.tensor,
    max_chunks: tl.tensor,
    wave_positions: tl.tensor,
    stride_arena: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    RESERVED: tl.constexpr,
    POSITION_PLACES: tl.constexpr,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    SPAN_PAD: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Log-weights of the chunks of landmark page `program_id(1)` of item `program_id(0)`, from its sketches.

    Tokens are the columns of the products and the members' digits the rows, so that what a chunk's tokens are
    reduced by lies mostly in one thread.
    """
    BLOCK_PAGES: tl.constexpr = LAYERS * HEADS
    PAGE_ELEMENTS: tl.constexpr = PAGE * 2 * HEAD_SIZE
    RUNS: tl.constexpr = 8 // BITS
    TOKENS: tl.constexpr = TILE_CHUNKS * PAGE
    item = tl.program_id(0)
    slot, chunks, _, landmark, _ = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES, RESERVED
    )
    page_index = tl.program_id(1)
    if (chunks == 0) | (page_index * PLACES >= chunks + RESERVED):
        return
    if (tl.load(row_len + item // HEADS) - 1 - tl.load(prompt_len + slot)) % interval != 0:
        return
    item = item.to(tl.int64)
    arena_row = arena + slot.to(tl.int64) * stride_arena
    member = tl.arange(0, MEMBERS)
    column = tl.arange(0, SPAN_PAD)
    digit_rows = digits + item * (RUNS * 2 * MEMBERS * SPAN_PAD)
    digit_rows += tl.arange(0, 2 * MEMBERS)[:, None] * SPAN_PAD + column[None, :]
    item_terms = terms + item * ((2 + RUNS) * MEMBERS) + member
    query_digits = ()
    level_sum = tl.zeros((MEMBERS,), tl.float32)
    for run in tl.static_range(RUNS):
        query_digits += (tl.load(digit_rows + run * (2 * MEMBERS * SPAN_PAD)),)  # type: ignore[assignment]
        level_sum += tl.load(item_terms + (2 + run) * MEMBERS)
    # A level is 2 * code - 1, of two bits 2 * code - 3.
    slope = 2.0 * tl.load(item_terms)
    offset = (-0.5 * (2**BITS - 1)) * slope * level_sum
    constant = tl.load(item_terms + MEMBERS)
    any_far = tl.load(position_end + slot) > wave_positions
    item_waves = waves + item * (AXES * MEMBERS) * wave_positions
    page = arena_page(arena_row, landmark + page_index, chunks > 0, BLOCK_PAGES)
    base = (pool + page * PAGE_ELEMENTS).to(tl.pointer_type(tl.uint8))
    scales = (base + SCALE_OFFSET).to(tl.pointer_type(tl.float16))
    for first_place in range(0, PLACES, TILE_CHUNKS):
        token_place = first_place * PAGE + tl.arange(0, TOKENS)
        # Of the head's first chunk's first token; negative where the centre is.
        token = (page_index * PLACES - RESERVED) * PAGE + token_place
        live = (token_place < PLACES * PAGE) & (token >= 0) & (token < chunks * PAGE)
        stored = live[:, None] & (column < SPAN)[None, :]
        packed = tl.load(base + token_place[:, None] * SPAN + column[None, :], mask=stored, other=0)
        packed = tl.trans(packed.to(tl.int8, bitcast=True))
        scale = tl.load(scales + token_place, mask=live, other=0.0).to(tl.float32)
        product = tl.zeros((2 * MEMBERS, TOKENS), tl.int32)
        for run in tl.static_range(RUNS):
            codes = codes_of(packed, run, BITS, INTERPRETED)
            product = tl.dot(query_digits[run], codes, product, out_dtype=tl.int32)
        high, low = tl.split(tl.permute(tl.reshape(product, (2, MEMBERS, TOKENS)), (1, 2, 0)))
        logits = (256 * high + low).to(tl.float32) * slope[:, None] + offset[:, None]
        logits *= tl.abs(scale)[None, :]
        centred = live & (scale < 0)
        around = tl.broadcast_to(constant[:, None], (MEMBERS, TOKENS))
        if ROPE:
            # Where there is no token to speak of, any position will do.
            positions = (tl.where(centred, token, 0),)
            if AXES > 1:
                chunk = token // PAGE
                at_page = arena_page(arena_row, chunk // POSITION_PLACES, live, BLOCK_PAGES)
                at = (pool + at_page * PAGE_ELEMENTS).to(tl.pointer_type(tl.int32))
                at += chunk % POSITION_PLACES * (AXES * PAGE) + token % PAGE
                positions = ()  # type: ignore[assignment]
                for on in tl.static_range(AXES):
                    positions += (tl.load(at + on * PAGE, mask=centred, other=0),)  # type: ignore[assignment]
            for on in tl.static_range(AXES):
                # Without a mask, which costs more than what is loaded for nothing.
                known = tl.minimum(positions[on], wave_positions - 1)
                at_wave = item_waves + (on * wave_positions + known) * MEMBERS
                around += tl.load(at_wave[None, :] + member[:, None])
            if any_far:
                largest = positions[0]
                for on in tl.static_range(1, AXES):
                    largest = tl.maximum(largest, positions[on])
                far = centred & (largest >= wave_positions)
                one_by_one = far_waves(
                    harmonics + item * (ROTARY * MEMBERS),
                    cos_sin,
                    axis,
                    positions,
                    far,
                    member,
                    MEMBERS,
                    AXES,
                    ROTARY,
                )
                around = tl.where(far[None, :], constant[:, None] + one_by_one, around)
        logits += tl.where(centred[None, :], around, 0.0)
        by_chunk = tl.reshape(logits, (MEMBERS, TILE_CHUNKS, PAGE))
        best = tl.max(by_chunk, axis=2)
        total = tl.sum(by_hardware(by_chunk - best[:, :, None], "ex2", INTERPRETED), axis=2)
        place = first_place + tl.arange(0, TILE_CHUNKS)
        chunk = page_index * PLACES - RESERVED + place
        inside = (place < PLACES) & (chunk >= 0) & (chunk < chunks)
        to = log_weight + (item * GROUP + member)[:, None] * max_chunks + chunk[None, :]
        tl.store(
            to,
            best + by_hardware(total, "lg2", INTERPRETED),
            mask=(member < GROUP)[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=["layer", "interval", "max_chunks"])
def bound_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    log_weight: tl.tensor,
    layer: tl.tensor,
    interval: tl.tensor,
    max_chunks: tl.tensor,
    scale_log2: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_arena: tl.tensor,
    KIND: tl.constexpr,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PLACES: tl.constexpr,
    RESERVED: tl.constexpr,
    DATA_ELEMENTS: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Log-weights of TILE_CHUNKS chunks of item `program_id(0)`, from mean keys or from bounds."""
    item = tl.program_id(0)
    slot, chunks, _, landmark, _ = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES, RESERVED
    )
    chunk = tl.program_id(1) * TILE_CHUNKS + tl.arange(0, TILE_CHUNKS)
    if tl.program_id(1) * TILE_CHUNKS >= chunks:
        return
    if (tl.load(row_len + item // HEADS) - 1 - tl.load(prompt_len + slot)) % interval != 0:
        return
    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, HEAD_PAD)
    row = (item // HEADS).to(tl.int64)
    heads = query + row * stride_query_row + (item % HEADS * GROUP + member)[:, None] * stride_query_head
    q = tl.load(heads + dim[None, :], mask=(member < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :], other=0.0)
    live = chunk < chunks
    place = chunk + RESERVED
    page = arena_page(
        arena + slot.to(tl.int64) * stride_arena, landmark + place // PLACES, live, LAYERS * HEADS
    )
    data = pool + page * (PAGE * 2 * HEAD_SIZE) + (place % PLACES) * DATA_ELEMENTS
    mask = live[:, None] & (dim < HEAD_SIZE)[None, :]
    values = tl.load(data[:, None] + dim[None, :], mask=mask, other=0.0)
    if WIDEN:
        q, values = q.to(tl.float32), values.to(tl.float32)
    if KIND == "mean":
        logits = tl.dot(values, tl.trans(q), input_precision=PRECISION)
    else:
        largest = tl.load(data[:, None] + (HEAD_SIZE + dim)[None, :], mask=mask, other=0.0)
        if WIDEN:
            largest = largest.to(tl.float32)
        # Triton 3.6 takes minimum and maximum of bf16 in fp32.
        zero = tl.zeros_like(q)
        logits = tl.dot(values, tl.trans(tl.minimum(q, zero).to(q.dtype)), input_precision=PRECISION)
        above = tl.maximum(q, zero).to(q.dtype)
        logits = tl.dot(largest, tl.trans(above), logits, input_precision=PRECISION)
    to = log_weight + (item.to(tl.int64) * GROUP + member)[None, :] * max_chunks + chunk[:, None]
    tl.store(to, logits * scale_log2, mask=live[:, None] & (member < GROUP)[None, :])


def _shape(num_layers: int, num_kv_heads: int, group: int, layout: LandmarkLayout) -> dict[str, Any]:
    return {
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_SIZE": layout.head_size,
        "PLACES": layout.places,
        "RESERVED": layout.reserved,
    }


def _sketch_shape(layout: LandmarkLayout, group: int) -> dict[str, Any]:
    return {
        "MEMBERS": members(group),
        "SPAN": layout.span,
        "SPAN_PAD": span_pad(layout),
    }


@functools.cache
def prepare_options(
    num_layers: int,
    num_kv_heads: int,
    group: int,
    layout: LandmarkLayout,
    rope: RopeConstants,
    dtype: torch.dtype,
) -> LaunchOptions:
    """How `prepare_kernel` is compiled for a model's shape."""
    full = dtype == torch.float32
    head_pad = next_power_of_2(layout.head_size)
    axes = dict(rope)["AXES"]
    constexprs = {
        **_shape(num_layers, num_kv_heads, group, layout),
        **_sketch_shape(layout, group),
        "GROUP_PAD": GROUP_PAD,
        "COLUMNS": max(next_power_of_2(axes * members(group)), GROUP_PAD),
        "HEAD_PAD": head_pad,
        "PART": min(head_pad, 128),
        "LARGEST_LEVEL": LARGEST_LEVEL,
        "WAVE_TILE": WAVE_TILE,
        "PAIRS": max(next_power_of_2(layout.head_size // 2), 16),
        "FULL_PRECISION": FULL_PRECISION,
        "PRECISION": FULL_PRECISION if full else "tf32",
        "WIDEN": widen_dots(dtype),
        "SPLIT": not full,
        **dict(rope),
    }
    # Without stages in shared memory more programs fit.
    return LaunchOptions(constexprs, num_warps=8 if head_pad > 128 or full else 4, num_stages=1)


@functools.cache
def sketch_options(
    num_layers: int,
    num_kv_heads: int,
    group: int,
    layout: LandmarkLayout,
    rope: RopeConstants,
) -> LaunchOptions:
    """How `sketch_kernel` is compiled for a model's shape."""
    constexprs = {
        **_shape(num_layers, num_kv_heads, group, layout),
        **_sketch_shape(layout, group),
        "POSITION_PLACES": layout.position_places,
        "BITS": layout.sketch_bits,
        "SCALE_OFFSET": layout.scale_offset,
        "TILE_CHUNKS": TILE_CHUNKS,
        "INTERPRETED": bool(knobs.runtime.interpret),
        **dict(rope),
    }
    return LaunchOptions(constexprs, num_warps=1, num_stages=2)


@functools.cache
def bound_options(
    num_layers: int, num_kv_heads: int, group: int, layout: LandmarkLayout, dtype: torch.dtype
) -> LaunchOptions:
    """How `bound_kernel` is compiled for a model's shape."""
    full = dtype == torch.float32
    constexprs = {
        "KIND": layout.kind,
        **_shape(num_layers, num_kv_heads, group, layout),
        "GROUP_PAD": GROUP_PAD,
        "HEAD_PAD": next_power_of_2(layout.head_size),
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
    interval: int,
) -> None:
    """See `hybridkv_kernels.chunk_score.chunk_score`."""
    rows, num_q_heads, _ = query.shape
    heads = decode.num_kv_heads
    shape = (decode.num_layers, heads, num_q_heads // heads)
    layout = landmarks.layout
    scale_log2 = scale * math.log2(math.e)
    strides = (query.stride(0), query.stride(1), decode.arena.stride(0))
    where = (decode.extents, decode.arena, recall.chunk_first, recall.prompt_len)
    if not layout.sketch_bits:
        options = bound_options(*shape, layout, pool.dtype)
        tiles = triton.cdiv(work.max_chunks, options.constexprs["TILE_CHUNKS"])
        bound_kernel[(rows * heads, tiles)](
            query,
            pool,
            row_slot,
            row_len,
            *where,
            work.log_weight,
            layer,
            interval,
            work.max_chunks,
            scale_log2,
            *strides,
            **options.kwargs(),
        )
        return
    rope = rope_constants(landmarks.rope)
    # What is not used is not read either: any pointer will do.
    cos_sin = landmarks.rope.cos_sin if landmarks.rope else pool
    axis = landmarks.rope.axis if landmarks.rope else row_slot
    prepared = (work.digits, work.terms, work.harmonics, work.waves)
    items = rows * heads
    wave_positions = work.wave_positions(items)
    programs = 8 // layout.sketch_bits
    if landmarks.rope:
        tiles = triton.cdiv(wave_positions, WAVE_TILE)
        programs += min(max(ALL_WAVE_PROGRAMS // items, WAVE_PROGRAMS), tiles)
    prepare_kernel[(items, programs)](
        query,
        pool,
        row_slot,
        row_len,
        *where,
        recall.position_end,
        landmarks.rotation,
        cos_sin,
        axis,
        *prepared,
        layer,
        interval,
        wave_positions,
        scale_log2,
        *strides,
        **prepare_options(*shape, layout, rope, pool.dtype).kwargs(),
    )
    options = sketch_options(*shape, layout, rope)
    sketch_kernel[(items, layout.pages(work.max_chunks))](
        pool,
        row_slot,
        row_len,
        *where,
        recall.position_end,
        *prepared,
        cos_sin,
        axis,
        work.log_weight,
        layer,
        interval,
        work.max_chunks,
        wave_positions,
        decode.arena.stride(0),
        **options.kwargs(),
    )
