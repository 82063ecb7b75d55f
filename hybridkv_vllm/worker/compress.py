"""What ends a prefill: score while the layers run, then choose what stays and move it into the arena."""

from __future__ import annotations

from collections import deque

import torch
from hybridkv_kernels import Backend
from hybridkv_kernels.compact import compact
from hybridkv_kernels.window_scores import window_scores

from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.observe.metrics import WorkerMetrics
from hybridkv_vllm.plan import PAGE_TOKENS, PromptPlan, ceil_pages
from hybridkv_vllm.policies import PromptScores, Selection, get_policy
from hybridkv_vllm.worker.tables import RequestTables


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
        plan: PromptPlan,
        last_query: int,
        backend: Backend,
    ) -> None:
        """Allocates the scores.

        Args:
            last_query: the row in the step's query tensor just after the prompt's last token.
            backend: kernel backend, `triton` or `torch`.
        """
        shape = tables.shape
        self._tables = tables
        self._options = options
        self._slot = slot
        self.plan = plan
        self._window = slice(last_query - plan.window, last_query)
        self._backend = backend
        size = (shape.num_layers, shape.num_kv_heads, plan.num_tokens)
        self._mass = torch.empty(size, dtype=torch.float32, device=tables.pool.device)
        self._votes = torch.empty_like(self._mass)

    def score(self, query: torch.Tensor, layer: int, scale: float) -> None:
        """Scores one layer's keys from the observation window; `query` is the step's `[N, Hq, D]`."""
        window_scores(
            query[self._window],
            self._tables.pool,
            self._tables.decode.blocks[self._slot, : ceil_pages(self.plan.num_tokens)],
            self.plan.num_tokens,
            layer,
            self._tables.shape.num_layers,
            scale,
            self._mass[layer],
            self._votes[layer],
            backend=self._backend,
        )

    def compress(self) -> Selection:
        """Chooses what stays and moves it into the arena; after the last layer wrote its keys and values."""
        plan, tables, shape = self.plan, self._tables, self._tables.shape
        device = tables.pool.device
        is_visual = torch.zeros(plan.num_tokens, dtype=torch.bool, device=device)
        for start, end in plan.visual_spans:
            is_visual[start:end] = True
        scores = PromptScores(
            mass=self._mass,
            votes=self._votes,
            is_visual=is_visual,
            window=plan.window,
            group=shape.group,
            compressible=plan.num_full_blocks * PAGE_TOKENS,
        )
        pages = plan.arena_size * shape.num_layers * shape.num_kv_heads
        selection = get_policy(self._options.policy).select(scores, pages, self._options.policy_options())
        extents = torch.stack((selection.first_page, selection.lengths), dim=-1).to(torch.int32)
        compact(
            tables.pool,
            selection.dest(),
            tables.decode.blocks[self._slot, : plan.num_full_blocks],
            tables.decode.arena[self._slot, : plan.arena_size],
            extents,
            backend=self._backend,
        )
        tables.decode.extents[self._slot].copy_(extents)
        tables.decode.tail_start[self._slot].fill_(plan.num_full_blocks * PAGE_TOKENS)
        return selection


class CompressionLog:
    """Counts what compressions did once their figures have arrived on the host; it never waits for them."""

    def __init__(self, metrics: WorkerMetrics, device: torch.device) -> None:
        self._metrics = metrics
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event | None, torch.Tensor, PromptPlan, int]] = deque()

    def record(self, selection: Selection, plan: PromptPlan) -> None:
        """Starts the copy of a compression's figures: dynamic heads, mean tokens in the arena."""
        figures = torch.stack((selection.dynamic.float().sum(), selection.lengths.float().mean()))
        event = None
        if self._on_gpu:
            figures = torch.empty_like(figures, device="cpu", pin_memory=True).copy_(
                figures, non_blocking=True
            )
            event = torch.cuda.Event()
            event.record()
        self._pending.append((event, figures, plan, selection.dynamic.numel()))

    def collect(self) -> None:
        """Counts the compressions whose figures are here; called between steps."""
        while self._pending and (self._pending[0][0] is None or self._pending[0][0].query()):
            _, figures, plan, num_heads = self._pending.popleft()
            num_dynamic, in_arena = figures.tolist()
            # The prompt's partial last block stays in the tail, for every head.
            kept = in_arena + plan.num_tokens % PAGE_TOKENS
            self._metrics.compressed(kept, num_heads - int(num_dynamic), int(num_dynamic))
