"""Counts what compressions and recalls did, once the figures have come to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hybridkv_vllm.observe.heads import HeadsReport, HeadTables
from hybridkv_vllm.observe.metrics import FallbackReason, WorkerMetrics
from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.worker.compress import Compression
from hybridkv_vllm.worker.recall import NO_ROOM_FOR_LANDMARKS, NO_ROOM_ON_HOST, RecallState


class CompressionLog:
    """One worker's: while requests run it never waits for a figure."""

    def __init__(
        self, metrics: WorkerMetrics, heads: HeadsReport, recall: RecallState | None, device: torch.device
    ) -> None:
        self._metrics = metrics
        self._heads = heads
        self._recall = recall
        self._on_gpu = device.type == "cuda"
        # Copies under way, in the order of the stream, and what counts each: a request can be compressed, be
        # preempted and be compressed again before any of it is here.
        self._copies: deque[tuple[torch.cuda.Event | None, Callable[[], None]]] = deque()
        slots = 0 if recall is None else recall.work.counters.shape[0]
        self._counters = torch.zeros(slots, 2, dtype=torch.int64, pin_memory=self._on_gpu)
        self._counters_here: torch.cuda.Event | None = None
        self._counted = (0, 0)
        # What a slot's counters held when its request was compressed, by request.
        self._chunks_before: dict[str, Tensor] = {}

    def _to_host(self, source: Tensor) -> Tensor:
        """Starts a copy to the host."""
        target = torch.empty_like(source, device="cpu", pin_memory=self._on_gpu)
        return target.copy_(source, non_blocking=True)

    def _mark(self) -> torch.cuda.Event | None:
        """Tells when the copies so far are done; a CPU does without."""
        if not self._on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def record(self, compression: Compression) -> None:
        """Starts the copy of what a compression decided for each head."""
        selection, store_end = compression.selection, compression.store_end
        figures = torch.stack(
            [
                part.double()
                for part in (
                    selection.figure,
                    selection.dynamic,
                    selection.recalled,
                    selection.pages,
                    selection.lengths,
                    torch.zeros_like(selection.pages) if store_end is None else store_end,
                )
            ]
        )
        here, before = self._to_host(figures), None
        if compression.chunks_before is not None:
            before = self._to_host(compression.chunks_before)
        self._copies.append((self._mark(), partial(self._count_compression, here, before, compression)))

    def end(self, request_id: str, slot: int) -> None:
        """Starts the copy of a request's counters, after its last step and before its slot is another's."""
        if self._recall is not None:
            counters = self._to_host(self._recall.work.counters[slot])
            self._copies.append((self._mark(), partial(self._count_end, counters, request_id)))

    def collect(self) -> None:
        """Counts what has arrived; called between steps."""
        while self._copies and _is_here(self._copies[0][0]):
            _, count = self._copies.popleft()
            count()
        if self._recall is not None:
            self._count_chunks(self._recall)
            if self._recall.tier is not None:
                self._metrics.set_host_bytes(self._recall.tier.bytes_held)

    def drain(self) -> None:
        """Counts all that there is; called when no request is left, as no step may come to count the last.

        It waits for the device, which has nothing else to do by then.
        """
        # The first round starts the copy of what the last step chose, the second counts it.
        for _ in range(2 if self._on_gpu else 1):
            if self._on_gpu:
                torch.cuda.current_stream().synchronize()
            self.collect()

    def _count_compression(self, figures: Tensor, before: Tensor | None, compression: Compression) -> None:
        grant, seconds = compression.grant, compression.timer.seconds()
        figure, dynamic, recalled, pages, lengths, store_end = figures
        num_dynamic = int(dynamic.sum())
        if compression.reservation is not None and self._recall is not None and self._recall.tier is not None:
            chunks = grant.plan.num_full_blocks
            ends = store_end[recalled.bool()].int().tolist()
            self._recall.tier.trim(compression.reservation, (range(end - chunks, end) for end in ends))
        if compression.recalls:
            num_in_tier = num_dynamic if compression.store_end is None else int((store_end > 0).sum())
            self._count_pruned(NO_ROOM_ON_HOST, num_dynamic - num_in_tier)
            self._count_pruned(NO_ROOM_FOR_LANDMARKS, num_in_tier - int(recalled.sum()))
        # The prompt's partial last block stays in the tail, for every head.
        kept = float(lengths.mean()) + grant.plan.num_tokens % PAGE_TOKENS
        self._metrics.compressed(kept, dynamic.numel() - num_dynamic, num_dynamic, seconds)
        self._heads.record(
            grant.request_id,
            grant.plan,
            seconds,
            HeadTables(
                figure=figure.tolist(),
                dynamic=dynamic.bool().tolist(),
                recalled=recalled.bool().tolist(),
                pages=pages.int().tolist(),
                kept_tokens=lengths.int().tolist(),
            ),
        )
        if before is not None:
            self._chunks_before[grant.request_id] = before

    def _count_end(self, counters: Tensor, request_id: str) -> None:
        before = self._chunks_before.pop(request_id, None)
        if before is not None:
            hit, recalled = (counters - before).tolist()
            self._heads.end(request_id, hit, recalled)

    def _count_pruned(self, reason: FallbackReason, num_heads: int) -> None:
        """Counts heads that were found dynamic and yet pruned."""
        if num_heads > 0:
            self._metrics.heads_pruned(reason, num_heads)

    def _count_chunks(self, recall: RecallState) -> None:
        """One copy of the device's counters is under way at a time; what it brings counts a step later."""
        if not _is_here(self._counters_here):
            return
        self._count_copied()
        self._counters.copy_(recall.work.counters, non_blocking=True)
        self._counters_here = self._mark()
        if not self._on_gpu:
            self._count_copied()

    def _count_copied(self) -> None:
        hit, recalled = self._counters.sum(0).tolist()
        if (hit, recalled) != self._counted:
            self._metrics.chunks(hit - self._counted[0], recalled - self._counted[1])
            self._counted = (hit, recalled)


def _is_here(event: torch.cuda.Event | None) -> bool:
    """Whether a copy is done."""
    return event is None or event.query()
