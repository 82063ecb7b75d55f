"""One layer's decode step at a size: a pool, requests with heads of unequal length, and what they recall."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from hybridkv_kernels import PAGE
from hybridkv_kernels.chunk_recall import chunk_recall
from hybridkv_kernels.extent_decode import DecodePlan, DecodeTables
from hybridkv_kernels.landmark_build import landmark_build
from hybridkv_kernels.pages import Backend
from hybridkv_kernels.recall.chunks import hot_slot_entries, store_pages
from hybridkv_kernels.recall.landmarks import Landmarks
from hybridkv_kernels.recall.layout import LandmarkKind
from hybridkv_kernels.recall.reading import arena_pages
from hybridkv_kernels.recall.tables import STORE_BLOCK, RecallTables
from hybridkv_kernels.recall.work import RecallWork
from hybridkv_kernels.recall_decode import RecallPlan
from torch import Tensor

# Qwen2.5-VL-7B's attention.
KV_HEADS, QUERY_HEADS, HEAD_SIZE = 4, 28, 128
DTYPE = torch.bfloat16
SCALE = HEAD_SIZE**-0.5
# Hot chunks of a recalling head, where its share of the budget is no more than its landmarks.
LEAST_HOT = 8
# Tokens generated so far, so that rows' lengths differ. With an interval over the most no row chooses again.
LEAST_GENERATED, MOST_GENERATED = 2, 16
NO_CHOICE = MOST_GENERATED
# Halvings in search of a query that misses a given share.
HALVINGS = 12


class CaseError(ValueError):
    """A size that cannot be."""


@dataclass(frozen=True)
class Case:
    """A size.

    Attributes:
        batch: requests that decode.
        prompt: tokens of each prompt, a multiple of 16.
        budget: share of the prompt's KV that stays.
        skew: pages of the longest pruned head over those of the shortest, where the prompt has as many.
        dynamic: share of the heads that recall, a multiple of one head's.
        tier: where they recall from, `gpu` or `host`.
        missed: share of the chosen chunks that are fetched in a step.
        landmark: the landmarks' kind.
    """

    batch: int
    prompt: int
    budget: float = 0.1
    skew: float = 4.0
    dynamic: float = 0.0
    tier: str = "gpu"
    missed: float = 0.03
    landmark: LandmarkKind = "sketch2"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise CaseError(f"a batch has a request at least, not {self.batch}")
        if not (0 <= self.dynamic <= 1 and float(self.dynamic * KV_HEADS).is_integer()):
            raise CaseError(
                f"of {KV_HEADS} heads no share of {self.dynamic:g} can recall; "
                f"take a multiple of {1 / KV_HEADS:g}"
            )
        if self.prompt < PAGE or self.prompt % PAGE:
            raise CaseError(f"a prompt has a multiple of {PAGE} tokens, not {self.prompt}")
        if self.tier not in ("gpu", "host"):
            raise CaseError(f"tier is gpu or host, not {self.tier!r}")

    @property
    def chunks(self) -> int:
        """Chunks, and ordinary blocks, of a prompt."""
        return self.prompt // PAGE

    @property
    def recalling(self) -> int:
        """Heads of a request that recall."""
        return round(self.dynamic * KV_HEADS)


@dataclass(frozen=True)
class Misses:
    """How a choice finds some chosen chunks missing: their entries swap with chunks that are not chosen.

    Attributes:
        hot: `[M]` int64, places in the pool, as int32, of entries of chosen chunks.
        cold: `[M]` int64, of as many others.
        slot: `[M]` int32, the hot slots of the former.
        page: `[M]` int64, these slots' pages in the pool.
    """

    hot: Tensor
    cold: Tensor
    slot: Tensor
    page: Tensor


@dataclass(frozen=True)
class Layer:
    """A decode step of one layer: rows are requests, row n in slot n.

    Attributes:
        case: its size.
        pool: `[pages, 16, 2 * HEAD_SIZE]`.
        query: `[batch, QUERY_HEADS, HEAD_SIZE]`.
        compressed: tables with each head's extent.
        ordinary: the same requests, not compressed.
        row_slot, row_len: `[batch]` int32.
        plan: for either tables; to be updated.
        recall_plan: of a step whose heads recall; likewise.
        recall, landmarks, work, store: of recalling heads; `store` is None for tier `gpu`.
        owner: what has to live as long as the store.
    """

    case: Case
    pool: Tensor
    query: Tensor
    compressed: DecodeTables
    ordinary: DecodeTables
    row_slot: Tensor
    row_len: Tensor
    plan: DecodePlan
    recall_plan: RecallPlan
    recall: RecallTables
    landmarks: Landmarks
    work: RecallWork
    store: Tensor | None
    owner: object

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one KV head."""
        return 2 * HEAD_SIZE * DTYPE.itemsize

    @property
    def compressed_bytes(self) -> int:
        """KV bytes that the step must read of compressed requests."""
        tail = (self.row_len - self.compressed.tail_start).sum() * KV_HEADS
        return int(self.compressed.extents[..., 1].sum() + tail) * self.row_bytes

    @property
    def ordinary_bytes(self) -> int:
        """KV bytes that it must read of requests that are not compressed."""
        return int(self.row_len.sum()) * KV_HEADS * self.row_bytes

    @property
    def landmark_bytes(self) -> int:
        """Bytes of the landmarks of all heads that recall."""
        pages = self.landmarks.layout.pages(self.case.chunks)
        return self.case.batch * self.case.recalling * pages * self.landmarks.layout.page_bytes

    def run_recall(self, backend: Backend, query: Tensor | None = None) -> None:
        """Scores, chooses and fetches, for the step's query or for another."""
        self.recall_plan.update(self.row_slot, self.row_len, self.compressed, self.recall)
        chunk_recall(
            self.query if query is None else query,
            self.pool,
            self.store,
            self.row_slot,
            self.row_len,
            self.compressed,
            self.recall,
            0,
            SCALE,
            self.landmarks,
            self.work,
            self.recall_plan.scores,
            interval=1,
            backend=backend,
        )

    def copy(self) -> Layer:
        """The same step with a pool and buffers of its own."""
        return replace(self, pool=self.pool.clone(), work=deepcopy(self.work))


def head_pages(case: Case, landmark_pages: int) -> tuple[list[int], int]:
    """Pages of a request's pruned heads, the longest first, and hot chunks of each that recalls.

    Raises:
        CaseError: the budget does not hold all that.
    """
    pages = max(1, round(case.budget * case.chunks)) * KV_HEADS
    hot = min(max(LEAST_HOT, pages // KV_HEADS - landmark_pages), case.chunks)
    pruned = KV_HEADS - case.recalling
    left = pages - case.recalling * (landmark_pages + hot)
    if left < pruned:
        raise CaseError(
            f"{case} leaves {left} pages to {pruned} pruned heads; take a larger budget or prompt"
        )
    weights = [case.skew ** (-head / max(1, pruned - 1)) for head in range(pruned)]
    shares = [max(1, int(left * weight / sum(weights))) for weight in weights]
    if shares:
        # What rounding leaves; a negative rest pays for pages of heads that would have had none.
        shares[0] += left - sum(shares)
    lengths, surplus = [], 0
    for share in shares:
        # What is more than the prompt goes to the next longest.
        lengths.append(min(case.chunks, share + surplus))
        surplus += share - lengths[-1]
    return lengths, hot


def make_layer(case: Case, device: torch.device, seed: int) -> Layer:
    """A step with random keys, values and queries, whose recalling heads hold what they will choose.

    Raises:
        CaseError: see `head_pages`.
        ImportError: of vLLM, which maps host memory for the device, with tier `host`.
    """
    torch.manual_seed(seed)
    landmarks = Landmarks.create(case.landmark, HEAD_SIZE, DTYPE, device)
    landmark_pages = landmarks.layout.pages(case.chunks)
    pruned, hot = head_pages(case, landmark_pages)

    extents = torch.zeros(case.batch, 1, KV_HEADS, 2, dtype=torch.int32)
    chunk_first = torch.full((case.batch, 1, KV_HEADS), -1, dtype=torch.int32)
    most_pages = 0
    for row in range(case.batch):
        used = 0
        for number in range(KV_HEADS):
            # Which heads recall, and which are long, differs from row to row.
            head = (number + row) % KV_HEADS
            if number < case.recalling:
                extents[row, 0, head] = torch.tensor((used + landmark_pages, hot * PAGE))
                chunk_first[row, 0, head] = number * case.chunks
                used += landmark_pages + hot
            else:
                pages = pruned[number - case.recalling]
                extents[row, 0, head] = torch.tensor((used, pages * PAGE - (3 * row + number) % PAGE))
                used += pages
        most_pages = max(most_pages, used)

    arena_blocks = -(-most_pages // KV_HEADS)
    per_row = arena_blocks + case.chunks + 1
    ids = torch.randperm(case.batch * per_row).int().view(case.batch, per_row).to(device)
    arena, blocks = ids[:, :arena_blocks].contiguous(), ids[:, arena_blocks:].contiguous()
    pool = torch.randn(ids.numel() * KV_HEADS, PAGE, 2 * HEAD_SIZE, dtype=DTYPE, device=device)
    prompt_len = torch.full((case.batch,), case.prompt, dtype=torch.int32, device=device)
    rows = torch.arange(case.batch, dtype=torch.int32, device=device)
    store_blocks = max(1, -(-case.recalling * case.chunks // STORE_BLOCK))
    recall = RecallTables(
        chunk_first.to(device),
        torch.arange(case.batch * store_blocks, dtype=torch.int32, device=device).view(case.batch, -1),
        prompt_len,
    )
    zeros = torch.zeros_like(extents).to(device)
    store, owner = None, None
    if case.recalling and case.tier == "host":
        store, owner = _store(case, store_blocks, device)
    layer = Layer(
        case,
        pool,
        torch.randn(case.batch, QUERY_HEADS, HEAD_SIZE, dtype=DTYPE, device=device),
        DecodeTables(extents.to(device), arena, prompt_len, blocks),
        DecodeTables(zeros, arena, torch.zeros_like(prompt_len), blocks),
        rows,
        prompt_len + LEAST_GENERATED + rows % (MOST_GENERATED - LEAST_GENERATED + 1),
        DecodePlan.create(case.batch, 1, KV_HEADS, QUERY_HEADS, HEAD_SIZE, device),
        RecallPlan.create(case.batch, 1, KV_HEADS, QUERY_HEADS, landmarks.layout, device),
        recall,
        landmarks,
        RecallWork.create(case.batch, KV_HEADS, QUERY_HEADS, landmarks, case.chunks, case.batch, device),
        store,
        owner,
    )
    _weigh_ends(layer)
    if case.recalling:
        _begin_recall(layer, hot)
    return layer


def _weigh_ends(layer: Layer) -> None:
    """Lets the newest token, and the last of each pruned head's extent, count among the many others.

    One of n tokens alike changes attention by about one part in sqrt(n): rounding would hide that it is left
    out.
    """
    heads = torch.arange(KV_HEADS, device=layer.pool.device)

    def weigh(pages: Tensor, last: Tensor, tokens: Tensor) -> None:
        factor = (tokens.float().sqrt() / 4).clamp(min=1)[..., None].to(DTYPE)
        layer.pool[pages, last, HEAD_SIZE:] *= factor

    newest = layer.row_len.long() - 1
    block = layer.compressed.blocks[layer.row_slot.long(), newest // PAGE].long()
    weigh(block[:, None] * KV_HEADS + heads, newest[:, None] % PAGE, newest[:, None])
    for row, first in enumerate(layer.recall.chunk_first[:, 0]):
        start, length = layer.compressed.extents[row, 0, first < 0].long().unbind(-1)
        last = length - 1
        weigh(arena_pages(layer.compressed.arena[row], start + last // PAGE, KV_HEADS), last % PAGE, length)


def _store(case: Case, store_blocks: int, device: torch.device) -> tuple[Tensor, object]:
    """Pages of host memory as the device sees them, and their owner."""
    from hybridkv_vllm.worker.host_tier import HostTier

    page_bytes = PAGE * 2 * HEAD_SIZE * DTYPE.itemsize
    tier = HostTier.create(case.batch * store_blocks * STORE_BLOCK * page_bytes, HEAD_SIZE, DTYPE, device)
    return tier.store, tier


def source_pages(layer: Layer, row: int, head: int) -> Tensor:
    """`[chunks]` int64 pages of a head's prompt in its ordinary blocks."""
    return layer.compressed.blocks[row, : layer.case.chunks].long() * KV_HEADS + head


def _begin_recall(layer: Layer, hot: int) -> None:
    """Writes landmarks, fills the store and the hot slots, and lets the first step choose."""
    case, device = layer.case, layer.pool.device
    for row in range(case.batch):
        dest = torch.full((1, KV_HEADS, case.prompt), -1, dtype=torch.int32, device=device)
        heads = (layer.recall.chunk_first[row, 0] >= 0).nonzero().flatten().tolist()
        for head in heads:
            source = source_pages(layer, row, head)
            dest[0, head, : hot * PAGE] = torch.arange(hot * PAGE, dtype=torch.int32, device=device)
            logical = int(layer.compressed.extents[row, 0, head, 0]) + torch.arange(hot, device=device)
            layer.pool[arena_pages(layer.compressed.arena[row], logical, KV_HEADS)] = layer.pool[source[:hot]]
            if layer.store is not None:
                at = int(layer.recall.chunk_first[row, 0, head]) + torch.arange(case.chunks, device=device)
                layer.store[store_pages(layer.recall.store_blocks[row], at)] = layer.pool[source]
        landmark_build(
            layer.pool,
            layer.compressed.blocks[row, : case.chunks].contiguous(),
            layer.compressed.arena[row],
            layer.compressed.extents[row],
            layer.recall.chunk_first[row],
            dest,
            layer.landmarks,
        )
    layer.run_recall("auto")


def find_misses(layer: Layer) -> Misses:
    """Some chosen chunks of each recalling head, at least one, and as many others; always the same."""
    entries = layer.pool.view(torch.int32).flatten()
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Tensor, ...]] = []
    for row in range(layer.case.batch):
        heads = (layer.recall.chunk_first[row, 0] >= 0).nonzero().flatten()
        layout, tables = layer.landmarks.layout, layer.compressed
        places = hot_slot_entries(row, 0, heads, layer.case.chunks, tables, layout)
        for head, place in zip(heads, places, strict=True):
            slot = entries[place]
            hot, cold = (slot >= 0).nonzero().flatten(), (slot < 0).nonzero().flatten()
            count = min(max(1, round(layer.case.missed * len(hot))), len(cold))
            chosen, other = (
                some[torch.randperm(len(some), generator=generator)[:count].to(some.device)]
                for some in (hot, cold)
            )
            logical = tables.extents[row, 0, head, 0] + slot[chosen]
            pages = arena_pages(tables.arena[row], logical, KV_HEADS)
            found.append((place[chosen], place[other], slot[chosen], pages))
    return Misses(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def query_that_misses(layer: Layer) -> tuple[Tensor, Tensor]:
    """A query that misses about the case's share of the chunks that the step's query has chosen.

    It is the step's query, a random way off. The layer is left as it was, but for the order of hot slots.

    Returns:
        The query, `[batch, QUERY_HEADS, HEAD_SIZE]`, and the pages in the pool that its chunks are fetched
        to, `[M]` int64.

    Raises:
        CaseError: no chunk is left that could be missing.
    """
    device, query = layer.pool.device, layer.query
    generator = torch.Generator(device).manual_seed(0)
    away = torch.randn(query.shape, generator=generator, dtype=DTYPE, device=device)
    recalls = layer.recall.chunk_first >= 0
    chosen = int((layer.compressed.extents[..., 1] // PAGE)[recalls].sum())
    wanted = max(1, round(layer.case.missed * chosen))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    least, most = 0.0, 1.0
    layer.run_recall("auto")
    for _ in range(HALVINGS):
        distance = (least + most) / 2
        other = query + distance * away
        layer.run_recall("auto", other)
        pages = _filled_pages(layer)
        layer.run_recall("auto")
        # The first of as many: later ones come ever nearer to where a choice is a matter of rounding.
        found.setdefault(len(pages), (other, pages))
        least, most = (least, distance) if len(pages) > wanted else (distance, most)
    found.pop(0, None)
    if not found:
        raise CaseError(f"{layer.case} has no other chunks to choose; take a smaller budget")
    return found[min(found, key=lambda missed: abs(missed - wanted))]


def _filled_pages(layer: Layer) -> Tensor:
    """`[M]` int64, the pages in the pool that the last recall fetched missing chunks to."""
    tables, pages = layer.compressed, []
    for item, missed in enumerate(layer.work.num_missing.tolist()):
        row, head = divmod(item, KV_HEADS)
        logical = tables.extents[row, 0, head, 0] + layer.work.freed[item, :missed]
        pages.append(arena_pages(tables.arena[row], logical, KV_HEADS))
    return torch.cat(pages)


def make_missing(layer: Layer, misses: Misses) -> None:
    """Lets the next choice find these chunks missing; two small launches, without a wait for the device."""
    entries = layer.pool.view(torch.int32).view(-1)
    entries.index_fill_(0, misses.hot, -1)
    entries.index_copy_(0, misses.cold, misses.slot)
