"""What is timed: each operation on a layer, the bytes that it must move, and how it is checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from hybridkv_kernels.chunk_gather import chunk_gather
from hybridkv_kernels.chunk_score import chunk_score
from hybridkv_kernels.chunk_select import chunk_select
from hybridkv_kernels.extent_decode import DecodeTables, extent_decode
from hybridkv_kernels.pages import Backend
from hybridkv_kernels.recall.layout import INDEX_BYTES
from hybridkv_kernels.recall_decode import recall_decode
from torch import Tensor

from speed.forward import make_forward, prefill
from speed.layer import (
    KV_HEADS,
    NO_CHOICE,
    QUERY_HEADS,
    SCALE,
    Case,
    Layer,
    find_misses,
    make_layer,
    make_missing,
    query_that_misses,
)
from speed.prefill import landmarks, make_prompt, move, offload, prefill_end, window
from speed.prepared import Prepared, error_of_most_heads, error_of_worst_head
from speed.rivals import RIVALS

OURS: tuple[Backend, ...] = ("triton", "torch")
# Relative error of bf16 results, as norms.
TOLERANCE = 1e-2
STALE = -7


def _attention(layer: Layer, tables: DecodeTables, num_bytes: int, backend: Backend) -> Prepared:
    out = torch.full_like(layer.query, torch.nan)
    layer.plan.update(layer.row_slot, layer.row_len, tables)

    def run() -> None:
        extent_decode(
            layer.query,
            layer.pool,
            out,
            layer.row_slot,
            layer.row_len,
            tables,
            0,
            SCALE,
            layer.plan,
            backend,
        )

    return _writes(out, run, num_bytes)


def _writes(out: Tensor, run: Callable[[], object], num_bytes: int) -> Prepared:
    """Attention that writes `out`."""
    poison = partial(out.fill_, torch.nan)
    return Prepared(run, out.clone, num_bytes, poison, error=error_of_worst_head)


def decode(layer: Layer, backend: str) -> Prepared:
    """Attention of compressed requests."""
    return _attention(layer, layer.compressed, layer.compressed_bytes, cast("Backend", backend))


def dense(layer: Layer, backend: str) -> Prepared:
    """Attention of the same requests, not compressed: ours and rivals'."""
    if backend not in RIVALS:
        return _attention(layer, layer.ordinary, layer.ordinary_bytes, cast("Backend", backend))
    out = torch.full_like(layer.query, torch.nan)
    return _writes(out, RIVALS[backend](layer, out), layer.ordinary_bytes)


def score(layer: Layer, backend: str) -> Prepared:
    """Landmarks to chunk weights."""
    work = layer.work
    layer.recall_plan.update(layer.row_slot, layer.row_len, layer.compressed, layer.recall)

    def run() -> None:
        chunk_score(
            layer.query,
            layer.pool,
            layer.row_slot,
            layer.row_len,
            layer.compressed,
            layer.recall,
            0,
            SCALE,
            layer.landmarks,
            work,
            layer.recall_plan.scores,
            backend=cast("Backend", backend),
        )

    items = (layer.recall.chunk_first[:, 0] >= 0).flatten()

    def result() -> Tensor:
        """Weights, not their logarithms: what is next to nothing may differ."""
        weights = work.log_weight[items]
        return (weights - weights.amax(-1, keepdim=True)).exp2()

    return Prepared(run, result, layer.landmark_bytes, lambda: work.log_weight.fill_(torch.nan))


def select(layer: Layer, backend: str) -> Prepared:
    """Chunk weights to what is missing, where some is."""
    work, misses = layer.work, find_misses(layer)

    def result() -> Tensor:
        """Which chunks come, and whose slots they get, in order; all else is stale."""
        known = torch.arange(work.missing.shape[1], device=work.missing.device) < work.num_missing[:, None]
        return torch.where(known, torch.stack((work.missing, work.freed)), -1).sort(dim=-1).values

    def poison() -> None:
        for written in (work.missing, work.freed, work.num_missing):
            written.fill_(STALE)

    # Of each chunk of a head that recalls, the group's weights and the entry of its hot slot.
    entry_bytes = QUERY_HEADS // KV_HEADS * work.log_weight.itemsize + INDEX_BYTES
    return Prepared(
        lambda: _choose(layer, cast("Backend", backend)),
        result,
        layer.case.batch * layer.case.recalling * layer.case.chunks * entry_bytes,
        poison,
        restore=lambda: make_missing(layer, misses),
    )


def _choose(layer: Layer, backend: Backend) -> None:
    chunk_select(
        layer.pool,
        layer.row_slot,
        layer.row_len,
        layer.compressed,
        layer.recall,
        0,
        layer.landmarks.layout,
        layer.work,
        backend=backend,
    )


def gather(layer: Layer, backend: str) -> Prepared:
    """Missing chunks into hot slots."""
    misses = find_misses(layer)
    make_missing(layer, misses)
    _choose(layer, "auto")
    work = layer.work
    num_bytes = int(work.num_missing.sum()) * layer.landmarks.layout.page_bytes

    def run() -> None:
        chunk_gather(
            layer.pool,
            layer.store,
            layer.row_slot,
            layer.compressed,
            layer.recall,
            0,
            layer.landmarks.layout,
            work,
            backend=cast("Backend", backend),
        )

    def poison() -> None:
        layer.pool[misses.page] = torch.nan

    return Prepared(run, lambda: layer.pool[misses.page], num_bytes, poison)


def step(layer: Layer, backend: str) -> Prepared:
    """A decode step of a layer: score, choose and fetch where heads recall, and attend.

    Two queries take turns, and each misses a share of what the other has chosen.
    """
    if not layer.case.recalling:
        return decode(layer, backend)
    other, pages = query_that_misses(layer)
    num_bytes = layer.landmark_bytes + len(pages) * layer.landmarks.layout.page_bytes
    one = _recall_step(layer, backend, (other, layer.query), num_bytes)

    def poison() -> None:
        one.poison()
        layer.pool[pages] = torch.nan

    return replace(one, poison=poison)


def step_in_place(layer: Layer, backend: str) -> Prepared:
    """The same where every chosen chunk is hot already: nothing is fetched."""
    return _recall_step(layer, backend, (layer.query,), layer.landmark_bytes)


def step_between(layer: Layer, backend: str) -> Prepared:
    """The same between two choices of an interval: the kernels of recall find nothing to do."""
    return _recall_step(layer, backend, (layer.query,), 0, interval=NO_CHOICE)


def _recall_step(
    layer: Layer, backend: str, queries: tuple[Tensor, ...], num_bytes: int, interval: int = 1
) -> Prepared:
    """Recall, which reads `num_bytes`, and attention, for queries in turn."""
    out = torch.full_like(layer.query, torch.nan)
    layer.recall_plan.update(layer.row_slot, layer.row_len, layer.compressed, layer.recall, interval)
    turns = itertools.cycle(queries)

    def run() -> None:
        recall_decode(
            next(turns),
            layer.pool,
            out,
            layer.store,
            layer.row_slot,
            layer.row_len,
            layer.compressed,
            layer.recall,
            0,
            SCALE,
            layer.landmarks,
            layer.work,
            layer.recall_plan,
            interval=interval,
            backend=cast("Backend", backend),
        )

    prepared = _writes(out, run, num_bytes + layer.compressed_bytes)
    return replace(prepared, error=error_of_most_heads, turns=len(queries))


def _always(case: Case) -> bool:
    return True


def _recalls(case: Case) -> bool:
    return case.recalling > 0


def _recalls_from_host(case: Case) -> bool:
    return case.recalling > 0 and case.tier == "host"


def _without_tier(case: Case) -> Case:
    """Where no head recalls, the tier makes no difference."""
    return case if case.recalling else replace(case, tier=Case.tier)


def _uncompressed(case: Case) -> Case:
    return Case(case.batch, case.prompt, budget=1.0, skew=1.0)


def _one(case: Case) -> Case:
    """One prompt; how long its heads become is the policy's choice."""
    return replace(_without_tier(case), batch=1, skew=1.0)


def _one_uncompressed(case: Case) -> Case:
    return replace(_uncompressed(case), batch=1)


@dataclass(frozen=True)
class Operation:
    """An operation, and who can do it.

    Attributes:
        make: what it works on, from a case, a device and a seed; has `copy()`.
        prepare: makes it ready on what `make` made, by a backend.
        backends: who can; the first is what ships.
        case: the case without what makes no difference.
        applies: whether it exists at a case.
    """

    make: Callable[[Case, torch.device, int], Any]
    prepare: Callable[[Any, str], Prepared]
    backends: tuple[str, ...]
    case: Callable[[Case], Case] = _without_tier
    applies: Callable[[Case], bool] = _always


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "dense": Operation(make_layer, dense, (*OURS, *RIVALS), _uncompressed),
        "decode": Operation(make_layer, decode, OURS),
        "score": Operation(make_layer, score, OURS, applies=_recalls),
        "select": Operation(make_layer, select, OURS, applies=_recalls),
        "gather": Operation(make_layer, gather, OURS, applies=_recalls),
        "step": Operation(make_layer, step, OURS),
        "step_in_place": Operation(make_layer, step_in_place, OURS, applies=_recalls),
        "step_between": Operation(make_layer, step_between, OURS, applies=_recalls),
        "prefill": Operation(make_forward, prefill, ("fa3", "sdpa"), _one_uncompressed),
        "prefill_end": Operation(make_prompt, prefill_end, OURS, _one),
        "window": Operation(make_prompt, window, OURS, _one),
        "move": Operation(make_prompt, move, OURS, _one),
        "landmarks": Operation(make_prompt, landmarks, OURS, _one, _recalls),
        "offload": Operation(make_prompt, offload, OURS, _one, _recalls_from_host),
    }
)
