"""Extent decode in Triton: a program per split of the plan's work list, and a merge of the split heads."""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions, await_launch_before, next_power_of_2, overlap, widen_dots
from ..pages import PAGE
from ..tables import DecodeTables
from .paging import head_lengths
from .plan import SPLIT_GRANULE, DecodePlan
from .work_list import split_of


@triton.jit(do_not_specialize=["items", "layer"])
def decode_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    out: tl.tensor,
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    arena: tl.tensor,
    tail_start: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    work: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    items: tl.tensor,
    layer: tl.tensor,
    scale_log2: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_out_row: tl.tensor,
    stride_out_head: tl.tensor,
    stride_arena: tl.tensor,
    stride_blocks: tl.tensor,
    stride_offsets: tl.tensor,
    stride_work: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    GRANULE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Attention of one query group over one split of its head's pages."""
    BLOCK_PAGES: tl.constexpr = LAYERS * HEADS
    TILE: tl.constexpr = TILE_PAGES * PAGE
    program = tl.program_id(0)
    item, split, splits = split_of(offsets, work, program, items, layer, stride_offsets, stride_work)
    row = (item // HEADS).to(tl.int64)
    head = item % HEADS
    slot, first, extent_len, start, tail_len = head_lengths(
        row_slot, row_len, extents, tail_start, item, items, layer, LAYERS, HEADS
    )
    await_launch_before(OVERLAP)
    if splits == 0:
        return
    extent_pages = tl.cdiv(extent_len, PAGE)
    pages = extent_pages + tl.cdiv(tail_len, PAGE)
    # Whole granules, of which the plan left enough for every split.
    share = tl.cdiv(tl.cdiv(pages, splits), GRANULE) * GRANULE
    begin = split * share
    end = tl.minimum(begin + share, pages)
    arena_row = arena + slot.to(tl.int64) * stride_arena
    tail_row = blocks + slot.to(tl.int64) * stride_blocks + start // PAGE

    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, HEAD_PAD)
    group_mask = (member < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
    q_offset = row * stride_query_row + (head * GROUP + member) * stride_query_head
    q = tl.load(query + q_offset[:, None] + dim[None, :], mask=group_mask, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)

    best = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    acc = tl.zeros((GROUP_PAD, HEAD_PAD), tl.float32)
    in_tile = tl.arange(0, TILE)
    in_page = in_tile % PAGE
    for tile_page in range(begin, end, TILE_PAGES):
        page = tile_page + in_tile // PAGE
        in_extent = page < extent_pages
        tail_page = page - extent_pages
        left = tl.where(in_extent, extent_len - page * PAGE, tail_len - tail_page * PAGE)
        valid = (in_page < left) & (page < end)
        logical = first + page
        bag = tl.load(arena_row + logical // BLOCK_PAGES, mask=valid & in_extent, other=0).to(tl.int64)
        block = tl.load(tail_row + tail_page, mask=valid & (tail_page >= 0), other=0).to(tl.int64)
        physical = tl.where(
            in_extent,
            bag * BLOCK_PAGES + logical % BLOCK_PAGES,
            block * BLOCK_PAGES + layer * HEADS + head,
        )
        token = pool + ((physical * PAGE + in_page) * (2 * HEAD_SIZE))[:, None] + dim[None, :]
        # V is masked like K: what lies past the end may be NaN, which a weight of zero would let through.
        mask = valid[:, None] & (dim < HEAD_SIZE)[None, :]
        k = tl.load(token, mask=mask, other=0.0)
        v = tl.load(token + HEAD_SIZE, mask=mask, other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(valid[None, :], scores, float("-inf"))
        # A tile's first page has at least one token, so no max stays at -inf.
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        rescale = tl.exp2(best - new_best)
        weights = tl.exp2(scores - new_best[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        best = new_best

    nothing = total == 0.0
    result = acc / tl.where(nothing, 1.0, total)[:, None]
    if splits == 1:
        out_offset = row * stride_out_row + (head * GROUP + member) * stride_out_head
        tl.store(out + out_offset[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=group_mask)
    else:
        entry = program.to(tl.int64) * GROUP + member
        tl.store(partial_out + (entry * HEAD_SIZE)[:, None] + dim[None, :], result, mask=group_mask)
        tl.store(partial_lse + entry, best + tl.log2(total), mask=member < GROUP)


@triton.jit(do_not_specialize=["layer"])
def merge_kernel(
    out: tl.tensor,
    offsets: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    layer: tl.tensor,
    stride_out_row: tl.tensor,
    stride_out_head: tl.tensor,
    stride_offsets: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Merge the splits of item `program_id(0)` for one member of its query group."""
    item = tl.program_id(0)
    member = tl.program_id(1)
    item_offset = offsets + layer.to(tl.int64) * stride_offsets + item
    begin = tl.load(item_offset)
    end = tl.load(item_offset + 1)
    await_launch_before(OVERLAP)
    # The decode kernel wrote an unsplit head's output itself.
    if end - begin <= 1:
        return
    dim = tl.arange(0, HEAD_PAD)
    best = tl.full((SPLIT_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((SPLIT_TILE,), tl.float32)
    acc = tl.zeros((SPLIT_TILE, HEAD_PAD), tl.float32)
    for start in range(begin, end, SPLIT_TILE):
        split = start + tl.arange(0, SPLIT_TILE)
        entry = split.to(tl.int64) * GROUP + member
        lse = tl.load(partial_lse + entry, mask=split < end, other=float("-inf"))
        part = tl.load(
            partial_out + (entry * HEAD_SIZE)[:, None] + dim[None, :],
            mask=(split < end)[:, None] & (dim < HEAD_SIZE)[None, :],
            other=0.0,
        )
        # Lanes hold a softmax each and meet after the loop. The first tile may leave lanes empty, at -inf.
        new_best = tl.maximum(best, lse)
        finite = tl.where(new_best == float("-inf"), 0.0, new_best)
        rescale = tl.exp2(best - finite)
        weight = tl.exp2(lse - finite)
        total = total * rescale + weight
        acc = acc * rescale[:, None] + weight[:, None] * part
        best = new_best
    weight = tl.exp2(best - tl.max(best, axis=0))
    result = tl.sum(acc * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    row = (item // HEADS).to(tl.int64)
    to = out + row * stride_out_row + (item % HEADS * GROUP + member) * stride_out_head + dim
    tl.store(to, result.to(out.dtype.element_ty), mask=dim < HEAD_SIZE)


@functools.cache
def launch_options(
    num_layers: int, num_kv_heads: int, group: int, head_size: int, dtype: torch.dtype
) -> LaunchOptions:
    """How `decode_kernel` is compiled for a model's shape."""
    full = dtype == torch.float32
    head_pad = next_power_of_2(head_size)
    constexprs = {
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "GROUP": group,
        # The least M of a tensor-core dot.
        "GROUP_PAD": 16,
        "HEAD_SIZE": head_size,
        "HEAD_PAD": head_pad,
        # 16 KiB of K and as much of V per stage, or less.
        "TILE_PAGES": max(4 * 128 * 2 // (max(head_pad, 128) * dtype.itemsize), 1),
        "GRANULE": SPLIT_GRANULE,
        "PRECISION": "ieee" if full else "tf32",
        "WIDEN": widen_dots(dtype),
    }
    # fp32 has no tensor cores and holds its operands in registers: four times the threads, or it spills. In
    # 16 bits two warps and four stages, of three programs a multiprocessor, came nearest to the bandwidth of
    # an H200 (Triton 3.6, D = 128); a larger head does not fit into the registers of two.
    num_warps = 8 if full else 2 if head_pad <= 128 else 4
    return LaunchOptions(constexprs, num_warps=num_warps, num_stages=3 if full else 4)


@functools.cache
def merge_options(num_kv_heads: int, group: int, head_size: int) -> LaunchOptions:
    """How `merge_kernel` is compiled for a model's shape."""
    constexprs = {
        "HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "HEAD_PAD": next_power_of_2(head_size),
        "SPLIT_TILE": 8,
    }
    return LaunchOptions(constexprs, num_warps=2, num_stages=2)


def extent_decode(
    query: Tensor,
    pool: Tensor,
    out: Tensor,
    row_slot: Tensor,
    row_len: Tensor,
    tables: DecodeTables,
    layer: int,
    scale: float,
    plan: DecodePlan,
    early: bool,
) -> None:
    """See `hybridkv_kernels.extent_decode.extent_decode`."""
    rows, num_q_heads, head_size = query.shape
    heads = tables.num_kv_heads
    group = num_q_heads // heads
    items, splits = rows * heads, plan.splits
    options = launch_options(tables.num_layers, heads, group, head_size, pool.dtype)
    decode_kernel[(splits.programs(rows),)](
        query,
        pool,
        out,
        row_slot,
        row_len,
        tables.extents,
        tables.arena,
        tables.tail_start,
        tables.blocks,
        splits.offsets,
        splits.work,
        plan.partial_out,
        plan.partial_lse,
        items,
        layer,
        scale * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        tables.arena.stride(0),
        tables.blocks.stride(0),
        splits.offsets.stride(0),
        splits.work.stride(0),
        **options.kwargs(),
        **overlap(pool.device, early),
    )
    merge_kernel[(items, group)](
        out,
        splits.offsets,
        plan.partial_out,
        plan.partial_lse,
        layer,
        out.stride(0),
        out.stride(1),
        splits.offsets.stride(0),
        **merge_options(heads, group, head_size).kwargs(),
        # Its programs take room while they wait, which the recall beside static heads needs.
        **overlap(pool.device, early=splits.part != "static"),
    )
