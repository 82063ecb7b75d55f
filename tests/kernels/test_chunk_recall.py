"""Recall and decode together, step by step: the answer is the attention to the chosen chunks and the tail."""

import math
import random

import pytest
import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.chunk_recall import chunk_recall
from hybridkv_kernels.extent_decode import extent_decode
from hybridkv_kernels.recall.layout import LandmarkKind
from hybridkv_kernels.recall.reading import arena_pages
from hybridkv_kernels.recall_decode import RecallPlan, recall_decode
from kernel_cases import assert_close, strided_heads
from landmark_cases import RecallCase, recall_case
from torch import Tensor

PROMPTS = [16 * 21 + 5, 16 * 12, 16 * 17 + 15]
RECALLING = [[[True, False]], [[True, True]], [[False, True]]]
GROUP, HEAD_SIZE = 2, 32
TAIL_PAGES = 6
STEPS = 64


class Generation:
    """Requests that decode token by token over one case, and what dense attention would see."""

    def __init__(self, case: RecallCase) -> None:
        self.case = case
        self.heads = case.decode.num_kv_heads
        self.lengths = case.recall.prompt_len.tolist()
        self.tails: list[list[Tensor]] = [[] for _ in self.lengths]
        for slot, tokens in enumerate(self.lengths):
            for position in range(tokens // PAGE * PAGE, tokens):
                self.write(slot, position)

    def write(self, slot: int, position: int) -> None:
        """A new token's keys and values, at random, into its page of the tail."""
        pool = self.case.pool
        both = torch.randn(self.heads, 2 * HEAD_SIZE, device=pool.device).to(pool.dtype)
        block = int(self.case.decode.blocks[slot, position // PAGE])
        pool[block * self.heads : (block + 1) * self.heads, position % PAGE] = both
        self.tails[slot].append(both)

    def grow(self, slots: list[int]) -> tuple[Tensor, Tensor]:
        """One more token for each of `slots`; `row_slot` and `row_len`, with a padding row first."""
        for slot in slots:
            self.write(slot, self.lengths[slot])
            self.lengths[slot] += 1
        rows = [(-1, 7), *((slot, self.lengths[slot]) for slot in slots)]
        row_slot, row_len = torch.tensor(rows, dtype=torch.int32, device=self.case.pool.device).T.contiguous()
        return row_slot, row_len

    def recalls(self, slot: int, head: int) -> bool:
        return int(self.case.recall.chunk_first[slot, 0, head]) >= 0

    def hot(self, slot: int, head: int) -> list[int]:
        """Chunks in the head's hot slots, found by their contents: whole pages of the prompt."""
        case = self.case
        first, tokens = case.decode.extents[slot, 0, head].tolist()
        logical = first + torch.arange(tokens // PAGE, device=case.pool.device)
        held = case.pool[arena_pages(case.decode.arena[slot], logical, self.heads)]
        both = torch.cat((case.keys[slot], case.values[slot]), dim=-1)[0, head].view(-1, PAGE, 2 * HEAD_SIZE)
        chunks = [(both == page).all(-1).all(-1).nonzero().flatten().tolist() for page in held]
        assert all(len(found) == 1 for found in chunks)
        flat = [found[0] for found in chunks]
        assert len(set(flat)) == len(flat)
        return flat

    def attention(self, slot: int, head: int, query: Tensor, chunks: list[int]) -> Tensor:
        """Dense attention of one query head to these chunks and the tail, in fp64."""
        tail = torch.stack(self.tails[slot])[:, head]
        both = torch.cat((self.case.keys[slot], self.case.values[slot]), dim=-1)[0, head]
        chosen = both.view(-1, PAGE, 2 * HEAD_SIZE)[chunks].flatten(0, 1)
        k, v = torch.cat((chosen, tail)).double().chunk(2, dim=-1)
        return (k @ query.double() * HEAD_SIZE**-0.5).softmax(0) @ v

    def check(self, row_slot: Tensor, query: Tensor, out: Tensor, *, selects: bool) -> None:
        """Every head: its chunks are the best ones by definition, its answer is the attention to them."""
        for row, slot in enumerate(row_slot.tolist()):
            if slot < 0:
                assert not out[row].any()
                continue
            for head in range(self.heads):
                chunks = self.hot(slot, head) if self.recalls(slot, head) else []
                members = query[row, head * GROUP : (head + 1) * GROUP]
                if chunks and selects:
                    self.check_choice(slot, head, members, chunks)
                expected = torch.stack([self.attention(slot, head, q, chunks) for q in members])
                assert_close(out[row, head * GROUP : (head + 1) * GROUP], expected, torch.float32)

    def check_choice(self, slot: int, head: int, members: Tensor, chunks: list[int]) -> None:
        weights = [self.case.expected(slot, 0, head, q, HEAD_SIZE**-0.5) for q in members]
        normal = [weight - torch.logsumexp(weight * math.log(2), 0) / math.log(2) for weight in weights]
        best = torch.stack(normal).amax(0)
        others = [chunk for chunk in range(len(best)) if chunk not in chunks]
        if others:
            assert float(best[chunks].min()) >= float(best[others].max()) - 2e-3


def generate(
    case: RecallCase,
    backend: Backend,
    *,
    steps: int = STEPS,
    interval: int = 1,
    tier: str = "host",
    early: bool = False,
    replay: bool = False,
) -> list[Tensor]:
    """Decodes for `steps` steps with random queries, a random part of the requests at each.

    With `replay` every step has all rows, and on a GPU all but the first are replays of one CUDA graph.
    """
    dice = random.Random(4)
    generation = Generation(case)
    rows, heads, device = len(PROMPTS) + 1, generation.heads, case.pool.device
    work = case.work(rows, GROUP)
    plan = None
    if backend == "triton":
        plan = RecallPlan.create(rows, 1, heads, heads * GROUP, case.landmarks.layout, device)
    row_slot = torch.full((rows,), -1, dtype=torch.int32, device=device)
    row_len = torch.zeros_like(row_slot)
    query = strided_heads(rows, heads * GROUP, HEAD_SIZE, case.pool.dtype, device)
    out = torch.empty_like(query)

    def decode(n: int) -> None:
        if plan is not None:
            plan.update(row_slot[:n], row_len[:n], case.decode, case.recall, interval)
        # A launch that writes nothing of what an early one reads ahead.
        out.fill_(math.nan)
        recall_decode(
            query[:n],
            case.pool,
            out[:n],
            case.store if tier == "host" else None,
            row_slot[:n],
            row_len[:n],
            case.decode,
            case.recall,
            0,
            HEAD_SIZE**-0.5,
            case.landmarks,
            work,
            plan,
            interval=interval,
            backend=backend,
            early=early,
        )

    graph: torch.cuda.CUDAGraph | None = None
    answers = []
    for step in range(steps):
        # With an interval all requests must go in step for `selects` to be the same for all rows.
        slots = [slot for slot in range(len(PROMPTS)) if interval > 1 or dice.random() < 0.8]
        dice.shuffle(slots)
        slots_of_rows, lengths = generation.grow(slots)
        used = len(slots_of_rows)
        row_slot.fill_(-1)
        row_slot[:used], row_len[:used] = slots_of_rows, lengths
        query.normal_()
        if graph is not None:
            graph.replay()
        else:
            decode(rows if replay else used)
        if replay and graph is None and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                decode(rows)
        answers.append(out[: rows if replay else used].clone())
        generation.check(row_slot[: len(answers[-1])], query, answers[-1], selects=step % interval == 0)
    return answers


def test_each_plan_attends_its_own_heads(device: torch.device) -> None:
    """So neither waits for the other; padding goes with the heads that recall nothing."""
    case = make_case("mean", 3, device)
    heads, generation = case.decode.num_kv_heads, Generation(case)
    row_slot, row_len = generation.grow([0, 1, 2])
    query = torch.randn(4, heads * GROUP, HEAD_SIZE, device=device)
    plan = RecallPlan.create(4, 1, heads, heads * GROUP, case.landmarks.layout, device)
    plan.update(row_slot, row_len, case.decode, case.recall)
    recalls = torch.tensor(
        [[False, False], *([generation.recalls(slot, h) for h in range(2)] for slot in range(3))]
    )
    for part, wanted in ((plan.static, ~recalls), (plan.recalling, recalls)):
        out = torch.full_like(query, math.nan)
        extent_decode(query, case.pool, out, row_slot, row_len, case.decode, 0, 1.0, part, backend="triton")
        written = ~out.view(4, heads, -1).isnan()
        assert torch.equal(written.all(-1).cpu(), wanted)
        assert torch.equal(written.any(-1).cpu(), wanted)
    with pytest.raises(ValueError, match="plan of recalling heads needs the recall tables"):
        plan.recalling.update(row_slot, row_len, case.decode)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_needs_no_chunks_is_done_between_scores_and_choice(
    backend: Backend, device: torch.device
) -> None:
    case = make_case("mean", 3, device)
    row_slot, row_len = Generation(case).grow([1])
    work = case.work(len(PROMPTS), GROUP)
    work.num_missing.fill_(-1)
    seen = []

    def meanwhile() -> None:
        # Slot 1 is row 1, behind the padding, and both of its heads recall.
        chunks = PROMPTS[1] // PAGE
        assert not work.log_weight[2:4, :, :chunks].isnan().any()
        seen.append(work.num_missing.tolist())

    query = torch.randn(2, case.decode.num_kv_heads * GROUP, HEAD_SIZE, device=device)
    chunk_recall(
        query,
        case.pool,
        case.store,
        row_slot,
        row_len,
        case.decode,
        case.recall,
        0,
        1.0,
        case.landmarks,
        work,
        case.plan(row_slot, row_len),
        backend=backend,
        meanwhile=meanwhile,
    )
    assert seen == [[-1] * len(work.num_missing)]
    assert (work.num_missing[:4] >= 0).all()


def make_case(kind: LandmarkKind, hot: int, device: torch.device, prompts: list[int] = PROMPTS) -> RecallCase:
    return recall_case(
        prompts, RECALLING, kind, HEAD_SIZE, torch.float32, device, hot=hot, tail_pages=TAIL_PAGES
    )


@pytest.mark.parametrize("tier", ["host", "gpu"])
@pytest.mark.parametrize("kind", ["sketch", "sketch2", "mean", "minmax"])
def test_answers_are_the_attention_to_the_chosen_chunks(
    kind: LandmarkKind, tier: str, device: torch.device
) -> None:
    case = make_case(kind, 4, device)
    if tier == "gpu":
        case.store.fill_(math.nan)
    generate(case, "torch", tier=tier)


@pytest.mark.parametrize("kind", ["sketch", "sketch2", "minmax"])
def test_triton_answers_alike(kind: LandmarkKind, device: torch.device) -> None:
    generate(make_case(kind, 3, device), "triton", steps=12, early=True)


@pytest.mark.parametrize("tier", ["host", "gpu"])
def test_one_step_serves_all_as_a_cuda_graph_replays_it(tier: str, device: torch.device) -> None:
    generate(make_case("sketch2", 3, device), "triton", steps=8, tier=tier, early=True, replay=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_with_all_chunks_hot_the_answer_is_dense(backend: Backend, device: torch.device) -> None:
    prompts = [16 * 9 + 3, 16 * 9, 16 * 9 + 15]
    case = make_case("sketch", 9, device, prompts)
    generate(case, backend, steps=4)
    assert int(case.recall.prompt_len.min()) // PAGE == 9


def test_between_selections_the_chunks_stay(device: torch.device) -> None:
    case = make_case("sketch", 4, device)
    torch.manual_seed(1)
    generate(case, "torch", steps=13, interval=4)


def test_the_same_queries_give_the_same_bits(device: torch.device) -> None:
    answers = []
    for _ in range(2):
        torch.manual_seed(2)
        answers.append(generate(make_case("sketch", 4, device), "torch", steps=8))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
