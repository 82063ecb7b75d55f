"""Score every chunk of the heads that recall, from its landmark alone."""

import torch
from torch import Tensor

from ..extent_decode.work_list import WorkList
from ..pages import Backend, check_index, check_pool, group_size, require, use_triton
from ..recall.checks import check_recall
from ..recall.landmarks import Landmarks
from ..recall.tables import RecallTables
from ..recall.work import RecallWork
from ..tables import DecodeTables
from . import naive
from . import triton as fused
from .plan import score_plan

__all__ = ["chunk_score", "score_plan"]


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
    plan: WorkList | None,
    *,
    interval: int = 1,
    backend: Backend = "auto",
    early: bool = False,
) -> None:
    """Estimate, for one layer, how much attention each chunk would get from each member of the query group.

    `work.log_weight[row*H + head, g, c]` becomes log2 of the sum over the chunk's tokens of
    `2^(log2(e) * scale * estimate)`. The estimate of a query's product with a key is: for sketches the
    rotated query's product with the page's mean key, plus that with the token's scaled levels; for `mean` its
    product with the mean key; for `minmax` the largest product that the bounds allow (Quest). Rows that are
    padding, heads that do not recall, and rows that are not on a selecting step
    (`(row_len - 1 - prompt_len) % interval == 0`) are left alone.

    With Triton, `plan.update(row_slot, row_len, decode, recall, interval)` must have run, on the same stream
    and with the same N, since those tensors last changed; one update serves all layers.

    Args:
        query: [N, Hq, D], the pool's dtype; any strides in the first two dims.
        pool: [num_blocks*L*H, 16, 2*D], contiguous; bf16, fp16 or fp32.
        row_slot: [N] int32, the row's request slot; -1 for padding.
        row_len: [N] int32, the query's position + 1, in tokens.
        decode: the requests' tables.
        recall: which heads recall.
        layer: index of the layer, 0..L-1.
        scale: factor on query . key, 1/sqrt(D) as a rule.
        landmarks: as they were built.
        work: receives log_weight; room for N rows.
        plan: a `score_plan`, of this step; the torch backend ignores it.
        interval: steps between two selections.
        backend: `auto` is Triton on CUDA tensors, torch elsewhere.
        early: whether the launch may overlap with the one before; see `launch.overlap`.

    Raises:
        ValueError: for a shape, dtype, stride, layer or backend that does not fit, and with Triton for a plan
            that is missing, was made for another model or layout, or was updated for another N or interval.
            Indices are not checked.
    """
    require(query.dim() == 3, "query must be [N, Hq, D]")
    rows, num_q_heads, head_size = query.shape
    check_pool(pool, head_size, query)
    check_recall(pool, row_slot, decode, recall, layer, landmarks.layout, work)
    check_index("row_slot", row_slot, torch.int32, rows)
    check_index("row_len", row_len, torch.int32, rows)
    group = group_size(num_q_heads, decode.num_kv_heads)
    require(work.log_weight.shape[1] == group, f"the buffers are for groups of {work.log_weight.shape[1]}")
    require(interval >= 1, "interval must be at least 1")
    if rows == 0:
        return
    if not use_triton(backend, pool):
        naive.chunk_score(
            query, pool, row_slot, row_len, decode, recall, layer, scale, landmarks, work, interval
        )
        return
    if plan is None:
        raise ValueError("the Triton backend needs a plan")
    plan.check(rows, decode)
    fits = plan.part == "selecting" and plan.places == landmarks.layout.places
    require(fits, "the plan is no score plan for landmarks that lie like these")
    require(plan.interval == interval, f"the plan was updated for interval {plan.interval}, not {interval}")
    fused.chunk_score(
        query, pool, row_slot, row_len, decode, recall, layer, scale, landmarks, work, plan, interval, early
    )
