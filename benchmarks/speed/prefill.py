"""What ends one prompt's prefill, at a size: the worker's own compression, and the parts of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from hybridkv_kernels import PAGE
from hybridkv_kernels.chunk_offload import chunk_offload
from hybridkv_kernels.chunk_score import chunk_score
from hybridkv_kernels.compact import compact
from hybridkv_kernels.landmark_build import landmark_build
from hybridkv_kernels.pages import Backend
from hybridkv_kernels.recall.chunks import store_pages
from hybridkv_kernels.recall.landmarks import Landmarks
from hybridkv_kernels.recall.reading import arena_pages
from hybridkv_kernels.recall.tables import STORE_BLOCK
from hybridkv_kernels.window_scores import window_scores
from torch import Tensor

from speed.layer import (
    DTYPE,
    HEAD_SIZE,
    KV_HEADS,
    QUERY_HEADS,
    SCALE,
    Case,
    CaseError,
)
from speed.prepared import Prepared

if TYPE_CHECKING:
    from hybridkv_vllm.config import ServerOptions
    from hybridkv_vllm.plan import ArenaGrant
    from hybridkv_vllm.policies import Selection
    from hybridkv_vllm.worker.recall import RecallState
    from hybridkv_vllm.worker.tables import RequestTables

# Qwen2.5-VL-7B's; fewer under the interpreter, where sizes only show that the harness works.
LAYERS, LAYERS_ON_CPU = 28, 2
WINDOW = 64


@dataclass(frozen=True)
class Prompt:
    """One prompt whose keys and values are in its ordinary blocks, and the arena that it is moved to.

    Attributes:
        case: its size; `dynamic` is what a profile says of the heads.
        options: the server's.
        tables: the worker's, with this prompt in slot 0.
        grant: its arena.
        query: `[layers, WINDOW, QUERY_HEADS, HEAD_SIZE]`, of the observation window.
        extents, dest: what a compression decided, as the kernels take it.
        chunk_first: `[layers, KV_HEADS]` int32, which heads recalled then, and from where; -1 for others.
    """

    case: Case
    options: ServerOptions
    tables: RequestTables
    grant: ArenaGrant
    query: Tensor
    extents: Tensor
    dest: Tensor
    chunk_first: Tensor

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.tables.shape.num_layers

    @property
    def pool(self) -> Tensor:
        """All pages."""
        return self.tables.pool

    @property
    def blocks(self) -> Tensor:
        """`[chunks]` int32, the prompt's blocks."""
        return self.tables.decode.blocks[0, : self.case.chunks]

    @property
    def arena(self) -> Tensor:
        """`[A]` int32, the arena's blocks."""
        return self.tables.decode.arena[0, : self.grant.plan.arena_size]

    @property
    def recall(self) -> RecallState:
        """The worker's, of heads that recall.

        Raises:
            CaseError: none does.
        """
        if self.tables.recall is None:
            raise CaseError(f"no head of {self.case} recalls")
        return self.tables.recall

    @property
    def key_bytes(self) -> int:
        """Bytes of one layer's keys."""
        return self.case.prompt * KV_HEADS * HEAD_SIZE * DTYPE.itemsize

    @property
    def kept_bytes(self) -> int:
        """Bytes of the keys and values that stay on the GPU, all layers."""
        return int(self.extents[..., 1].sum()) * 2 * HEAD_SIZE * DTYPE.itemsize

    @property
    def recalling(self) -> int:
        """Heads that recall, of all layers."""
        return int((self.chunk_first >= 0).sum())

    def copy(self) -> Prompt:
        """The same prompt in a pool of its own; tables and host memory are shared."""
        return replace(self, tables=replace(self.tables, pool=self.pool.clone()))

    def kept(self, extents: Tensor) -> list[Tensor]:
        """Each head's `[length, 2 * HEAD_SIZE]` rows in the arena, by `[layers, KV_HEADS, 2]` extents."""
        pages = self.grant.plan.arena_size * self.layers * KV_HEADS
        logical = torch.arange(pages, device=self.arena.device)
        rows = self.pool[arena_pages(self.arena, logical, self.layers * KV_HEADS)].flatten(0, 1)
        return [rows[first * PAGE : first * PAGE + n] for first, n in extents.flatten(0, 1).tolist()]

    def spoil_arena(self) -> None:
        """Leaves nothing in the arena that is a number."""
        self.pool.view(-1, self.layers * KV_HEADS, PAGE, 2 * HEAD_SIZE)[self.arena.long()] = torch.nan


def make_prompt(case: Case, device: torch.device, seed: int) -> Prompt:
    """A prompt with random keys, values and queries, half of it visual, which has been compressed once.

    Raises:
        CaseError: the budget keeps everything.
        ImportError: of vLLM, to whose worker this belongs.
    """
    from hybridkv_vllm.config import ServerOptions
    from hybridkv_vllm.plan import ArenaGrant, make_plan
    from hybridkv_vllm.worker.tables import CacheShape, RequestTables

    torch.manual_seed(seed)
    shape = CacheShape(LAYERS if device.type == "cuda" else LAYERS_ON_CPU, KV_HEADS, QUERY_HEADS, HEAD_SIZE)
    # The profile is not read from a file: the tables have it.
    values = {"budget": case.budget, "landmark": case.landmark, "window": WINDOW, "profile": Path("none")}
    tier = case.tier if case.recalling else "off"
    options = ServerOptions.model_validate(values | {"dynamic_tier": tier})
    visual = (case.prompt // 4, 3 * case.prompt // 4)
    plan = make_plan(case.prompt, [visual], case.budget, WINDOW, options.recall_tier)
    if plan.arena_size >= case.chunks:
        raise CaseError(f"{case} keeps everything; take a smaller budget")
    ids = torch.randperm(plan.arena_size + case.chunks).int()
    pages = ids.numel() * shape.num_layers * KV_HEADS
    # Figure 0 says dynamic.
    figure = (torch.arange(KV_HEADS, device=device) >= case.recalling).float()
    tables = RequestTables.create(
        shape,
        torch.randn(pages, PAGE, 2 * HEAD_SIZE, dtype=DTYPE, device=device),
        ids[plan.arena_size :].to(device)[None],
        max_rows=1,
        plan=None,
        recall=_recall_state(case, options, shape.num_layers, device) if case.recalling else None,
        profile=figure.repeat(shape.num_layers, 1),
    )
    grant = ArenaGrant("benchmark", plan, tuple(ids[: plan.arena_size].tolist()))
    tables.grant(0, grant)
    query = torch.randn(shape.num_layers, WINDOW, QUERY_HEADS, HEAD_SIZE, dtype=DTYPE, device=device)
    nothing = torch.full((shape.num_layers, KV_HEADS), -1, dtype=torch.int32, device=device)
    prompt = Prompt(case, options, tables, grant, query, nothing, nothing, nothing)
    dest = _compress(prompt, "auto").dest()
    first = nothing if tables.recall is None else tables.recall.tables.chunk_first[0].clone()
    return replace(prompt, extents=tables.decode.extents[0].clone(), dest=dest, chunk_first=first)


def _recall_state(case: Case, options: ServerOptions, layers: int, device: torch.device) -> RecallState:
    from hybridkv_vllm.worker.host_tier import HostTier
    from hybridkv_vllm.worker.recall import RecallState
    from hybridkv_vllm.worker.tables import CacheShape

    state = RecallState.create(
        CacheShape(layers, KV_HEADS, QUERY_HEADS, HEAD_SIZE),
        options,
        Landmarks.create(case.landmark, HEAD_SIZE, DTYPE, device),
        slots=1,
        max_rows=1,
        max_chunks=case.chunks,
        backend="auto",
        device=device,
    )
    if case.tier == "host":
        # Room for all heads, in whole store blocks: which of them recall is known on the device only.
        pages = layers * KV_HEADS * case.chunks + STORE_BLOCK
        state.tier = HostTier.create(pages * PAGE * 2 * HEAD_SIZE * DTYPE.itemsize, HEAD_SIZE, DTYPE, device)
    return state


def _compress(prompt: Prompt, backend: Backend) -> Selection:
    from hybridkv_vllm.worker.compress import PrefillEnd

    if prompt.tables.recall is not None:
        prompt.tables.recall.reset(0)
    end = PrefillEnd(prompt.tables, prompt.options, 0, prompt.grant, WINDOW, backend)
    for layer, query in enumerate(prompt.query):
        end.score(query, layer, SCALE)
    return end.compress().selection


def prefill_end(prompt: Prompt, backend: str) -> Prepared:
    """All layers' end of a prefill: score, classify, choose, move, and send to the host what recalls.

    In a server the copies to the host hide behind the layers that follow; here they do not.
    """
    extents = prompt.tables.decode.extents[0]

    def result() -> Tensor:
        """Each head's mean square: tokens whose scores are all but equal may take each other's place."""
        return torch.stack([rows.double().square().mean() for rows in prompt.kept(extents)])

    def poison() -> None:
        prompt.spoil_arena()
        extents.zero_()

    num_bytes = prompt.layers * prompt.key_bytes + prompt.kept_bytes
    if prompt.tables.recall is not None and prompt.recall.tier is not None:
        num_bytes += prompt.recalling * 2 * prompt.key_bytes // KV_HEADS
    return Prepared(
        lambda: _compress(prompt, cast("Backend", backend)), result, num_bytes, poison, eager=True
    )


def window(prompt: Prompt, backend: str) -> Prepared:
    """One layer's keys, scored by the observation window."""
    mass = torch.empty(KV_HEADS, prompt.case.prompt, device=prompt.pool.device)
    votes = torch.empty_like(mass)

    def run() -> None:
        window_scores(
            prompt.query[0],
            prompt.pool,
            prompt.blocks,
            prompt.case.prompt,
            0,
            prompt.layers,
            SCALE,
            mass,
            votes,
            backend=cast("Backend", backend),
        )

    return Prepared(run, lambda: mass, prompt.key_bytes, lambda: mass.fill_(torch.nan))


def move(prompt: Prompt, backend: str) -> Prepared:
    """What stays, of all heads, into the arena."""

    def run() -> None:
        compact(
            prompt.pool,
            prompt.dest,
            prompt.blocks,
            prompt.arena,
            prompt.extents,
            backend=cast("Backend", backend),
        )

    return Prepared(
        run, lambda: torch.cat(prompt.kept(prompt.extents)), prompt.kept_bytes, prompt.spoil_arena
    )


def landmarks(prompt: Prompt, backend: str) -> Prepared:
    """The landmarks of all heads that recall."""
    recall = prompt.recall
    row = torch.zeros(1, dtype=torch.int32, device=prompt.pool.device)

    def run() -> None:
        landmark_build(
            prompt.pool,
            prompt.blocks,
            prompt.arena,
            prompt.extents,
            prompt.chunk_first,
            prompt.dest,
            recall.landmarks,
            backend=cast("Backend", backend),
        )

    def result() -> Tensor:
        """What they say of the first layer's chunks: single bits may differ."""
        chunk_score(
            prompt.query[0, -1:],
            prompt.pool,
            row,
            row + prompt.case.prompt + 1,
            prompt.tables.decode,
            recall.tables,
            0,
            SCALE,
            recall.landmarks,
            recall.work,
            None,
            backend="torch",
        )
        weights = recall.work.log_weight[prompt.chunk_first[0] >= 0]
        return (weights - weights.amax(-1, keepdim=True)).exp2()

    return Prepared(run, result, prompt.recalling * prompt.key_bytes // KV_HEADS, prompt.spoil_arena)


def offload(prompt: Prompt, backend: str) -> Prepared:
    """One layer's chunks of heads that recall, to the host.

    Raises:
        CaseError: heads recall from the GPU.
    """
    recall, first = prompt.recall, prompt.chunk_first[0]
    if recall.tier is None:
        raise CaseError(f"{prompt.case} has no chunks on the host")
    store, blocks = recall.tier.store, recall.tables.store_blocks[0]
    logical = first[first >= 0, None] + torch.arange(prompt.case.chunks, device=first.device)
    pages = store_pages(blocks, logical.flatten())

    def run() -> None:
        chunk_offload(
            prompt.pool,
            store,
            prompt.blocks,
            blocks,
            first,
            0,
            prompt.layers,
            backend=cast("Backend", backend),
        )

    num_bytes = pages.numel() * store[0].nbytes
    return Prepared(run, lambda: store[pages], num_bytes, lambda: store.fill_(torch.nan))
