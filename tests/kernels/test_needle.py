"""A needle that moves at each step: sketches find it, means miss many, pruning by the window loses it."""

from typing import NamedTuple, get_args

import pytest
import torch
from hybridkv_kernels import PAGE
from hybridkv_kernels.chunk_recall import chunk_recall
from hybridkv_kernels.recall.layout import LandmarkKind
from hybridkv_kernels.recall.reading import arena_pages
from hybridkv_kernels.window_scores import window_scores
from landmark_cases import RecallCase, recall_case
from torch import Tensor

TOKENS, HEAD_SIZE = 4096, 128
CHUNKS = TOKENS // PAGE
HOT = CHUNKS // 16  # 6.25%
STEPS = 64
WINDOW = 64


class Bias(NamedTuple):
    """Keys' bias, and how often one and two bits must find the needle.

    Attributes:
        every: size of the bias of every channel.
        outlier: that of four channels.
        slowly: whether those are among the quarter that turns most slowly, as in real models.
        base: of the rope.
    """

    every: float
    outlier: float
    slowly: bool
    least: tuple[float, float]
    base: float = 10_000.0


BIASES = {
    "plain keys": Bias(0.0, 0.0, False, (0.99, 0.99)),
    "outlier channels that turn slowly": Bias(1.0, 20.0, True, (0.95, 0.99)),
    # 40 times as long as what tells keys apart, at the frequencies of Qwen2.5-VL.
    "very large biases": Bias(10.0, 230.0, True, (0.8, 0.99), 1e6),
    # A landmark page's mean does not hold what turns within it.
    "outlier channels that turn fast": Bias(1.0, 20.0, False, (0.6, 0.95)),
}


def picture_positions() -> Tensor:
    """M-RoPE's positions [3, T] of text, a picture 8 tokens wide, and text."""
    text = TOKENS // 4
    inside = torch.arange(TOKENS - 2 * text)
    picture = torch.stack((torch.full_like(inside, text), text + inside // 8, text + inside % 8))
    before = torch.arange(text).expand(3, -1)
    after = int(picture.max()) + 1 + before
    return torch.cat((before, picture, after), dim=1)


def rotate(vectors: Tensor, positions: Tensor, base: float) -> Tensor:
    """Vectors [T or 1, D] turned to positions [3, T], as Qwen2.5-VL does with a base of 1,000,000."""
    half = HEAD_SIZE // 2
    frequency = base ** (-torch.arange(half) / half)
    # A quarter of the frequencies for time, the rest by halves for height and width.
    axis = torch.tensor([0, 1, 2])[torch.linspace(0.5, 2.99, half).long()]
    angle = positions[axis].T * frequency
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat(
        (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1
    )


def biased_keys(bias: Bias) -> tuple[Tensor, Tensor]:
    """Keys after the rope [T, D], and their part that tells tokens apart."""
    positions = picture_positions()
    content = torch.randn(TOKENS, HEAD_SIZE)
    offset = torch.randn(HEAD_SIZE) * bias.every
    channels = torch.randperm(HEAD_SIZE)
    if bias.slowly:
        channels = channels[channels % (HEAD_SIZE // 2) >= HEAD_SIZE * 3 // 8]
    offset[channels[:4]] = bias.outlier
    turned = rotate(content, positions, bias.base)
    return turned + rotate(offset[None], positions, bias.base), turned


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


def recalled(kind: LandmarkKind, keys: Tensor, queries: list[Tensor], needed: list[int]) -> float:
    """Share of the steps at which the needed token's chunk was made hot, of 6.25% of the chunks."""
    case = recall_case(
        [TOKENS],
        [[[True]]],
        kind,
        HEAD_SIZE,
        torch.float32,
        torch.device("cpu"),
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
            None,
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


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
def test_a_moving_needle(bias: Bias) -> None:
    keys, turned = biased_keys(bias)
    queries, needed = needles(keys, turned)
    assert len({token // PAGE for token in needed}) > STEPS * 0.75, "the needle must move"
    window = torch.randn(WINDOW, HEAD_SIZE)
    found = {kind: recalled(kind, keys, queries, needed) for kind in get_args(LandmarkKind)}
    found["pruning, twice the budget"] = kept_by_pruning(keys, needed, window, 2 / 16)
    print({name: round(share, 3) for name, share in found.items()})
    assert found["sketch"] >= bias.least[0]
    assert found["sketch2"] >= bias.least[1]
    assert found["mean"] <= 0.9
    assert found["pruning, twice the budget"] <= 0.5
