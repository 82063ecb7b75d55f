"""Decode attention over a head's extent and the request's tail: the one path for every decode row."""

import torch
from torch import Tensor

from ..pages import Backend, check_index, check_pool, group_size, require, use_triton
from ..tables import DecodeTables
from . import naive
from . import triton as fused
from .plan import DecodePlan

__all__ = ["DecodePlan", "DecodeTables", "extent_decode"]


def extent_decode(
    query: Tensor,
    pool: Tensor,
    out: Tensor,
    row_slot: Tensor,
    row_len: Tensor,
    tables: DecodeTables,
    layer: int,
    scale: float,
    plan: DecodePlan | None,
    backend: Backend = "auto",
    *,
    early: bool = False,
) -> None:
    """Attention of N decode rows, compressed or not, for one layer.

    Row n is one query token of the request in slot `row_slot[n]`. Each of its heads sees that head's whole
    extent, and of the tail the positions `tail_start .. row_len[n]-1`. Rows of one slot may repeat with
    other lengths. A row that sees nothing, and a padding row, comes out as zeros.

    A plan of a part of the heads leaves the outputs of the others alone.

    With Triton, `plan.update(row_slot, row_len, tables)` must have run, on the same stream and with the same
    N, since those tensors last changed; one update serves all layers. Nothing synchronises with the host and
    launch shapes depend only on N, so the call can be captured in a CUDA graph.

    Args:
        query: [N, Hq, D], the pool's dtype; any strides in the first two dims.
        pool: [num_blocks*L*H, 16, 2*D], contiguous; bf16, fp16 or fp32.
        out: [N, Hq, D], the pool's dtype, written; any strides in the first two dims.
        row_slot: [N] int32, the row's request slot; -1 for padding.
        row_len: [N] int32, the query's position + 1, in tokens.
        tables: the requests' tables.
        layer: index of the layer, 0..L-1.
        scale: factor on query . key, 1/sqrt(D) as a rule.
        plan: the plan of this step; the torch backend ignores it.
        backend: `auto` is Triton on CUDA tensors, torch elsewhere.
        early: whether the launch may overlap with the one before; see `launch.overlap`.

    Raises:
        ValueError: for a shape, dtype, stride, layer or backend that does not fit, and with Triton for
            a plan that is missing, was made for another model shape, or was updated for another N. Indices
            are not checked.
    """
    require(query.dim() == 3 and query.shape == out.shape, "query and out must both be [N, Hq, D]")
    rows, num_q_heads, head_size = query.shape
    check_pool(pool, head_size, query, out)
    group = group_size(num_q_heads, tables.num_kv_heads)
    check_index("row_slot", row_slot, torch.int32, rows)
    check_index("row_len", row_len, torch.int32, rows)
    require(0 <= layer < tables.num_layers, f"layer {layer} is not within 0..{tables.num_layers - 1}")
    if rows == 0:
        return
    if not use_triton(backend, pool):
        naive.extent_decode(query, pool, out, row_slot, row_len, tables, layer, scale)
        return
    if plan is None:
        raise ValueError("the Triton backend needs a plan")
    plan.check(rows, tables, group, head_size)
    fused.extent_decode(query, pool, out, row_slot, row_len, tables, layer, scale, plan, early)
