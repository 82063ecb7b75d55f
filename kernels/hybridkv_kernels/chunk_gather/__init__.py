"""Fetch the missing chunks of recalling heads into the hot slots that were freed for them."""

from torch import Tensor

from ..pages import Backend, use_triton
from ..recall.checks import check_recall, check_store
from ..recall.layout import LandmarkLayout
from ..recall.tables import RecallTables
from ..recall.work import RecallWork
from ..tables import DecodeTables
from . import naive
from . import triton as fused

__all__ = ["chunk_gather"]


def chunk_gather(
    pool: Tensor,
    store: Tensor | None,
    row_slot: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    layout: LandmarkLayout,
    work: RecallWork,
    backend: Backend = "auto",
    *,
    early: bool = False,
) -> None:
    """Copy the page of each chunk that `chunk_select` found missing into a hot slot, for one layer.

    The chunk goes from its store page (see `RecallTables`), or without a store from its page of the
    request's ordinary blocks, `blocks[slot, c] * (L*H) + layer*H + head`, to the hot slot at the same place
    of `work.freed`, and its landmark's entry then names that slot. `chunk_select` must have run on the same
    stream, with the same rows and layer.

    Nothing synchronises with the host and launch shapes depend only on N, so the call can be captured in a
    CUDA graph.

    Args:
        pool: [num_blocks*L*H, 16, 2*D], contiguous; bf16, fp16 or fp32; written in place.
        store: [M, 16, 2*D], contiguous, the pool's dtype and device (on a GPU a mapped view of pinned host
            memory), or None.
        row_slot: [N] int32, the row's request slot; -1 for padding.
        decode: the requests' tables.
        recall: which of their heads recall, and where their chunks are.
        layer: index of the layer, 0..L-1.
        layout: how the landmarks lie in their pages.
        work: `num_missing`, `missing` and `freed` are read.
        backend: `auto` is Triton on CUDA tensors, torch elsewhere.
        early: whether the launch may overlap with the one before; see `launch.overlap`.

    Raises:
        ValueError: for a shape, dtype, stride, layer or backend that does not fit. Indices are not checked.
    """
    check_recall(pool, row_slot, decode, recall, layer, layout, work)
    if store is not None:
        check_store(pool, store)
    if row_slot.shape[0] == 0:
        return
    inputs = (pool, store, row_slot, decode, recall, layer, layout, work)
    if use_triton(backend, pool):
        fused.chunk_gather(*inputs, early)
    else:
        naive.chunk_gather(*inputs)
