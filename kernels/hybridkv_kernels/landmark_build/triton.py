"""The landmark build in Triton: one launch for the heads' centres, one for all chunks of all heads."""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions, next_power_of_2
from ..pages import PAGE
from ..recall.landmarks import Landmarks, Rope
from ..recall.layout import LandmarkLayout
from ..recall.paging import arena_page
from .naive import LARGEST_SCALE, LEAST_SCALE

RopeConstants = tuple[tuple[str, Any], ...]


@triton.jit
def token_angles(
    cos_sin: tl.tensor,
    axis: tl.tensor,
    positions: tl.tensor,
    token: tl.tensor,
    frequency: tl.tensor,
    mask: tl.tensor,
    tokens: tl.tensor,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
) -> tl.tensor:
    """Cosine and sine [len(token), len(frequency)] fp32 that the model's rope has for these tokens."""
    if AXES == 1:
        position = tl.broadcast_to(token[:, None], mask.shape)
    else:
        on_axis = tl.load(axis + frequency, mask=frequency < ROTARY // 2, other=0)
        position = tl.zeros(mask.shape, tl.int32)
        for on in tl.static_range(AXES):
            coordinate = tl.load(positions + on * tokens + token, mask=token < tokens, other=0)
            position = tl.where((on_axis == on)[None, :], coordinate[:, None], position)
    entry = cos_sin + (position * ROTARY + frequency[None, :])
    cos = tl.load(entry, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(entry + ROTARY // 2, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["source_blocks", "arena_blocks", "chunk_first"],
)
def centre_kernel(
    pool: tl.tensor,
    source_blocks: tl.tensor,
    arena_blocks: tl.tensor,
    extents: tl.tensor,
    chunk_first: tl.tensor,
    cos_sin: tl.tensor,
    axis: tl.tensor,
    positions: tl.tensor,
    tokens: tl.tensor,
    PAGE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PLACES: tl.constexpr,
    RESERVED: tl.constexpr,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Mean key before the rope of (layer, head) `program_id(0)`, into its first landmark page."""
    head = tl.program_id(0).to(tl.int64)
    if tl.load(chunk_first + head) < 0:
        return
    # Dimensions in two halves, such that pairs meet: (i, i + R/2) or (2i, 2i + 1), then those not rotated.
    index = tl.arange(0, HALF_PAD)
    rotated = index < ROTARY // 2
    if NEOX:
        first = tl.where(rotated, index, index + ROTARY // 2)
        second = tl.where(rotated, index + ROTARY // 2, index + HEAD_SIZE // 2)
    else:
        first = 2 * index
        second = 2 * index + 1
    inside = index < HEAD_SIZE // 2
    sum_first = tl.zeros((HALF_PAD,), tl.float32)
    sum_second = tl.zeros((HALF_PAD,), tl.float32)
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE)
        mask = (token < tokens)[:, None] & inside[None, :]
        block = tl.load(source_blocks + token // PAGE, mask=token < tokens, other=0).to(tl.int64)
        row = pool + (((block * BLOCK_PAGES + head) * PAGE + token % PAGE) * (2 * HEAD_SIZE))[:, None]
        a = tl.load(row + first[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(row + second[None, :], mask=mask, other=0.0).to(tl.float32)
        if ROPE:
            turned = mask & rotated[None, :]
            cos, sin = token_angles(cos_sin, axis, positions, token, index, turned, tokens, AXES, ROTARY)
            cos = tl.where(turned, cos, 1.0)
            norm = cos * cos + sin * sin
            sum_first += tl.sum((a * cos + b * sin) / norm, axis=0)
            sum_second += tl.sum((b * cos - a * sin) / norm, axis=0)
        else:
            sum_first += tl.sum(a, axis=0)
            sum_second += tl.sum(b, axis=0)
    landmark = tl.load(extents + head * 2) - tl.cdiv(tokens // PAGE + RESERVED, PLACES)
    page = tl.load(arena_blocks + landmark // BLOCK_PAGES).to(tl.int64) * BLOCK_PAGES + landmark % BLOCK_PAGES
    to = (pool + page * (PAGE * 2 * HEAD_SIZE)).to(tl.pointer_type(tl.float32))
    tl.store(to + first, sum_first / tokens, mask=inside)
    tl.store(to + second, sum_second / tokens, mask=inside)


@triton.jit
def rotated_span(
    rest: tl.tensor,
    rotation: tl.tensor,
    dim: tl.tensor,
    column: tl.tensor,
    first: tl.constexpr,
    SPAN: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """The SPAN rotated dimensions of `rest` from `first` on, zero beyond them."""
    turn = tl.load(
        rotation + dim[:, None] * HEAD_SIZE + first + column[None, :],
        mask=(dim < HEAD_SIZE)[:, None] & (column < SPAN)[None, :],
        other=0.0,
    )
    return tl.dot(rest, turn, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=["tokens", "chunks"],
    do_not_specialize_on_alignment=["source_blocks", "arena_blocks", "chunk_first"],
)
def landmark_kernel(
    pool: tl.tensor,
    source_blocks: tl.tensor,
    arena_blocks: tl.tensor,
    extents: tl.tensor,
    chunk_first: tl.tensor,
    dest: tl.tensor,
    rotation: tl.tensor,
    cos_sin: tl.tensor,
    axis: tl.tensor,
    positions: tl.tensor,
    tokens: tl.tensor,
    chunks: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPAN_PAD: tl.constexpr,
    PLACES: tl.constexpr,
    RESERVED: tl.constexpr,
    DATA_BYTES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    SLOT_OFFSET: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
    ROPE: tl.constexpr,
    NEOX: tl.constexpr,
    AXES: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Landmarks of TILE_CHUNKS chunks of (layer, head) `program_id(1)`."""
    PAGE_ELEMENTS: tl.constexpr = PAGE * 2 * HEAD_SIZE
    head = tl.program_id(1).to(tl.int64)
    if tl.load(chunk_first + head) < 0:
        return
    landmark = tl.load(extents + head * 2) - tl.cdiv(chunks + RESERVED, PLACES)
    chunk = tl.program_id(0) * TILE_CHUNKS + tl.arange(0, TILE_CHUNKS)
    inside = chunk < chunks
    place = chunk + RESERVED
    page = arena_page(arena_blocks, landmark + place // PLACES, inside, BLOCK_PAGES)
    # Landmarks are bytes, halves and words in pages of the pool's own type.
    base = pool + page * PAGE_ELEMENTS
    hot = tl.load(dest + head * tokens + chunk * PAGE, mask=inside, other=-1)
    slots = base.to(tl.pointer_type(tl.uint8)) + SLOT_OFFSET
    tl.store(
        slots.to(tl.pointer_type(tl.int32)) + place % PLACES, tl.where(hot >= 0, hot // PAGE, -1), mask=inside
    )

    token = tl.program_id(0) * (TILE_CHUNKS * PAGE) + tl.arange(0, TILE_CHUNKS * PAGE)
    live = token < tokens
    dim = tl.arange(0, HEAD_PAD)
    mask = live[:, None] & (dim < HEAD_SIZE)[None, :]
    block = tl.load(source_blocks + token // PAGE, mask=live, other=0).to(tl.int64)
    row = (block * BLOCK_PAGES + head) * PAGE + token % PAGE
    key = tl.load(pool + (row * (2 * HEAD_SIZE))[:, None] + dim[None, :], mask=mask, other=0.0)
    if BITS > 0:
        first_page = arena_page(arena_blocks, landmark, landmark >= 0, BLOCK_PAGES)
        centre = (pool + first_page * PAGE_ELEMENTS).to(tl.pointer_type(tl.float32))
        around = tl.load(centre + dim, mask=dim < HEAD_SIZE, other=0.0)[None, :]
        if ROPE:
            turned = dim < ROTARY
            if NEOX:
                frequency = dim % (ROTARY // 2)
                is_first = dim < ROTARY // 2
                partner = tl.where(is_first, dim + ROTARY // 2, dim - ROTARY // 2)
            else:
                frequency = dim // 2
                is_first = dim % 2 == 0
                partner = tl.where(is_first, dim + 1, dim - 1)
            other = tl.load(centre + partner, mask=turned, other=0.0)
            other = tl.where(is_first, -other, other)[None, :]
            both = live[:, None] & turned[None, :]
            cos, sin = token_angles(cos_sin, axis, positions, token, frequency, both, tokens, AXES, ROTARY)
            around = around * tl.where(both, cos, 1.0) + other * sin
        whole = key.to(tl.float32)
        rest = tl.where(mask, whole - around, 0.0)
        centred = tl.sum(rest * rest, axis=1) < tl.sum(whole * whole, axis=1)
        rest = tl.where(centred[:, None], rest, whole)
        SPAN: tl.constexpr = HEAD_SIZE * BITS // 8
        column = tl.arange(0, SPAN_PAD)
        squares = tl.zeros((TILE_CHUNKS * PAGE,), tl.float32)
        total = tl.zeros((TILE_CHUNKS * PAGE,), tl.float32)
        packed = tl.zeros((TILE_CHUNKS * PAGE, SPAN_PAD), tl.int32)
        for run in tl.static_range(8 // BITS):
            part = rotated_span(rest, rotation, dim, column, run * SPAN, SPAN, HEAD_SIZE, PRECISION)
            squares += tl.sum(part * part, axis=1)
            total += tl.sum(tl.abs(part), axis=1)
            if BITS == 1:
                packed += tl.where(part > 0, 1 << run, 0)
        product = total
        if BITS == 2:
            # The mean is known only now: rotating again takes less than holding every part.
            mean = (total / HEAD_SIZE)[:, None]
            for run in tl.static_range(4):
                part = rotated_span(rest, rotation, dim, column, run * SPAN, SPAN, HEAD_SIZE, PRECISION)
                larger = tl.abs(part) > mean
                code = tl.where(part > 0, 2, 0) + tl.where(larger == (part > 0), 1, 0)
                packed += code << (2 * run)
                product += tl.sum(tl.where(larger, 2.0 * tl.abs(part), 0.0), axis=1)
        token_place = token // PAGE + RESERVED
        token_page = arena_page(arena_blocks, landmark + token_place // PLACES, live, BLOCK_PAGES)
        to = (pool + token_page * PAGE_ELEMENTS).to(tl.pointer_type(tl.uint8))
        byte = (token_place % PLACES) * DATA_BYTES + token % PAGE * SPAN
        stored = live[:, None] & (column < SPAN)[None, :]
        tl.store((to + byte)[:, None] + column[None, :], packed.to(tl.uint8), mask=stored)
        scale = tl.minimum(tl.maximum(squares / tl.maximum(product, 1e-38), LEAST_SCALE), LARGEST_SCALE)
        scale = tl.where(centred, -scale, scale)
        scales = (to + SCALE_OFFSET).to(tl.pointer_type(tl.float16))
        tl.store(scales + (token_place % PLACES) * PAGE + token % PAGE, scale.to(tl.float16), mask=live)
    else:
        by_chunk = tl.reshape(key.to(tl.float32), (TILE_CHUNKS, PAGE, HEAD_PAD))
        data = base.to(tl.pointer_type(tl.uint8)) + (place % PLACES) * DATA_BYTES
        to = data.to(tl.pointer_type(pool.dtype.element_ty))[:, None] + dim[None, :]
        filled = inside[:, None] & (dim < HEAD_SIZE)[None, :]
        if KIND == "mean":
            tl.store(to, (tl.sum(by_chunk, axis=1) / PAGE).to(pool.dtype.element_ty), mask=filled)
        else:
            tl.store(to, tl.min(by_chunk, axis=1).to(pool.dtype.element_ty), mask=filled)
            tl.store(to + HEAD_SIZE, tl.max(by_chunk, axis=1).to(pool.dtype.element_ty), mask=filled)


def rope_constants(rope: Rope | None) -> RopeConstants:
    """The compile-time constants of the model's rope."""
    if rope is None:
        return (("ROPE", False), ("NEOX", True), ("AXES", 1), ("ROTARY", 0))
    return (("ROPE", True), ("NEOX", rope.is_neox), ("AXES", rope.num_axes), ("ROTARY", rope.rotary_size))


@functools.cache
def centre_options(
    num_layers: int, num_kv_heads: int, layout: LandmarkLayout, rope: RopeConstants
) -> LaunchOptions:
    """How `centre_kernel` is compiled for a model's shape."""
    half_pad = next_power_of_2(layout.head_size // 2)
    constexprs = {
        "PAGE": PAGE,
        "BLOCK_PAGES": num_layers * num_kv_heads,
        "HEAD_SIZE": layout.head_size,
        "HALF_PAD": half_pad,
        "PLACES": layout.places,
        "RESERVED": layout.reserved,
        "TILE": max(4096 // half_pad, PAGE),
        **dict(rope),
    }
    return LaunchOptions(constexprs, num_warps=8, num_stages=2)


@functools.cache
def launch_options(
    num_layers: int,
    num_kv_heads: int,
    layout: LandmarkLayout,
    rope: RopeConstants,
) -> LaunchOptions:
    """How `landmark_kernel` is compiled for a model's shape."""
    head_pad = next_power_of_2(layout.head_size)
    constexprs = {
        "KIND": layout.kind,
        "BITS": layout.sketch_bits,
        "PAGE": PAGE,
        "BLOCK_PAGES": num_layers * num_kv_heads,
        "HEAD_SIZE": layout.head_size,
        "HEAD_PAD": head_pad,
        "SPAN_PAD": max(next_power_of_2(layout.span), 16),
        "PLACES": layout.places,
        "RESERVED": layout.reserved,
        "DATA_BYTES": layout.data_bytes,
        "SCALE_OFFSET": layout.scale_offset,
        "SLOT_OFFSET": layout.slot_offset,
        "LEAST_SCALE": LEAST_SCALE,
        "LARGEST_SCALE": LARGEST_SCALE,
        # 16 KiB of rests in fp32, at most: they and the angles are in registers.
        "TILE_CHUNKS": max(min(4096 // (head_pad * PAGE), 4), 1),
        # On which side of a limit a product near it falls does not matter.
        "PRECISION": "tf32",
        **dict(rope),
    }
    return LaunchOptions(constexprs, num_warps=8, num_stages=1)


def landmark_build(
    pool: Tensor,
    source_blocks: Tensor,
    arena_blocks: Tensor,
    extents: Tensor,
    chunk_first: Tensor,
    dest: Tensor,
    landmarks: Landmarks,
    positions: Tensor | None,
) -> None:
    """See `hybridkv_kernels.landmark_build.landmark_build`."""
    layers, heads, _ = extents.shape
    layout = landmarks.layout
    chunks = source_blocks.shape[0]
    tokens = chunks * PAGE
    rope = rope_constants(landmarks.rope)
    # What is not used is not read either: any pointer will do.
    cos_sin = landmarks.rope.cos_sin if landmarks.rope else pool
    axis = landmarks.rope.axis if landmarks.rope else source_blocks
    at = source_blocks if positions is None else positions.contiguous()
    if layout.sketch_bits:
        centre_kernel[(layers * heads,)](
            pool,
            source_blocks,
            arena_blocks,
            extents,
            chunk_first,
            cos_sin,
            axis,
            at,
            tokens,
            **centre_options(layers, heads, layout, rope).kwargs(),
        )
    options = launch_options(layers, heads, layout, rope)
    landmark_kernel[(triton.cdiv(chunks, options.constexprs["TILE_CHUNKS"]), layers * heads)](
        pool,
        source_blocks,
        arena_blocks,
        extents,
        chunk_first,
        dest,
        pool if landmarks.rotation is None else landmarks.rotation,
        cos_sin,
        axis,
        at,
        tokens,
        chunks,
        **options.kwargs(),
    )
