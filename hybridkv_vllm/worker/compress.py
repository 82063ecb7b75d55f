"""What ends a prefill: score while the layers run, then choose what stays and move it into the arena."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from hybridkv_kernels import Backend
from hybridkv_kernels.compact import compact
from hybridkv_kernels.window_scores import window_scores
from torch import Tensor

from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.observe.heads import HeadsReport, HeadTables
from hybridkv_vllm.observe.metrics import WorkerMetrics
from hybridkv_vllm.observe.timing import DeviceTimer
from hybridkv_vllm.plan import PAGE_TOKENS, ArenaGrant, ceil_pages
from hybridkv_vllm.policies import PromptScores, Selection, Verdict, get_policy
from hybridkv_vllm.worker.host_tier import Reservation
from hybridkv_vllm.worker.recall import (
    NO_ROOM_FOR_LANDMARKS,
    NO_ROOM_ON_HOST,
    RecallState,
    begin_recall,
)
from hybridkv_vllm.worker.tables import RequestTables


@dataclass(frozen=True)
class Compression:
    """What became of one prompt, as far as the host knows it.

    Attributes:
        grant: what the scheduler decided about the prompt.
        selection: what stays, on the device.
        reservation: host memory for the chunks of the heads that recall; None without a host tier.
        recalls: whether dynamic heads ought to recall, so that those that do not are counted.
        store_end: as `RecallBeginning` says; None where no head could recall.
        timer: the device's time for it.
        chunks_before: `[2]` int64 on the device, what its slot's counters held; None where none can recall.
    """

    grant: ArenaGrant
    selection: Selection
    reservation: Reservation | None
    recalls: bool
    store_end: Tensor | None
    timer: DeviceTimer
    chunks_before: Tensor | None


class PrefillEnd:
    """One request's compression, alive during the forward that computes its prompt's last token.

    Everything runs in stream order on the device; nothing is read back before the step has ended.

    Attributes:
        plan: what the scheduler decided about the prompt.
    """

    def __init__(
        self,
        tables: RequestTables,
        options: ServerOptions,
        slot: int,
        grant: ArenaGrant,
        last_query: int,
        backend: Backend,
    ) -> None:
        """Allocates the scores, and reserves host memory for heads that will recall.

        Args:
            last_query: the row in the step's query tensor just after the prompt's last token.
            backend: kernel backend, `triton` or `torch`.
        """
        shape, device, plan = tables.shape, tables.pool.device, grant.plan
        self._tables = tables
        self._options = options
        self._policy = get_policy(options.policy)
        self._slot = slot
        self._grant = grant
        self.plan = plan
        self._window = slice(last_query - plan.window, last_query)
        self._backend = backend
        size = (shape.num_layers, shape.num_kv_heads, plan.num_tokens)
        self._mass = torch.empty(size, dtype=torch.float32, device=device)
        self._votes = torch.empty_like(self._mass)
        self._is_visual = torch.zeros(plan.num_tokens, dtype=torch.bool, device=device)
        for start, end in plan.visual_spans:
            self._is_visual[start:end] = True
        self._verdicts: list[Verdict] = []
        self._recall = begin_recall(tables.recall, shape, slot, plan)
        self._timer = DeviceTimer(device)

    def score(self, query: Tensor, layer: int, scale: float) -> None:
        """Scores one layer's keys from the observation window and judges its heads.

        Chunks of dynamic heads are then on their way to the host while later layers compute. `query` is the
        step's `[N, Hq, D]`.
        """
        self._timer.mark()
        blocks = self._tables.decode.blocks[self._slot]
        window_scores(
            query[self._window],
            self._tables.pool,
            blocks[: ceil_pages(self.plan.num_tokens)],
            self.plan.num_tokens,
            layer,
            self._tables.shape.num_layers,
            scale,
            self._mass[layer],
            self._votes[layer],
            backend=self._backend,
        )
        options, profile = self._options.policy_options(), self._tables.profile
        if profile is not None:
            options = replace(options, profile=profile[layer : layer + 1])
        verdict = self._policy.classify(self._scores(slice(layer, layer + 1)), options)
        self._verdicts.append(verdict)
        if self._recall is not None:
            pool = self._tables.pool
            self._recall.take_layer(layer, verdict.dynamic, pool, blocks[: self.plan.num_full_blocks])
        self._timer.mark()

    def _scores(self, layers: slice) -> PromptScores:
        return PromptScores(
            mass=self._mass[layers],
            votes=self._votes[layers],
            is_visual=self._is_visual,
            window=self.plan.window,
            group=self._tables.shape.group,
            compressible=self.plan.num_full_blocks * PAGE_TOKENS,
        )

    def compress(self) -> Compression:
        """Chooses what stays and moves it into the arena; after the last layer wrote its keys and values."""
        self._timer.mark()
        plan, tables, shape, recall = self.plan, self._tables, self._tables.shape, self._recall
        selection = self._policy.select(
            self._scores(slice(None)),
            Verdict.join(self._verdicts),
            plan.arena_size * shape.num_layers * shape.num_kv_heads,
            self._options.policy_options(),
            None if recall is None else recall.recall(),
        )
        extents = torch.stack((selection.first_page, selection.lengths), dim=-1).to(torch.int32)
        dest = selection.dest()
        blocks = tables.decode.blocks[self._slot, : plan.num_full_blocks]
        arena = tables.decode.arena[self._slot, : plan.arena_size]
        compact(tables.pool, dest, blocks, arena, extents, backend=self._backend)
        if recall is not None:
            recall.finish(selection.recalled, tables.pool, blocks, arena, extents, dest)
        tables.decode.extents[self._slot].copy_(extents)
        tables.decode.tail_start[self._slot].fill_(plan.num_full_blocks * PAGE_TOKENS)
        self._timer.mark()
        return Compression(
            grant=self._grant,
            selection=selection,
            reservation=None if recall is None else recall.reservation,
            recalls=tables.recall is not None and plan.recalls,
            store_end=None if recall is None else recall.store_end,
            timer=self._timer,
            chunks_before=None if recall is None else recall.chunks_so_far(),
        )


class CompressionLog:
    """Counts what compressions and recalls did once the figures are on the host; it never waits for them."""

    def __init__(
        self, metrics: WorkerMetrics, heads: HeadsReport, recall: RecallState | None, device: torch.device
    ) -> None:
        self._metrics = metrics
        self._heads = heads
        self._recall = recall
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event | None, Tensor, Tensor | None, Compression]] = deque()
        self._ending: deque[tuple[torch.cuda.Event | None, Tensor, str]] = deque()
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
        self._pending.append((self._mark(), here, before, compression))

    def end(self, request_id: str, slot: int) -> None:
        """Starts the copy of a request's counters, after its last step and before its slot is another's."""
        if self._recall is not None:
            counters = self._to_host(self._recall.work.counters[slot])
            self._ending.append((self._mark(), counters, request_id))

    def collect(self) -> None:
        """Counts what has arrived; called between steps."""
        # Looked at first: what is here of a request's end, its compression is here before.
        num_ended = sum(1 for _ in takewhile(lambda ending: _is_here(ending[0]), self._ending))
        while self._pending and _is_here(self._pending[0][0]):
            _, figures, before, compression = self._pending.popleft()
            self._count_compression(figures, compression)
            if before is not None:
                self._chunks_before[compression.grant.request_id] = before
        for _ in range(num_ended):
            _, counters, request_id = self._ending.popleft()
            before = self._chunks_before.pop(request_id, None)
            if before is not None:
                hit, recalled = (counters - before).tolist()
                self._heads.end(request_id, hit, recalled)
        if self._recall is not None:
            self._count_chunks(self._recall)
            if self._recall.tier is not None:
                self._metrics.set_host_bytes(self._recall.tier.bytes_held)

    def _count_compression(self, figures: Tensor, compression: Compression) -> None:
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

    def _count_pruned(self, reason: str, num_heads: int) -> None:
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
