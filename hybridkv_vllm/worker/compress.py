"""What ends a prefill: score while the layers run, then choose what stays and move it into the arena."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from hybridkv_kernels import Backend
from hybridkv_kernels.compact import compact
from hybridkv_kernels.window_scores import window_scores
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.observe.timing import DeviceTimer
from hybridkv_vllm.plan import PAGE_TOKENS, ArenaGrant, ceil_pages
from hybridkv_vllm.policies import PromptScores, Selection, Verdict, get_policy
from hybridkv_vllm.worker.host_tier import Reservation
from hybridkv_vllm.worker.recall import begin_recall
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
        query_end: int,
        backend: Backend,
    ) -> None:
        """Allocates the scores, and reserves host memory for heads that will recall.

        Args:
            query_end: the row in the step's query tensor just after the prompt's last token.
            backend: kernel backend, `triton` or `torch`.
        """
        shape, device, plan = tables.shape, tables.pool.device, grant.plan
        self._tables = tables
        self._policy_options = options.policy_options()
        self._policy = get_policy(options.policy)
        self._slot = slot
        self._grant = grant
        self.plan = plan
        self._window = slice(query_end - plan.window, query_end)
        self._backend = backend
        size = (shape.num_layers, shape.num_kv_heads, plan.num_tokens)
        self._mass = torch.empty(size, dtype=torch.float32, device=device)
        self._votes = torch.empty_like(self._mass)
        # On the host: each frame of a video can be a span of its own.
        is_visual = np.zeros(plan.num_tokens, dtype=np.bool_)
        for start, end in plan.visual_spans:
            is_visual[start:end] = True
        self._is_visual = async_tensor_h2d(is_visual, device=device)
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
        options, profile = self._policy_options, self._tables.profile
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
            self._policy_options,
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
