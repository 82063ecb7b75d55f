"""The observation window's attention in Triton: two streaming passes over the keys, no W x T matrix."""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions, next_power_of_2, widen_dots
from ..pages import PAGE
from .naive import VOTE_SHARE

# Enough for four programs on each multiprocessor of a large GPU. A constant, not the device's own number:
# how the keys are split decides the rounding.
STATISTICS_PROGRAMS = 512


@triton.jit
def load_queries(
    query: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    kv_head: tl.tensor,
    stride_row: tl.tensor,
    stride_head: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
) -> tl.tensor:
    """[len(row), HEAD_PAD]: row r is query r // GROUP of group member r % GROUP; 0 past the end."""
    dim = tl.arange(0, HEAD_PAD)[None, :]
    offset = (row // GROUP).to(tl.int64) * stride_row + (kv_head * GROUP + row % GROUP) * stride_head
    return tl.load(query + offset[:, None] + dim, mask=(row < rows)[:, None] & (dim < HEAD_SIZE), other=0.0)


@triton.jit
def load_keys(
    pool: tl.tensor,
    blocks: tl.tensor,
    token: tl.tensor,
    end: tl.tensor,
    layer: tl.tensor,
    kv_head: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
) -> tl.tensor:
    """[len(token), HEAD_PAD]: the keys of these tokens of one (layer, KV head); 0 from `end` on."""
    dim = tl.arange(0, HEAD_PAD)[None, :]
    block = tl.load(blocks + token // PAGE, mask=token < end, other=0).to(tl.int64)
    page = (block * LAYERS + layer) * HEADS + kv_head
    offset = (page * PAGE + token % PAGE) * (2 * HEAD_SIZE)
    return tl.load(pool + offset[:, None] + dim, mask=(token < end)[:, None] & (dim < HEAD_SIZE), other=0.0)


@triton.jit
def dot_transposed(a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    """a . b^T in fp32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit(
    do_not_specialize=["num_tokens", "rows", "split_tokens", "layer"],
    do_not_specialize_on_alignment=["blocks", "split_max", "split_sum"],
)
def statistics_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    blocks: tl.tensor,
    split_max: tl.tensor,
    split_sum: tl.tensor,
    num_tokens: tl.tensor,
    rows: tl.tensor,
    split_tokens: tl.tensor,
    layer: tl.tensor,
    scale_log2: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Pass 1: max and sum of exp2 of each row over one split of the keys."""
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    split = tl.program_id(1)
    kv_head = tl.program_id(2)
    q = load_queries(
        query, row, rows, kv_head, stride_query_row, stride_query_head, GROUP, HEAD_SIZE, HEAD_PAD
    )
    position = num_tokens - (rows - row + GROUP - 1) // GROUP
    best = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    end = tl.minimum((split + 1) * split_tokens, num_tokens)
    for start in range(split * split_tokens, end, KEY_TILE):
        token = start + tl.arange(0, KEY_TILE)
        k = load_keys(pool, blocks, token, end, layer, kv_head, PAGE, LAYERS, HEADS, HEAD_SIZE, HEAD_PAD)
        scores = dot_transposed(q, k, PRECISION, WIDEN) * scale_log2
        seen = (token[None, :] <= position[:, None]) & (token[None, :] < end)
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # A row may have seen nothing yet: its max is -inf, and -inf - -inf would be NaN.
        finite = tl.where(new_best == float("-inf"), 0.0, new_best)
        total = total * tl.exp2(best - finite) + tl.sum(tl.exp2(scores - finite[:, None]), axis=1)
        best = new_best
    to = (kv_head * tl.num_programs(1) + split) * rows + row
    tl.store(split_max + to, best, mask=row < rows)
    tl.store(split_sum + to, total, mask=row < rows)


@triton.jit(
    do_not_specialize=["rows", "splits"],
    do_not_specialize_on_alignment=["split_max", "split_sum", "row_max", "row_weight"],
)
def reduce_kernel(
    split_max: tl.tensor,
    split_sum: tl.tensor,
    row_max: tl.tensor,
    row_weight: tl.tensor,
    rows: tl.tensor,
    splits: tl.tensor,
    ROW_TILE: tl.constexpr,
) -> None:
    """Merge the splits: each row's max, and 1 / (rows * its sum), so that weights add up to the mean."""
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    kv_head = tl.program_id(1)
    inside = row < rows
    best = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    for split in range(0, splits):
        offset = (kv_head * splits + split) * rows + row
        best = tl.maximum(best, tl.load(split_max + offset, mask=inside, other=0.0))
    total = tl.zeros((ROW_TILE,), tl.float32)
    for split in range(0, splits):
        offset = (kv_head * splits + split) * rows + row
        part = tl.load(split_max + offset, mask=inside, other=0.0)
        total += tl.load(split_sum + offset, mask=inside, other=1.0) * tl.exp2(part - best)
    tl.store(row_max + kv_head * rows + row, best, mask=inside)
    tl.store(row_weight + kv_head * rows + row, 1.0 / (total * rows), mask=inside)


# The strides are a prompt's length: specialised on it, each new length could mean a new compilation.
@triton.jit(
    do_not_specialize=["num_tokens", "rows", "layer", "stride_mass", "stride_votes"],
    do_not_specialize_on_alignment=["blocks", "row_max", "row_weight", "mass", "votes"],
)
def column_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    blocks: tl.tensor,
    row_max: tl.tensor,
    row_weight: tl.tensor,
    mass: tl.tensor,
    votes: tl.tensor,
    num_tokens: tl.tensor,
    rows: tl.tensor,
    layer: tl.tensor,
    scale_log2: tl.tensor,
    vote_log2: tl.tensor,
    stride_query_row: tl.tensor,
    stride_query_head: tl.tensor,
    stride_mass: tl.tensor,
    stride_votes: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Pass 2: the sums over all rows, for one tile of keys. Keys come first: a sum then stays in a warp."""
    token = tl.program_id(0) * KEY_TILE + tl.arange(0, KEY_TILE)
    kv_head = tl.program_id(1)
    k = load_keys(pool, blocks, token, num_tokens, layer, kv_head, PAGE, LAYERS, HEADS, HEAD_SIZE, HEAD_PAD)
    token_mass = tl.zeros((KEY_TILE,), tl.float32)
    token_votes = tl.zeros((KEY_TILE,), tl.float32)
    for start in range(0, rows, ROW_TILE):
        row = start + tl.arange(0, ROW_TILE)
        q = load_queries(
            query, row, rows, kv_head, stride_query_row, stride_query_head, GROUP, HEAD_SIZE, HEAD_PAD
        )
        best = tl.load(row_max + kv_head * rows + row, mask=row < rows, other=0.0)
        weight = tl.load(row_weight + kv_head * rows + row, mask=row < rows, other=0.0)
        position = num_tokens - (rows - row + GROUP - 1) // GROUP
        scores = dot_transposed(k, q, PRECISION, WIDEN) * scale_log2 - best[None, :]
        seen = (token[:, None] <= position[None, :]) & (row[None, :] < rows)
        scores = tl.where(seen, scores, float("-inf"))
        token_mass += tl.sum(tl.exp2(scores) * weight[None, :], axis=1)
        token_votes += tl.sum(tl.where(scores >= vote_log2, 1.0, 0.0), axis=1)
    inside = token < num_tokens
    tl.store(mass + kv_head.to(tl.int64) * stride_mass + token, token_mass, mask=inside)
    tl.store(votes + kv_head.to(tl.int64) * stride_votes + token, token_votes, mask=inside)


@functools.cache
def launch_options(
    num_layers: int, num_kv_heads: int, group: int, head_size: int, dtype: torch.dtype
) -> LaunchOptions:
    """How `statistics_kernel` and `column_kernel` are compiled for a model's shape."""
    full = dtype == torch.float32
    head_pad = next_power_of_2(head_size)
    tile = 64
    if full:
        # fp32 has no tensor cores and holds its operands in registers: larger tiles spill.
        tile = 32 if head_pad <= 64 else 16
    constexprs = {
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "HEAD_PAD": head_pad,
        "ROW_TILE": tile,
        "KEY_TILE": tile,
        "PRECISION": "ieee" if full else "tf32",
        "WIDEN": widen_dots(dtype),
    }
    return LaunchOptions(constexprs, num_warps=4, num_stages=2)


@functools.cache
def reduce_options() -> LaunchOptions:
    """How `reduce_kernel` is compiled."""
    return LaunchOptions({"ROW_TILE": 128}, num_warps=4, num_stages=2)


def window_scores(
    query: Tensor,
    pool: Tensor,
    blocks: Tensor,
    num_tokens: int,
    layer: int,
    num_layers: int,
    scale: float,
    mass: Tensor,
    votes: Tensor,
) -> None:
    """See `hybridkv_kernels.window_scores.window_scores`."""
    window, num_q_heads, head_size = query.shape
    heads = mass.shape[0]
    group = num_q_heads // heads
    rows = window * group
    options = launch_options(num_layers, heads, group, head_size, pool.dtype)
    key_tile = options.constexprs["KEY_TILE"]
    key_tiles = triton.cdiv(num_tokens, key_tile)
    row_tiles = triton.cdiv(rows, options.constexprs["ROW_TILE"])
    split_tiles = triton.cdiv(key_tiles, max(STATISTICS_PROGRAMS // (row_tiles * heads), 1))
    splits = triton.cdiv(key_tiles, split_tiles)
    split_max, split_sum = torch.empty((2, heads, splits, rows), dtype=torch.float32, device=pool.device)
    row_max, row_weight = torch.empty((2, heads, rows), dtype=torch.float32, device=pool.device)
    scale_log2 = scale * math.log2(math.e)
    statistics_kernel[(row_tiles, splits, heads)](
        query,
        pool,
        blocks,
        split_max,
        split_sum,
        num_tokens,
        rows,
        split_tiles * key_tile,
        layer,
        scale_log2,
        query.stride(0),
        query.stride(1),
        **options.kwargs(),
    )
    reduce = reduce_options()
    reduce_kernel[(triton.cdiv(rows, reduce.constexprs["ROW_TILE"]), heads)](
        split_max, split_sum, row_max, row_weight, rows, splits, **reduce.kwargs()
    )
    column_kernel[(key_tiles, heads)](
        query,
        pool,
        blocks,
        row_max,
        row_weight,
        mass,
        votes,
        num_tokens,
        rows,
        layer,
        scale_log2,
        math.log2(VOTE_SHARE),
        query.stride(0),
        query.stride(1),
        mass.stride(0),
        votes.stride(0),
        **options.kwargs(),
    )
