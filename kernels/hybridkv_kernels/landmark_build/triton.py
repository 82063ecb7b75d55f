"""The landmark build in Triton: one launch, a program for each landmark page of each head."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions, next_power_of_2
from ..pages import PAGE
from ..recall.landmarks import Landmarks
from ..recall.layout import STEP_BYTES, LandmarkLayout
from ..recall.paging import arena_page
from .naive import LARGEST_SCALE, LEAST_SCALE, LEAST_STEP


@triton.jit
def key_rows(
    pool: tl.tensor,
    source_blocks: tl.tensor,
    head: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    PAGE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
) -> tl.tensor:
    """Where the keys of these tokens of the prompt begin."""
    block = tl.load(source_blocks + token // PAGE, mask=live, other=0).to(tl.int64)
    return pool + ((block * BLOCK_PAGES + head) * PAGE + token % PAGE) * (2 * HEAD_SIZE)


@triton.jit
def rotation_run(
    rotation: tl.tensor,
    dim: tl.tensor,
    column: tl.tensor,
    run: tl.tensor,
    SPAN: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
) -> tl.tensor:
    """The columns of the rotation that give a run of SPAN dimensions, [len(dim), len(column)]."""
    inside = (dim < HEAD_SIZE)[:, None] & (column < SPAN)[None, :]
    return tl.load(rotation + dim[:, None] * HEAD_SIZE + run * SPAN + column[None, :], mask=inside, other=0.0)


@triton.jit
def rounded_mean(
    mean: tl.tensor,
    rotation: tl.tensor,
    levels: tl.tensor,
    dim: tl.tensor,
    column: tl.tensor,
    RUNS: tl.constexpr,
    SPAN: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    LEAST_STEP: tl.constexpr,
) -> tl.tensor:
    """Write a page's mean, rotated, as levels and before them their step; the mean that these stand for."""
    largest = tl.full((), 0.0, tl.float32)
    for run in range(RUNS):
        turn = rotation_run(rotation, dim, column, run, SPAN, HEAD_SIZE)
        largest = tl.maximum(largest, tl.max(tl.abs(tl.sum(mean[:, None] * turn, axis=0)), axis=0))
    step = tl.maximum(largest / 127, LEAST_STEP)
    tl.store(levels.to(tl.pointer_type(tl.float32)) - 1, step)
    rounded = tl.zeros_like(mean)
    for run in range(RUNS):
        turn = rotation_run(rotation, dim, column, run, SPAN, HEAD_SIZE)
        scaled = tl.sum(mean[:, None] * turn, axis=0) / step
        level = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int8)
        tl.store(levels.to(tl.pointer_type(tl.int8)) + run * SPAN + column, level, mask=column < SPAN)
        rounded += tl.sum(turn * (level.to(tl.float32) * step)[None, :], axis=1)
    return rounded


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
    tokens: tl.tensor,
    chunks: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPAN: tl.constexpr,
    SPAN_PAD: tl.constexpr,
    PLACES: tl.constexpr,
    DATA_BYTES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    SLOT_OFFSET: tl.constexpr,
    LEVEL_OFFSET: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
    LEAST_STEP: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Landmark page `program_id(0)` of (layer, head) `program_id(1)`."""
    TILE: tl.constexpr = TILE_CHUNKS * PAGE
    head = tl.program_id(1).to(tl.int64)
    if tl.load(chunk_first + head) < 0:
        return
    first_page = tl.load(extents + head * 2) - tl.cdiv(chunks, PLACES)
    page = arena_page(arena_blocks, first_page + tl.program_id(0), chunks > 0, BLOCK_PAGES)
    # Landmarks are bytes, halves and words in pages of the pool's own type.
    base = (pool + page * (PAGE * 2 * HEAD_SIZE)).to(tl.pointer_type(tl.uint8))
    first_chunk = tl.program_id(0) * PLACES
    last_token = tl.minimum(first_chunk + PLACES, chunks) * PAGE
    dim = tl.arange(0, HEAD_PAD)
    column = tl.arange(0, SPAN_PAD)
    mean = tl.zeros((HEAD_PAD,), tl.float32)
    if BITS > 0:
        for first in range(first_chunk * PAGE, last_token, TILE):
            token = first + tl.arange(0, TILE)
            live = token < last_token
            key = key_rows(pool, source_blocks, head, token, live, PAGE, BLOCK_PAGES, HEAD_SIZE)
            mask = live[:, None] & (dim < HEAD_SIZE)[None, :]
            mean += tl.sum(tl.load(key[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32), axis=0)
        mean /= last_token - first_chunk * PAGE
        levels = base + LEVEL_OFFSET
        mean = rounded_mean(mean, rotation, levels, dim, column, 8 // BITS, SPAN, HEAD_SIZE, LEAST_STEP)
    for first in range(first_chunk * PAGE, last_token, TILE):
        chunk = first // PAGE + tl.arange(0, TILE_CHUNKS)
        place = chunk - first_chunk
        inside = chunk * PAGE < last_token
        hot = tl.load(dest + head * tokens + chunk * PAGE, mask=inside, other=-1)
        slots = (base + SLOT_OFFSET).to(tl.pointer_type(tl.int32))
        tl.store(slots + place, tl.where(hot >= 0, hot // PAGE, -1), mask=inside)
        token = first + tl.arange(0, TILE)
        live = token < last_token
        key = key_rows(pool, source_blocks, head, token, live, PAGE, BLOCK_PAGES, HEAD_SIZE)
        mask = live[:, None] & (dim < HEAD_SIZE)[None, :]
        whole = tl.load(key[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
        if BITS > 0:
            rest = tl.where(mask, whole - mean[None, :], 0.0)
            squares = tl.zeros((TILE,), tl.float32)
            total = tl.zeros((TILE,), tl.float32)
            packed = tl.zeros((TILE, SPAN_PAD), tl.int32)
            for run in tl.static_range(8 // BITS):
                turn = rotation_run(rotation, dim, column, run, SPAN, HEAD_SIZE)
                part = tl.dot(rest, turn, input_precision=PRECISION)
                squares += tl.sum(part * part, axis=1)
                total += tl.sum(tl.abs(part), axis=1)
                if BITS == 1:
                    packed += tl.where(part > 0, 1 << run, 0)
            product = total
            if BITS == 2:
                # The token's mean is known only now: rotating again takes less than holding every part.
                middle = (total / HEAD_SIZE)[:, None]
                for run in tl.static_range(4):
                    turn = rotation_run(rotation, dim, column, run, SPAN, HEAD_SIZE)
                    part = tl.dot(rest, turn, input_precision=PRECISION)
                    larger = tl.abs(part) > middle
                    code = tl.where(part > 0, 2, 0) + tl.where(larger == (part > 0), 1, 0)
                    packed += code << (2 * run)
                    product += tl.sum(tl.where(larger, 2.0 * tl.abs(part), 0.0), axis=1)
            at = token - first_chunk * PAGE
            stored = live[:, None] & (column < SPAN)[None, :]
            tl.store(base + at[:, None] * SPAN + column[None, :], packed.to(tl.uint8), mask=stored)
            scale = squares / tl.maximum(product, 1e-38)
            scale = tl.minimum(tl.maximum(scale, LEAST_SCALE), LARGEST_SCALE)
            scales = (base + SCALE_OFFSET).to(tl.pointer_type(tl.float16))
            tl.store(scales + at, scale.to(tl.float16), mask=live)
        else:
            by_chunk = tl.reshape(whole, (TILE_CHUNKS, PAGE, HEAD_PAD))
            to = (base + place * DATA_BYTES).to(tl.pointer_type(pool.dtype.element_ty))[:, None] + dim[
                None, :
            ]
            filled = inside[:, None] & (dim < HEAD_SIZE)[None, :]
            if KIND == "mean":
                tl.store(to, (tl.sum(by_chunk, axis=1) / PAGE).to(pool.dtype.element_ty), mask=filled)
            else:
                tl.store(to, tl.min(by_chunk, axis=1).to(pool.dtype.element_ty), mask=filled)
                tl.store(to + HEAD_SIZE, tl.max(by_chunk, axis=1).to(pool.dtype.element_ty), mask=filled)


@functools.cache
def launch_options(num_layers: int, num_kv_heads: int, layout: LandmarkLayout) -> LaunchOptions:
    """How `landmark_kernel` is compiled for a model's shape."""
    head_pad = next_power_of_2(layout.head_size)
    constexprs = {
        "KIND": layout.kind,
        "BITS": layout.sketch_bits,
        "PAGE": PAGE,
        "BLOCK_PAGES": num_layers * num_kv_heads,
        "HEAD_SIZE": layout.head_size,
        "HEAD_PAD": head_pad,
        "SPAN": layout.span,
        "SPAN_PAD": max(next_power_of_2(layout.span), 16),
        "PLACES": layout.places,
        "DATA_BYTES": layout.data_bytes,
        "SCALE_OFFSET": layout.scale_offset,
        "SLOT_OFFSET": layout.slot_offset,
        "LEVEL_OFFSET": layout.mean_offset + STEP_BYTES,
        "LEAST_SCALE": LEAST_SCALE,
        "LARGEST_SCALE": LARGEST_SCALE,
        "LEAST_STEP": LEAST_STEP,
        # 16 KiB of rests in fp32, at most: they are in registers.
        "TILE_CHUNKS": max(min(4096 // (head_pad * PAGE), 4), 1),
        # On which side of a limit a product near it falls does not matter.
        "PRECISION": "tf32",
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
) -> None:
    """See `hybridkv_kernels.landmark_build.landmark_build`."""
    layers, heads, _ = extents.shape
    layout = landmarks.layout
    chunks = source_blocks.shape[0]
    landmark_kernel[(layout.pages(chunks), layers * heads)](
        pool,
        source_blocks,
        arena_blocks,
        extents,
        chunk_first,
        dest,
        # What is not used is not read either: any pointer will do.
        pool if landmarks.rotation is None else landmarks.rotation,
        chunks * PAGE,
        chunks,
        **launch_options(layers, heads, layout).kwargs(),
    )
