"""Choose the chunks that a recalling head holds hot, and say what has to come and what goes."""

import torch
from torch import Tensor

from ..pages import Backend, check_index, require, use_triton
from ..recall.checks import check_recall
from ..recall.layout import LandmarkLayout
from ..recall.tables import RecallTables
from ..recall.work import RecallWork
from ..tables import DecodeTables
from . import naive
from . import triton as fused

__all__ = ["chunk_select"]


def chunk_select(
    pool: Tensor,
    row_slot: Tensor,
    row_len: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    layout: LandmarkLayout,
    work: RecallWork,
    *,
    interval: int = 1,
    pin_first: int = 0,
    pin_recent: int = 0,
    backend: Backend = "auto",
    early: bool = False,
) -> None:
    """Choose as many chunks of each recalling head as it has hot slots, for N decode rows of one layer.

    A row selects where `row_len - 1 - prompt_len` is a multiple of `interval`. Each member's weights are
    normalised to a sum of 1 over the chunks, and a chunk counts with the largest of its group's: with the
    logarithm's fixed-point number, a multiple of 2^-24 from -64 on. The largest are chosen: of equal ones the
    lower chunk first, and before all others the first `pin_first` and the last `pin_recent` chunks. A weight
    that is NaN is -inf, one that is +inf the largest finite number.

    Chunks that were chosen and are not hot go to `work.missing`, the hot slots of those that are hot and were
    not chosen to `work.freed`, and these chunks are no longer hot; `chunk_gather` fills the slots. There are
    as many of one as of the other, because all hot slots are full: each holds another chunk. In which order,
    the backend decides. Items of padding rows, of heads that do not recall and of rows that do not select get
    a `num_missing` of 0 and are otherwise left as they are. The counters of the rows' slots count on.

    No two rows may share a slot. Nothing synchronises with the host and launch shapes depend only on N, so
    the call can be captured in a CUDA graph.

    Args:
        pool: [num_blocks*L*H, 16, 2*D], contiguous; bf16, fp16 or fp32; hot slots of its landmark pages are
            read and written.
        row_slot: [N] int32, the row's request slot; -1 for padding.
        row_len: [N] int32, the query's position + 1, in tokens.
        decode: the requests' tables.
        recall: which of their heads recall; no prompt has more chunks than `work`, nor a head more hot slots
            than its prompt has chunks.
        layer: index of the layer, 0..L-1.
        layout: how the landmarks lie in their pages.
        work: `log_weight` is read; `missing`, `freed`, `num_missing` and `counters` are written.
        interval: steps from one selection to the next.
        pin_first: chunks at the prompt's start that are chosen whatever they weigh.
        pin_recent: likewise at its end.
        backend: `auto` is Triton on CUDA tensors, torch elsewhere.
        early: whether the launch may overlap with the one before; see `launch.overlap`.

    Raises:
        ValueError: for a shape, dtype, stride, layer, count or backend that does not fit. Indices are not
            checked.
    """
    check_recall(pool, row_slot, decode, recall, layer, layout, work)
    check_index("row_len", row_len, torch.int32, row_slot.shape[0])
    require(interval >= 1, f"interval must be at least 1, not {interval}")
    require(min(pin_first, pin_recent) >= 0, "pin_first and pin_recent must not be negative")
    if row_slot.shape[0] == 0:
        return
    inputs = (pool, row_slot, row_len, decode, recall, layer, layout, work, interval, pin_first, pin_recent)
    if use_triton(backend, pool):
        fused.chunk_select(*inputs, early)
    else:
        naive.chunk_select(*inputs)
