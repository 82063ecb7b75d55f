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
# Positions of a tile of waves, and programs that share an item's tiles.
WAVE_TILE = 64
WAVE_PROGRAMS = 8
# Chunks that one program scores, a tile after the other.
PROGRAM_CHUNKS = 16
# A query's digits: two signed bytes, the higher one times 256.
LARGEST_LEVEL = 32512


@triton.jit
def wave_weights(
    heads: tl.tensor,
    centre: tl.tensor,
    pair: tl.tensor,
    in_group: tl.tensor,
    scale_log2: tl.tensor,
    NEOX: tl.constexpr,
    ROTARY: tl.constexpr,
) -> tl.tensor:
    """The cosine's and the sine's weight, [members, pairs] each, in a query's product with the turned centre.

    That product is, for each frequency, `a cos t + b sin t`.
    """
    if NEOX:
        first = pair
        second = pair + ROTARY // 2
    else:
        first = 2 * pair
        second = 2 * pair + 1
    inside = pair < ROTARY // 2
    both = in_group[:, None] & inside[None, :]
    q_first = tl.load(heads + first[None, :], mask=both, other=0.0).to(tl.float32) * scale_log2
    q_second = tl.load(heads + second[None, :], mask=both, other=0.0).to(tl.float32) * scale_log2
    c_first = tl.load(centre + first, mask=inside, other=0.0)[None, :]
    c_second = tl.load(centre + second, mask=inside, other=0.0)[None, :]
    return q_first * c_first + q_second * c_second, q_second * c_first - q_first * c_second


@triton.jit
def dot_wide(
    a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr, WIDEN: tl.constexpr, SPLIT: tl.constexpr
) -> tl.tensor:
    """a . b^T for a in the pool's type, exact in it, and b in fp32, which SPLIT passes as two parts."""
    if SPLIT:
        high = b.to(a.dtype)
        low = (b - high.to(tl.float32)).to(a.dtype)
        if WIDEN:
            a, high, low = a.to(tl.float32), high.to(tl.float32), low.to(tl.float32)
        result = tl.dot(a, tl.trans(high), input_precision=PRECISION)
        return tl.dot(a, tl.trans(low), result, input_precision=PRECISION)
    return tl.dot(a.to(tl.float32), tl.trans(b), input_precision=PRECISION)


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

    The first program of an item writes the rotated queries as digits, and what is the same for all tokens;
    the others write waves: each position's part, by axis, of the product with the centre.
    """
    item = tl.program_id(0)
    slot, _, _, landmark, first_chunk = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES, RESERVED
    )
    if first_chunk < 0:
        return
    if (tl.load(row_len + item // HEADS) - 1 - tl.load(prompt_len + slot)) % interval != 0:
        return
    member = tl.arange(0, GROUP_PAD)
    in_group = member < GROUP
    row = (item // HEADS).to(tl.int64)
    heads = query + row * stride_query_row + (item % HEADS * GROUP + member)[:, None] * stride_query_head
    arena_row = arena + slot.to(tl.int64) * stride_arena
    page = arena_page(arena_row, landmark, first_chunk >= 0, LAYERS * HEADS)
    centre = (pool + page * (PAGE * 2 * HEAD_SIZE)).to(tl.pointer_type(tl.float32))
    item = item.to(tl.int64)
    written = member < MEMBERS
    if tl.program_id(1) == 0:
        dim = tl.arange(0, HEAD_PAD)
        rotated = tl.zeros((GROUP_PAD, HEAD_PAD), tl.float32)
        # A part of the rotation at a time: whole fp32 operands would fill the registers.
        for start in range(0, HEAD_PAD, PART):
            inner = start + tl.arange(0, PART)
            known = in_group[:, None] & (inner < HEAD_SIZE)[None, :]
            part = tl.load(heads + inner[None, :], mask=known, other=0.0).to(tl.float32) * scale_log2
            turn = tl.load(
                rotation + inner[:, None] * HEAD_SIZE + dim[None, :],
                mask=(inner < HEAD_SIZE)[:, None] & (dim < HEAD_SIZE)[None, :],
                other=0.0,
            )
            rotated = tl.dot(part, turn, rotated, input_precision=FULL_PRECISION)
        step = tl.maximum(tl.max(tl.abs(rotated), axis=1), 1e-30) / LARGEST_LEVEL
        scaled = rotated / step[:, None]
        level = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int32)
        high = (level + 128) >> 8
        to = digits + item * (HEAD_SIZE // SPAN * 2 * MEMBERS * SPAN_PAD)
        to += (dim // SPAN * (2 * MEMBERS * SPAN_PAD) + dim % SPAN)[None, :] + (member * SPAN_PAD)[:, None]
        mask = written[:, None] & (dim < HEAD_SIZE)[None, :]
        tl.store(to, high.to(tl.int8), mask=mask)
        tl.store(to + MEMBERS * SPAN_PAD, (level - 256 * high).to(tl.int8), mask=mask)
        still = (dim >= ROTARY) & (dim < HEAD_SIZE)
        q = tl.load(heads + dim[None, :], mask=in_group[:, None] & still[None, :], other=0.0).to(tl.float32)
        own = tl.load(centre + dim, mask=still, other=0.0)
        to_terms = terms + item * (3 * MEMBERS) + member
        tl.store(to_terms, step, mask=written)
        tl.store(to_terms + MEMBERS, tl.sum(level, axis=1).to(tl.float32), mask=written)
        constant = tl.sum(q * scale_log2 * own[None, :], axis=1)
        tl.store(to_terms + 2 * MEMBERS, constant, mask=written)
        if ROPE:
            for start in range(0, ROTARY // 2, PAIRS):
                pair = start + tl.arange(0, PAIRS)
                cosine, sine = wave_weights(heads, centre, pair, in_group, scale_log2, NEOX, ROTARY)
                to_pair = harmonics + (item * ROTARY + pair[None, :]) * MEMBERS + member[:, None]
                in_pair = written[:, None] & (pair < ROTARY // 2)[None, :]
                tl.store(to_pair, cosine, mask=in_pair)
                tl.store(to_pair + ROTARY // 2 * MEMBERS, sine, mask=in_pair)
    else:
        end = tl.minimum(tl.load(position_end + slot), wave_positions)
        step_positions = (tl.num_programs(1) - 1) * WAVE_TILE
        for first in range((tl.program_id(1) - 1) * WAVE_TILE, end, step_positions):
            position = first + tl.arange(0, WAVE_TILE)
            inside = position < end
            for on in tl.static_range(AXES):
                wave = tl.zeros((WAVE_TILE, GROUP_PAD), tl.float32)
                for start in tl.static_range(0, ROTARY // 2, PAIRS):
                    pair = start + tl.arange(0, PAIRS)
                    in_pair = pair < ROTARY // 2
                    cosine, sine = wave_weights(heads, centre, pair, in_group, scale_log2, NEOX, ROTARY)
                    if AXES > 1:
                        turns = (tl.load(axis + pair, mask=in_pair, other=-1) == on)[None, :]
                        cosine = tl.where(turns, cosine, 0.0)
                        sine = tl.where(turns, sine, 0.0)
                    angle = cos_sin + position[:, None] * ROTARY + pair[None, :]
                    both = inside[:, None] & in_pair[None, :]
                    cos = tl.load(angle, mask=both, other=0.0)
                    sin = tl.load(angle + ROTARY // 2, mask=both, other=0.0)
                    wave += dot_wide(cos, cosine, PRECISION, WIDEN, SPLIT)
                    wave += dot_wide(sin, sine, PRECISION, WIDEN, SPLIT)
                to_wave = waves + ((item * AXES + on) * wave_positions + position)[:, None] * MEMBERS
                tl.store(to_wave + member[None, :], wave, mask=inside[:, None] & written[None, :])


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
    DATA_BYTES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Log-weights of TILES tiles of chunks of item `program_id(0)`, from its sketches.

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
    start_chunk = tl.program_id(1) * (TILES * TILE_CHUNKS)
    if start_chunk >= chunks:
        return
    if (tl.load(row_len + item // HEADS) - 1 - tl.load(prompt_len + slot)) % interval != 0:
        return
    item = item.to(tl.int64)
    arena_row = arena + slot.to(tl.int64) * stride_arena
    member = tl.arange(0, MEMBERS)
    column = tl.arange(0, SPAN_PAD)
    digit_rows = digits + item * (RUNS * 2 * MEMBERS * SPAN_PAD)
    digit_rows += tl.arange(0, 2 * MEMBERS)[:, None] * SPAN_PAD + column[None, :]
    query_digits = ()
    for run in tl.static_range(RUNS):
        query_digits += (tl.load(digit_rows + run * (2 * MEMBERS * SPAN_PAD)),)  # type: ignore[assignment]
    item_terms = terms + item * (3 * MEMBERS) + member
    # A level is 2 * code - 1, of two bits 2 * code - 3.
    slope = 2.0 * tl.load(item_terms)
    offset = (-0.5 * (2**BITS - 1)) * slope * tl.load(item_terms + MEMBERS)
    constant = tl.load(item_terms + 2 * MEMBERS)
    any_far = tl.load(position_end + slot) > wave_positions
    for tile in range(0, TILES):
        token = (start_chunk + tile * TILE_CHUNKS) * PAGE + tl.arange(0, TOKENS)
        live = token < chunks * PAGE
        place = token // PAGE + RESERVED
        page = arena_page(arena_row, landmark + place // PLACES, live, BLOCK_PAGES)
        base = (pool + page * PAGE_ELEMENTS).to(tl.pointer_type(tl.uint8))
        from_byte = base + ((place % PLACES) * DATA_BYTES + token % PAGE * SPAN)
        stored = live[:, None] & (column < SPAN)[None, :]
        packed = tl.load(from_byte[:, None] + column[None, :], mask=stored, other=0)
        packed = tl.trans(packed.to(tl.int8, bitcast=True))
        scales = (base + SCALE_OFFSET).to(tl.pointer_type(tl.float16))
        scale = tl.load(scales + (place % PLACES) * PAGE + token % PAGE, mask=live, other=0.0).to(tl.float32)
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
            positions = (token,)
            if AXES > 1:
                chunk = token // PAGE
                at_page = arena_page(arena_row, chunk // POSITION_PLACES, live, BLOCK_PAGES)
                at = (pool + at_page * PAGE_ELEMENTS).to(tl.pointer_type(tl.int32))
                at += chunk % POSITION_PLACES * (AXES * PAGE) + token % PAGE
                positions = ()  # type: ignore[assignment]
                for on in tl.static_range(AXES):
                    positions += (tl.load(at + on * PAGE, mask=centred, other=0),)  # type: ignore[assignment]
            largest = positions[0]
            for on in tl.static_range(1, AXES):
                largest = tl.maximum(largest, positions[on])
            near = centred & (largest < wave_positions)
            for on in tl.static_range(AXES):
                wave = waves + ((item * AXES + on) * wave_positions + positions[on]) * MEMBERS
                around += tl.load(wave[None, :] + member[:, None], mask=near[None, :], other=0.0)
            if any_far:
                around += far_waves(
                    harmonics + item * (ROTARY * MEMBERS),
                    cos_sin,
                    axis,
                    positions,
                    centred & (largest >= wave_positions),
                    member,
                    MEMBERS,
                    AXES,
                    ROTARY,
                )
        logits += tl.where(centred[None, :], around, 0.0)
        by_chunk = tl.reshape(logits, (MEMBERS, TILE_CHUNKS, PAGE))
        best = tl.max(by_chunk, axis=2)
        total = tl.sum(tl.exp2(by_chunk - best[:, :, None]), axis=2)
        chunk = start_chunk + tile * TILE_CHUNKS + tl.arange(0, TILE_CHUNKS)
        to = log_weight + (item * GROUP + member)[:, None] * max_chunks + chunk[None, :]
        tl.store(to, best + tl.log2(total), mask=(member < GROUP)[:, None] & (chunk < chunks)[None, :])


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
        "GROUP_PAD": GROUP_PAD,
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
    constexprs = {
        **_shape(num_layers, num_kv_heads, group, layout),
        **_sketch_shape(layout, group),
        "HEAD_PAD": head_pad,
        "PART": min(head_pad, 32),
        "LARGEST_LEVEL": LARGEST_LEVEL,
        "WAVE_TILE": WAVE_TILE,
        # The pairs of larger heads in parts: operands of a dot fill the registers.
        "PAIRS": min(max(next_power_of_2(layout.head_size // 2), 16), 64),
        "FULL_PRECISION": FULL_PRECISION,
        "PRECISION": FULL_PRECISION if full else "tf32",
        "WIDEN": widen_dots(dtype),
        "SPLIT": not full,
        **dict(rope),
    }
    # Without stages in shared memory more programs fit.
    return LaunchOptions(constexprs, num_warps=4, num_stages=1)


@functools.cache
def sketch_options(
    num_layers: int,
    num_kv_heads: int,
    group: int,
    layout: LandmarkLayout,
    rope: RopeConstants,
) -> LaunchOptions:
    """How `sketch_kernel` is compiled for a model's shape."""
    tile_chunks = 4
    constexprs = {
        **_shape(num_layers, num_kv_heads, group, layout),
        **_sketch_shape(layout, group),
        "POSITION_PLACES": layout.position_places,
        "BITS": layout.sketch_bits,
        "DATA_BYTES": layout.data_bytes,
        "SCALE_OFFSET": layout.scale_offset,
        "TILE_CHUNKS": tile_chunks,
        "TILES": PROGRAM_CHUNKS // tile_chunks,
        "INTERPRETED": bool(knobs.runtime.interpret),
        **dict(rope),
    }
    del constexprs["GROUP_PAD"]
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
        "HEAD_PAD": next_power_of_2(layout.head_size),
        "DATA_ELEMENTS": layout.data_bytes // layout.itemsize,
        "TILE_CHUNKS": 16 if full else 64,
        "PRECISION": "tf32",
        "WIDEN": widen_dots(dtype),
    }
    return LaunchOptions(constexprs, num_warps=4, num_stages=1)


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
    prepare_kernel[(rows * heads, 1 + (WAVE_PROGRAMS if landmarks.rope else 0))](
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
        work.wave_positions,
        scale_log2,
        *strides,
        **prepare_options(*shape, layout, rope, pool.dtype).kwargs(),
    )
    options = sketch_options(*shape, layout, rope)
    per_program = options.constexprs["TILES"] * options.constexprs["TILE_CHUNKS"]
    sketch_kernel[(rows * heads, triton.cdiv(work.max_chunks, per_program))](
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
        work.wave_positions,
        decode.arena.stride(0),
        **options.kwargs(),
    )
