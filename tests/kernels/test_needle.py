"""A needle that moves at each step: sketches find it, means miss many, pruning by the window loses it."""

from typing import get_args

import pytest
import torch
from hybridkv_kernels import PAGE
from hybridkv_kernels.chunk_recall import chunk_recall
from hybridkv_kernels.recall.landmarks import Rope
from hybridkv_kernels.recall.layout import LandmarkKind
from hybridkv_kernels.recall.reading import arena_pages
from hybridkv_kernels.window_scores import window_scores
from landmark_cases import RecallCase, make_rope, picture_positions, recall_case
from torch import Tensor

TOKENS, HEAD_SIZE = 4096, 128
CHUNKS = TOKENS // PAGE
HOT = CHUNKS // 16  # 6.25%
STEPS = 64
WINDOW = 64
# Size of the bias of every channel, and of four outlier channels, like the ones of Qwen2.5's keys.
BIASES = {"plain keys": (0.0, 0.0), "biased keys with outlier channels": (1.0, 20.0)}


def biased_keys(bias: float, outlier: float, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys after the rope [T, D], and their part that tells tokens apart."""
    content = torch.randn(TOKENS, HEAD_SIZE)
    offset = torch.randn(HEAD_SIZE) * bias
    offset[torch.randperm(HEAD_SIZE)[:4]] = outlier
    turned = rope.rotate(content, positions)
    return turned + rope.rotate(offset[None], positions), turned


def hot_chunks(case: RecallCase) -> set[int]:
    """The chunks that lie in the hot slots, found by their keys alone."""
    first = int(case.decode.extents[0, 0, 0, 0])
    pages = arena_pages(case.decode.arena[0], first + torch.arange(HOT), 1)
    held = case.pool[pages][:, 0, :HEAD_SIZE]
    first_keys = case.keys[0][0, 0].view(CHUNKS, PAGE, HEAD_SIZE)[:, 0]
    return set((held[:, None] == first_keys).all(-1).nonzero()[:, 1].tolist())


def needles(keys: Tensor, turned: Tensor) -> tuple[list[Tensor], list[int]]:
    """Queries that each look for another token, and the token that gets most of their exact attention."""
    queries = [
        1.3 * turned[token] + torch.randn(HEAD_SIZE) for token in torch.randperm(TOKENS)[:STEPS].tolist()
    ]
    return queries, [int((keys.double() @ query.double()).argmax()) for query in queries]


def recalled(kind: LandmarkKind, keys: Tensor, rope: Rope, queries: list[Tensor], needed: list[int]) -> float:
    """Share of the steps at which the needed token's chunk was made hot, of 6.25% of the chunks."""
    case = recall_case(
        [TOKENS],
        [[[True]]],
        kind,
        HEAD_SIZE,
        torch.float32,
        torch.device("cpu"),
        rope=rope,
        hot=HOT,
        keys=[keys[None, None]],
    )
    work = case.work(1, 1)
    found = 0
    for step, (query, token) in enumerate(zip(queries, needed, strict=True)):
        slot = torch.zeros(1, dtype=torch.int32)
        length = torch.tensor([TOKENS + 1 + step], dtype=torch.int32)
        chunk_recall(
            query[None, None],
            case.pool,
            case.store,
            slot,
            length,
            case.decode,
            case.recall,
            0,
            HEAD_SIZE**-0.5,
            case.landmarks,
            work,
            backend="torch",
        )
        held = hot_chunks(case)
        assert len(held) == HOT
        found += token // PAGE in held
    return found / len(queries)


def kept_by_pruning(keys: Tensor, needed: list[int], window: Tensor, share: float) -> float:
    """Share of the needed tokens that are kept: the window, then the best scores (max-pool of 7)."""
    pool = torch.cat((keys, torch.zeros_like(keys)), dim=-1).view(CHUNKS, PAGE, 2 * HEAD_SIZE)
    mass, votes = torch.empty(2, 1, TOKENS)
    blocks = torch.arange(CHUNKS, dtype=torch.int32)
    window_scores(window[:, None], pool, blocks, TOKENS, 0, 1, HEAD_SIZE**-0.5, mass, votes, backend="torch")
    scores = torch.nn.functional.max_pool1d(mass[:, : TOKENS - WINDOW], 7, 1, 3)[0]
    kept = {*scores.topk(int(TOKENS * share) - WINDOW).indices.tolist(), *range(TOKENS - WINDOW, TOKENS)}
    return sum(token in kept for token in needed) / len(needed)


@pytest.mark.parametrize("biases", BIASES.values(), ids=BIASES.keys())
def test_a_moving_needle(biases: tuple[float, float]) -> None:
    device = torch.device("cpu")
    rope = make_rope(HEAD_SIZE, torch.float32, device, positions=TOKENS)
    keys, turned = biased_keys(*biases, rope, picture_positions(TOKENS, 3, device))
    queries, needed = needles(keys, turned)
    assert len({token // PAGE for token in needed}) > STEPS * 0.75, "the needle must move"
    window = torch.randn(WINDOW, HEAD_SIZE)
    found = {kind: recalled(kind, keys, rope, queries, needed) for kind in get_args(LandmarkKind)}
    found["pruning, twice the budget"] = kept_by_pruning(keys, needed, window, 2 / 16)
    print({name: round(share, 3) for name, share in found.items()})
    assert found["sketch2"] >= found["sketch"] >= 0.99
    assert found["mean"] <= 0.9
    assert found["pruning, twice the budget"] <= 0.5
