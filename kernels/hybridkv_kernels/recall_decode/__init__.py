"""One layer's decode where heads recall: the others are attended while chunks are chosen and fetched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..chunk_recall import chunk_recall
from ..chunk_score import score_plan
from ..extent_decode import DecodePlan, DecodeTables, extent_decode
from ..extent_decode.work_list import WorkList
from ..pages import Backend, use_triton
from ..recall.landmarks import Landmarks
from ..recall.layout import LandmarkLayout
from ..recall.tables import RecallTables
from ..recall.work import RecallWork

__all__ = ["RecallPlan", "recall_decode"]


@dataclass(frozen=True)
class RecallPlan:
    """The plans of a step whose heads recall, and the stream on which the other heads are attended.

    Attributes:
        scores: of the landmark pages of heads that select.
        static: of the heads that recall nothing, which do not wait.
        recalling: of those that recall.
        beside: None without CUDA, where everything runs in order.
    """

    scores: WorkList
    static: DecodePlan
    recalling: DecodePlan
    beside: torch.cuda.Stream | None

    @classmethod
    def create(
        cls,
        max_rows: int,
        num_layers: int,
        num_kv_heads: int,
        num_q_heads: int,
        layout: LandmarkLayout,
        device: torch.device | str,
    ) -> RecallPlan:
        """Allocate the plans; the arguments are those of `DecodePlan.create`, and how landmarks lie.

        Raises:
            ValueError: as there.
        """
        device = torch.device(device)
        shape = (max_rows, num_layers, num_kv_heads, num_q_heads, layout.head_size, device)
        return cls(
            score_plan(max_rows, num_layers, num_kv_heads, layout, device),
            DecodePlan.create(*shape, part="static"),
            DecodePlan.create(*shape, part="recalling"),
            torch.cuda.Stream(device) if device.type == "cuda" else None,
        )

    def update(
        self,
        row_slot: Tensor,
        row_len: Tensor,
        tables: DecodeTables,
        recall: RecallTables,
        interval: int = 1,
    ) -> None:
        """Plan one step for all layers: three launches; see `WorkList.update`.

        Raises:
            ValueError: as there.
        """
        for work_list in (self.scores, self.static.splits, self.recalling.splits):
            work_list.update(row_slot, row_len, tables, recall, interval)


def recall_decode(
    query: Tensor,
    pool: Tensor,
    out: Tensor,
    store: Tensor | None,
    row_slot: Tensor,
    row_len: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    scale: float,
    landmarks: Landmarks,
    work: RecallWork,
    plan: RecallPlan | None,
    *,
    interval: int = 1,
    pin_first: int = 0,
    pin_recent: int = 0,
    backend: Backend = "auto",
    early: bool = False,
) -> None:
    """`chunk_recall`, then `extent_decode`, for N decode rows of one layer.

    The arguments are theirs. With Triton, heads that recall nothing are attended on `plan.beside` while the
    others' chunks are chosen and fetched, and the current stream waits for it at the end. Like its parts, the
    call can be captured in a CUDA graph.

    Raises:
        ValueError: as these two, and with Triton for a plan that is missing.
    """
    on_triton = use_triton(backend, pool)
    if on_triton and plan is None:
        raise ValueError("the Triton backend needs a plan")
    parts = plan if on_triton else None

    def attend(part: DecodePlan | None) -> None:
        # Not early: its programs would take the room of the other part's while they wait.
        extent_decode(query, pool, out, row_slot, row_len, decode, layer, scale, part, backend)

    def attend_static() -> None:
        if parts is None:
            return
        if parts.beside is not None:
            parts.beside.wait_stream(torch.cuda.current_stream(pool.device))
        # Without one, the current stream.
        with torch.cuda.stream(parts.beside):
            attend(parts.static)

    chunk_recall(
        query,
        pool,
        store,
        row_slot,
        row_len,
        decode,
        recall,
        layer,
        scale,
        landmarks,
        work,
        None if parts is None else parts.scores,
        interval=interval,
        pin_first=pin_first,
        pin_recent=pin_recent,
        backend=backend,
        early=early,
        meanwhile=attend_static,
    )
    # Without a plan, of all heads.
    attend(None if parts is None else parts.recalling)
    if parts is not None and parts.beside is not None:
        torch.cuda.current_stream(pool.device).wait_stream(parts.beside)
