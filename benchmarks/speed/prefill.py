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
from speed.prepared import Prepared, relative_error

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


@dataclass(frozen=True)
class Ending:
    """What the end of a prefill leaves behind, to compare.

    Attributes:
        extents: `[layers, KV_HEADS, 2]` int32, first page and tokens of each head.
        chunk_first: `[layers, KV_HEADS]` int32, which heads recall, and from where; -1 for others.
        kept: fingerprints of each head's rows in the arena, `[length]` int64.
        weights: what the landmarks say, `[Hr, group, chunks]` fp32 of the Hr heads that recall in all layers.
        stored: `[Hr, chunks]` int64, fingerprints of their pages on the host; none with tier `gpu`.
    """

    extents: Tensor
    chunk_first: Tensor
    kept: list[Tensor]
    weights: Tensor
    stored: Tensor

    def error(self, expected: Ending) -> float:
        """The largest of the landmarks' and of the shares of the heads' tokens that are others; or infinite.

        Tokens whose scores are all but equal may take each other's place, and one chunk another's.
        """
        exact = ("extents", "chunk_first", "stored")
        if not all(torch.equal(getattr(self, name), getattr(expected, name)) for name in exact):
            return float("inf")
        errors = [relative_error(self.weights, expected.weights)]
        recalls = (self.chunk_first >= 0).flatten().tolist()
        for found, wanted, chunks in zip(self.kept, expected.kept, recalls, strict=True):
            strange = max(int((~torch.isin(*pair)).sum()) for pair in ((found, wanted), (wanted, found)))
            errors.append(max(0, strange - chunks * PAGE) / max(1, len(wanted)))
        return max(errors)


def _fingerprints(rows: Tensor) -> Tensor:
    """`[N]` int64, a number of each of N rows, which rows that differ share by chance only."""
    words = rows.flatten(1).view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, words.shape[1:], generator=generator).to(words.device)
    return (words * (2 * factors + 1)).sum(dim=-1)


def _store_pages(prompt: Prompt, chunk_first: Tensor) -> Tensor:
    """`[Hr * chunks]` int64 pages of the host tier, of the heads of one layer that recall."""
    chunks = torch.arange(prompt.case.chunks, device=chunk_first.device)
    logical = chunk_first[chunk_first >= 0, None] + chunks
    return store_pages(prompt.recall.tables.store_blocks[0], logical.flatten())


def _weights(prompt: Prompt, layer: int) -> Tensor:
    """What the landmarks say of one layer's chunks, as `Ending.weights`: single bits of them may differ."""
    recall = prompt.recall
    row = torch.zeros(1, dtype=torch.int32, device=prompt.pool.device)
    chunk_score(
        prompt.query[layer, -1:],
        prompt.pool,
        row,
        row + prompt.case.prompt + 1,
        prompt.tables.decode,
        recall.tables,
        layer,
        SCALE,
        recall.landmarks,
        recall.work,
        None,
        backend="torch",
    )
    weights = recall.work.log_weight[recall.tables.chunk_first[0, layer] >= 0]
    return (weights - weights.amax(-1, keepdim=True)).exp2()


def _ending(prompt: Prompt) -> Ending:
    """As the last compression left it."""
    extents = prompt.tables.decode.extents[0].clone()
    kept = [_fingerprints(rows) for rows in prompt.kept(extents)]
    empty = torch.empty(0, prompt.case.chunks, device=prompt.pool.device)
    if prompt.tables.recall is None:
        first = torch.full_like(extents[..., 0], -1)
        return Ending(extents, first, kept, empty, empty)
    first = prompt.recall.tables.chunk_first[0].clone()
    weights = torch.cat([_weights(prompt, layer) for layer in range(prompt.layers)])
    if prompt.recall.tier is None:
        return Ending(extents, first, kept, weights, empty)
    store = prompt.recall.tier.store
    stored = [_fingerprints(store[_store_pages(prompt, of_layer)]) for of_layer in first]
    return Ending(extents, first, kept, weights, torch.cat(stored).view(-1, prompt.case.chunks))


def prefill_end(prompt: Prompt, backend: str) -> Prepared:
    """All layers' end of a prefill: score, classify, choose, move, and send to the host what recalls.

    In a server the copies to the host hide behind the layers that follow; here they do not.
    """
    recall = prompt.tables.recall

    def poison() -> None:
        prompt.spoil_arena()
        prompt.tables.decode.extents[0].zero_()
        if recall is not None and recall.tier is not None:
            recall.tier.store.fill_(torch.nan)
        # The last run's scores are not to be found in the memory that the next one allocates for its own.
        size = (prompt.layers, KV_HEADS, prompt.case.prompt)
        spoilt = [torch.full(size, torch.nan, device=prompt.pool.device) for _ in ("mass", "votes")]
        del spoilt

    num_bytes = prompt.layers * prompt.key_bytes + prompt.kept_bytes
    if recall is not None and recall.tier is not None:
        num_bytes += prompt.recalling * 2 * prompt.key_bytes // KV_HEADS
    return Prepared(
        lambda: _compress(prompt, cast("Backend", backend)),
        lambda: _ending(prompt),
        num_bytes,
        poison,
        eager=True,
        error=Ending.error,
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

    return Prepared(run, mass.clone, prompt.key_bytes, lambda: mass.fill_(torch.nan))


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

    num_bytes = prompt.recalling * prompt.key_bytes // KV_HEADS
    return Prepared(run, lambda: _weights(prompt, 0), num_bytes, prompt.spoil_arena)


def offload(prompt: Prompt, backend: str) -> Prepared:
    """One layer's chunks of heads that recall, to the host.

    Raises:
        CaseError: heads recall from the GPU.
    """
    recall, first = prompt.recall, prompt.chunk_first[0]
    if recall.tier is None:
        raise CaseError(f"{prompt.case} has no chunks on the host")
    store, blocks = recall.tier.store, recall.tables.store_blocks[0]
    pages = _store_pages(prompt, first)

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
