"""One layer's recall: score the chunks, choose, fetch what is missing; the extent decode follows."""

from collections.abc import Callable

from torch import Tensor

from ..chunk_gather import chunk_gather
from ..chunk_score import chunk_score
from ..chunk_select import chunk_select
from ..extent_decode.work_list import WorkList
from ..pages import Backend
from ..recall.landmarks import Landmarks
from ..recall.tables import RecallTables
from ..recall.work import RecallWork
from ..tables import DecodeTables

__all__ = ["chunk_recall"]


def chunk_recall(
    query: Tensor,
    pool: Tensor,
    store: Tensor | None,
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
    pin_first: int = 0,
    pin_recent: int = 0,
    backend: Backend = "auto",
    early: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Make the chunks hot that N decode rows of one layer need now: the hot slots then hold just these.

    The arguments are those of `chunk_score`, `chunk_select` and `chunk_gather`, and `meanwhile`, which is
    called between the first and the second: scoring fills a GPU, what follows waits for memory, or for the
    host, and leaves room for work that needs no recalled chunks. Launch shapes depend only on
    N and the buffers, and nothing synchronises with the host, so the call can be captured in a CUDA graph.

    Raises:
        ValueError: as these three.
    """
    chunk_score(
        query,
        pool,
        row_slot,
        row_len,
        decode,
        recall,
        layer,
        scale,
        landmarks,
        work,
        plan,
        interval=interval,
        backend=backend,
        early=early,
    )
    if meanwhile is not None:
        meanwhile()
    chunk_select(
        pool,
        row_slot,
        row_len,
        decode,
        recall,
        layer,
        landmarks.layout,
        work,
        interval=interval,
        pin_first=pin_first,
        pin_recent=pin_recent,
        backend=backend,
        early=True,
    )
    chunk_gather(
        pool,
        store,
        row_slot,
        decode,
        recall,
        layer,
        landmarks.layout,
        work,
        backend,
        # Programs that wait take room, which what goes on meanwhile needs.
        early=meanwhile is None,
    )
