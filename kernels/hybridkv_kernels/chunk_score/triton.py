"""The chunk scores in Triton: queries are rotated once, then bit planes go through the tensor cores."""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..extent_decode.tables import DecodeTables
from ..landmark_build.triton import RopeConstants, rope_constants
from ..launch import FULL_PRECISION, LaunchOptions, next_power_of_2, widen_dots
from ..pages import PAGE
from ..recall.landmarks import Landmarks
from ..recall.layout import LandmarkLayout
from ..recall.paging import arena_page, recalling_head
from ..recall.tables import RecallTables
from ..recall.work import RecallWork

# The least M of a tensor-core dot.
GROUP_PAD = 16
# Cosines of a tile, 16-bit or not, that a program of four warps holds without spilling.
TILE_ANGLES = 4096
# Chunks that one program scores, a tile after the other.
PROGRAM_CHUNKS = 32


@triton.jit(do_not_specialize=["layer"])
def prepare_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    row_slot: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    rotation: tl.tensor,
    rotated: tl.tensor,
    harmonics: tl.tensor,
    layer: tl.tensor,
    scale_log2: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_arena: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PART: tl.constexpr,
    PLACES: tl.constexpr,
    RESERVED: tl.constexpr,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Rotate the query group of item `program_id(0)`, and take its product with the head's centre apart.

    The product of a query with the centre turned by angle t is, for each frequency, `a cos t + b sin t`; what
    is not turned adds a constant. Harmonics hold every a, then every b, then the constant.
    """
    item = tl.program_id(0)
    slot, _, _, landmark, first_chunk = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES, RESERVED
    )
    if first_chunk < 0:
        return
    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, HEAD_PAD)
    inside = (member < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
    row = (item // HEADS).to(tl.int64)
    heads = query + row * stride_query_row + (item % HEADS * GROUP + member)[:, None] * stride_query_head
    entry = (item.to(tl.int64) * GROUP + member)[:, None]
    # A part of the rotation at a time: whole fp32 operands would fill the registers.
    for start in range(0, HEAD_PAD, PART):
        column = start + tl.arange(0, PART)
        result = tl.zeros((GROUP_PAD, PART), tl.float32)
        for start_inner in range(0, HEAD_PAD, PART):
            inner = start_inner + tl.arange(0, PART)
            mask = (member < GROUP)[:, None] & (inner < HEAD_SIZE)[None, :]
            part = tl.load(heads + inner[None, :], mask=mask, other=0.0).to(tl.float32) * scale_log2
            turn = tl.load(
                rotation + inner[:, None] * HEAD_SIZE + column[None, :],
                mask=(inner < HEAD_SIZE)[:, None] & (column < HEAD_SIZE)[None, :],
                other=0.0,
            )
            result = tl.dot(part, turn, result, input_precision=PRECISION)
        mask = (member < GROUP)[:, None] & (column < HEAD_SIZE)[None, :]
        tl.store(rotated + entry * HEAD_SIZE + column[None, :], result, mask=mask)
    q = tl.load(heads + dim[None, :], mask=inside, other=0.0).to(tl.float32) * scale_log2

    arena_row = arena + slot.to(tl.int64) * stride_arena
    page = arena_page(arena_row, landmark, first_chunk >= 0, LAYERS * HEADS)
    centre = (pool + page * (PAGE * 2 * HEAD_SIZE)).to(tl.pointer_type(tl.float32))
    own = tl.load(centre + dim, mask=dim < HEAD_SIZE, other=0.0)
    to = harmonics + entry * (2 * HEAD_SIZE)
    turned = dim < ROTARY
    constant = tl.sum(tl.where(turned[None, :], 0.0, q * own[None, :]), axis=1)
    tl.store(to + ROTARY, constant[:, None], mask=(member < GROUP)[:, None])
    if ROPE:
        # Of the two dimensions of a pair, the first one's lane stores both weights.
        if NEOX:
            frequency = dim
            is_first = dim < ROTARY // 2
            partner = dim + ROTARY // 2
        else:
            frequency = dim // 2
            is_first = (dim % 2 == 0) & turned
            partner = dim + 1
        both = (member < GROUP)[:, None] & is_first[None, :]
        q_partner = tl.load(heads + partner[None, :], mask=both, other=0.0).to(tl.float32) * scale_log2
        other = tl.load(centre + partner, mask=is_first, other=0.0)
        cosine = q * own[None, :] + q_partner * other[None, :]
        sine = q_partner * own[None, :] - q * other[None, :]
        tl.store(to + frequency[None, :], cosine, mask=both)
        tl.store(to + ROTARY // 2 + frequency[None, :], sine, mask=both)


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


@triton.jit(do_not_specialize=["layer", "interval", "max_chunks"])
def sketch_kernel(
    pool: tl.tensor,
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    rotated: tl.tensor,
    harmonics: tl.tensor,
    cos_sin: tl.tensor,
    axis: tl.tensor,
    log_weight: tl.tensor,
    layer: tl.tensor,
    interval: tl.tensor,
    max_chunks: tl.tensor,
    stride_arena: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PLANE_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
    PLACES: tl.constexpr,
    RESERVED: tl.constexpr,
    POSITION_PLACES: tl.constexpr,
    BITS: tl.constexpr,
    DATA_BYTES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Log-weights of TILES tiles of chunks of item `program_id(0)`, from its sketches."""
    BLOCK_PAGES: tl.constexpr = LAYERS * HEADS
    PAGE_ELEMENTS: tl.constexpr = PAGE * 2 * HEAD_SIZE
    PLANE: tl.constexpr = HEAD_SIZE // 8
    item = tl.program_id(0)
    slot, chunks, _, landmark, _ = recalling_head(
        row_slot, extents, chunk_first, prompt_len, item, layer, PAGE, LAYERS, HEADS, PLACES, RESERVED
    )
    start_chunk = tl.program_id(1) * (TILES * TILE_CHUNKS)
    if start_chunk >= chunks:
        return
    if (tl.load(row_len + item // HEADS) - 1 - tl.load(prompt_len + slot)) % interval != 0:
        return
    arena_row = arena + slot.to(tl.int64) * stride_arena
    member = tl.arange(0, GROUP_PAD)
    in_group = member < GROUP
    entry = (item.to(tl.int64) * GROUP + member)[:, None]
    column = tl.arange(0, PLANE_PAD)
    in_plane = in_group[:, None] & (column < PLANE)[None, :]
    weights = harmonics + entry * (2 * HEAD_SIZE)
    constant = tl.load(
        harmonics + (item.to(tl.int64) * GROUP + member) * (2 * HEAD_SIZE) + ROTARY, in_group, 0.0
    )
    for tile in range(0, TILES):
        token = (start_chunk + tile * TILE_CHUNKS) * PAGE + tl.arange(0, TILE_CHUNKS * PAGE)
        live = token < chunks * PAGE
        place = token // PAGE + RESERVED
        page = arena_page(arena_row, landmark + place // PLACES, live, BLOCK_PAGES)
        base = (pool + page * PAGE_ELEMENTS).to(tl.pointer_type(tl.uint8))
        byte = (place % PLACES) * DATA_BYTES + token % PAGE * (PLANE * BITS)
        from_byte = (base + byte)[:, None] + column[None, :]
        stored = live[:, None] & (column < PLANE)[None, :]
        packed = tl.load(from_byte, mask=stored, other=0).to(tl.int32)
        if BITS == 2:
            packed_low = tl.load(from_byte + PLANE, mask=stored, other=0).to(tl.int32)
        scales = (base + SCALE_OFFSET).to(tl.pointer_type(tl.float16))
        scale = tl.load(scales + (place % PLACES) * PAGE + token % PAGE, mask=live, other=0.0).to(tl.float32)
        # A level is 2 * code - 1, of two bits 2 * code - 3: the codes' products, twice, less the query's sum.
        product = tl.zeros((TILE_CHUNKS * PAGE, GROUP_PAD), tl.float32)
        query_sum = tl.zeros((GROUP_PAD,), tl.float32)
        for bit in tl.static_range(8):
            part = tl.load(
                rotated + entry * HEAD_SIZE + bit * PLANE + column[None, :], mask=in_plane, other=0.0
            )
            code = (packed >> bit) & 1
            if BITS == 2:
                code = 2 * code + ((packed_low >> bit) & 1)
            # By way of fp32: the interpreter takes an integer for the bits of a bf16.
            plane = code.to(tl.float32).to(pool.dtype.element_ty)
            product += dot_wide(plane, part, PRECISION, WIDEN, SPLIT)
            query_sum += tl.sum(part, axis=1)
        logits = tl.abs(scale)[:, None] * (2.0 * product - (2**BITS - 1) * query_sum[None, :])
        around = tl.broadcast_to(constant[None, :], (TILE_CHUNKS * PAGE, GROUP_PAD))
        if ROPE:
            for start in tl.static_range(0, ROTARY // 2, PAIRS):
                pair = start + tl.arange(0, PAIRS)
                in_pair = pair < ROTARY // 2
                both = live[:, None] & in_pair[None, :]
                if AXES == 1:
                    position = tl.broadcast_to(token[:, None], both.shape)
                else:
                    on_axis = tl.load(axis + pair, mask=in_pair, other=0)
                    chunk = token // PAGE
                    at_page = arena_page(arena_row, chunk // POSITION_PLACES, live, BLOCK_PAGES)
                    at = (pool + at_page * PAGE_ELEMENTS).to(tl.pointer_type(tl.int32))
                    at += chunk % POSITION_PLACES * (AXES * PAGE) + token % PAGE
                    position = tl.zeros(both.shape, tl.int32)
                    for on in tl.static_range(AXES):
                        coordinate = tl.load(at + on * PAGE, mask=live, other=0)
                        position = tl.where((on_axis == on)[None, :], coordinate[:, None], position)
                angle = cos_sin + (position * ROTARY + pair[None, :])
                wave = in_group[:, None] & in_pair[None, :]
                cosine = tl.load(weights + pair[None, :], mask=wave, other=0.0)
                around += dot_wide(tl.load(angle, mask=both, other=0.0), cosine, PRECISION, WIDEN, SPLIT)
                sine = tl.load(weights + ROTARY // 2 + pair[None, :], mask=wave, other=0.0)
                angle += ROTARY // 2
                around += dot_wide(tl.load(angle, mask=both, other=0.0), sine, PRECISION, WIDEN, SPLIT)
        logits += tl.where(scale < 0, 1.0, 0.0)[:, None] * around
        by_chunk = tl.reshape(logits, (TILE_CHUNKS, PAGE, GROUP_PAD))
        best = tl.max(by_chunk, axis=1)
        total = tl.sum(tl.exp2(by_chunk - best[:, None, :]), axis=1)
        chunk = start_chunk + tile * TILE_CHUNKS + tl.arange(0, TILE_CHUNKS)
        to = log_weight + (item.to(tl.int64) * GROUP + member)[None, :] * max_chunks + chunk[:, None]
        tl.store(to, best + tl.log2(total), mask=(chunk < chunks)[:, None] & in_group[None, :])


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


@functools.cache
def prepare_options(
    num_layers: int,
    num_kv_heads: int,
    group: int,
    layout: LandmarkLayout,
    rope: RopeConstants,
) -> LaunchOptions:
    """How `prepare_kernel` is compiled for a model's shape."""
    head_pad = next_power_of_2(layout.head_size)
    constexprs = {
        **_shape(num_layers, num_kv_heads, group, layout),
        "HEAD_PAD": head_pad,
        "PART": min(head_pad, 32),
        "PRECISION": FULL_PRECISION,
        **dict(rope),
    }
    return LaunchOptions(constexprs, num_warps=2, num_stages=1)


@functools.cache
def sketch_options(
    num_layers: int,
    num_kv_heads: int,
    group: int,
    layout: LandmarkLayout,
    rope: RopeConstants,
    dtype: torch.dtype,
) -> LaunchOptions:
    """How `sketch_kernel` is compiled for a model's shape."""
    full = dtype == torch.float32
    # The pairs of larger heads in parts: operands of a dot fill the registers.
    pairs = min(max(next_power_of_2(layout.head_size // 2), 16), 64)
    # A second bit plane of small or large heads spills, and so do fp32 operands, but not in smaller tiles.
    tile_chunks = min(TILE_ANGLES // (pairs * PAGE), 8 // layout.sketch_bits, 4 if full else 8)
    if layout.head_size > 128:
        tile_chunks //= layout.sketch_bits
    constexprs = {
        **_shape(num_layers, num_kv_heads, group, layout),
        "PLANE_PAD": max(next_power_of_2(layout.head_size // 8), 16),
        "PAIRS": pairs,
        "POSITION_PLACES": layout.position_places,
        "BITS": layout.sketch_bits,
        "DATA_BYTES": layout.data_bytes,
        "SCALE_OFFSET": layout.scale_offset,
        "TILE_CHUNKS": tile_chunks,
        "TILES": PROGRAM_CHUNKS // tile_chunks,
        "PRECISION": FULL_PRECISION if full else "tf32",
        "WIDEN": widen_dots(dtype),
        "SPLIT": not full,
        **dict(rope),
    }
    return LaunchOptions(constexprs, num_warps=4 if layout.head_size <= 128 else 8, num_stages=2)


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
    prepare_kernel[(rows * heads,)](
        query,
        pool,
        row_slot,
        *where,
        landmarks.rotation,
        work.rotated,
        work.harmonics,
        layer,
        scale_log2,
        *strides,
        **prepare_options(*shape, layout, rope).kwargs(),
    )
    options = sketch_options(*shape, layout, rope, pool.dtype)
    per_program = options.constexprs["TILES"] * options.constexprs["TILE_CHUNKS"]
    sketch_kernel[(rows * heads, triton.cdiv(work.max_chunks, per_program))](
        pool,
        row_slot,
        row_len,
        *where,
        work.rotated,
        work.harmonics,
        landmarks.rope.cos_sin if landmarks.rope else pool,
        landmarks.rope.axis if landmarks.rope else row_slot,
        work.log_weight,
        layer,
        interval,
        work.max_chunks,
        decode.arena.stride(0),
        **options.kwargs(),
    )
