"""Prompts with explicit attention matrices, and plain-Python references, for the policy tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hybridkv_vllm.policies import PromptScores, Recall, recall_limits

PAGE = 16


def causal(logits: Tensor) -> Tensor:
    """`[L, H, G, W, T]` probabilities of the prompt's last W queries."""
    window, tokens = logits.shape[-2:]
    query = torch.arange(tokens - window, tokens).unsqueeze(-1)
    return logits.masked_fill(torch.arange(tokens) > query, float("-inf")).softmax(-1)


def scores_of(probabilities: Tensor, is_visual: Tensor) -> PromptScores:
    """What the scoring kernel reports of `[L, H, G, W, T]` probabilities."""
    group, window, tokens = probabilities.shape[-3:]
    largest = probabilities.amax(-1, keepdim=True)
    return PromptScores(
        mass=probabilities.mean((2, 3)),
        votes=(probabilities >= 0.01 * largest).sum((2, 3)).float(),
        is_visual=is_visual,
        window=window,
        group=group,
        compressible=tokens // PAGE * PAGE,
    )


def random_scores(
    seed: int,
    *,
    layers: int = 2,
    heads: int = 3,
    group: int = 2,
    window: int = 8,
    tokens: int = 77,
    visual: tuple[int, int] = (16, 50),
) -> PromptScores:
    """Heads from broad to sharp over a prompt with one visual span."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, heads, group, window, tokens, generator=random)
    sharpness = torch.rand(layers, heads, 1, 1, 1, generator=random) * 8
    is_visual = torch.zeros(tokens, dtype=torch.bool)
    is_visual[visual[0] : visual[1]] = True
    return scores_of(causal(logits * sharpness), is_visual)


def made_scores(mass: Tensor, votes: Tensor, window: int, is_visual: Tensor | None = None) -> PromptScores:
    """Scores given directly, for prompts no attention matrix of which is needed."""
    tokens = mass.shape[-1]
    return PromptScores(
        mass=mass,
        votes=votes,
        is_visual=torch.zeros(tokens, dtype=torch.bool) if is_visual is None else is_visual,
        window=window,
        group=1,
        compressible=tokens // PAGE * PAGE,
    )


def even_scores(tokens: int = 64, votes: float = 0.0) -> PromptScores:
    """All scores tied; without votes every sparsity is 1 and every weight 0."""
    mass = torch.full((2, 3, tokens), 1 / tokens)
    return made_scores(mass, torch.full_like(mass, votes), window=4)


CASES: dict[str, PromptScores] = {
    "usual": random_scores(0),
    "long": random_scores(1, tokens=400, window=32, visual=(20, 340)),
    "several_spans_edge": random_scores(2, tokens=96, visual=(0, 64)),
    "one_page_prompt": random_scores(3, tokens=16, window=4, visual=(2, 10)),
    "one_page_and_tail": random_scores(4, tokens=31, window=20, visual=(2, 10)),
    "window_longer_than_arena": random_scores(5, tokens=47, window=40, visual=(0, 6)),
    "window_is_prompt": random_scores(6, tokens=40, window=40, visual=(8, 20)),
    "window_in_tail": random_scores(7, tokens=77, window=8),
    "one_query": random_scores(8, window=1),
    "all_text": random_scores(9, visual=(0, 0)),
    "all_visual": random_scores(10, visual=(0, 77)),
    "one_head": random_scores(11, layers=1, heads=1),
    "all_tied_all_sparse": even_scores(),
    "all_tied_all_broad": even_scores(votes=4.0),
    "all_tied_long": even_scores(tokens=272),
    "broad_and_long": random_scores(12, layers=3, heads=2, tokens=327, window=20, visual=(5, 300)),
}


def page_counts(scores: PromptScores) -> dict[str, int]:
    """Arena sizes from nothing to more than all."""
    heads, most = scores.heads, scores.heads * scores.capacity
    return {
        "none": 0,
        "fewer_than_heads": max(0, heads - 1),
        "one_a_head": heads,
        "odd": min(most, heads + heads // 2 + 1),
        "half": most // 2,
        "one_short": most - 1,
        "all": most,
        "more": most + 5,
    }


def recalls(scores: PromptScores, pages: int, seed: int = 0) -> dict[str, Recall | None]:
    """Which heads found room in the tier: none asked, and where recalling makes sense none, some and all."""
    shape = scores.mass.shape[:2]
    found: dict[str, Recall | None] = {"off": None}
    window = window_in_arena(scores)
    for landmark_pages in (1, 2, 5):
        limits = recall_limits(pages, scores.heads, scores.capacity, landmark_pages, window)
        if limits is None:
            continue
        some = torch.rand(shape, generator=torch.Generator().manual_seed(seed + landmark_pages)) < 0.6
        for name, heads in {"none": torch.zeros_like(some), "some": some, "all": some | True}.items():
            found[f"{name}_{landmark_pages}"] = Recall(heads, landmark_pages, *limits)
    return found


def window_in_arena(scores: PromptScores) -> int:
    """Tokens of the observation window that are not in the tail, counted one by one."""
    return sum(position >= scores.tokens - scores.window for position in range(scores.compressible))


def floored(pages: int, members: int, window: int, share: Fraction) -> int:
    """Pages for the window and a share of what it leaves, at least one, at most an equal share."""
    equal = Fraction(pages, members)
    wanted = (window + share * max(0, PAGE * equal - window)) / PAGE
    return min(max(1, math.ceil(wanted)), int(equal))


def weighted(weight: list[int], pages: int, floor: int, capacity: int) -> list[int]:
    """A floor for each, the rest by weight: exact fractions, surplus handed round until none is left."""
    members = range(len(weight))
    share = [Fraction(floor)] * len(weight)
    surplus = Fraction(pages - floor * len(weight))
    while surplus and (open_members := [member for member in members if share[member] < capacity]):
        total = sum(weight[member] for member in open_members)
        grown = {member: share[member] + surplus * weight[member] / total for member in open_members}
        surplus = sum((max(Fraction(0), value - capacity) for value in grown.values()), Fraction(0))
        for member, value in grown.items():
            share[member] = min(value, Fraction(capacity))
    return rounded(share)


def rounded(share: list[Fraction]) -> list[int]:
    """Whole numbers of the same sum: fractions descending, among equals the larger share, then the first."""
    whole = [int(value) for value in share]
    missing = int(sum(share)) - sum(whole)
    by_fraction = sorted(range(len(share)), key=lambda i: (whole[i] - share[i], -share[i], i))
    for member in by_fraction[:missing]:
        whole[member] += 1
    return whole


@dataclass(frozen=True)
class Allocation:
    """Input of one page allocation, as plain numbers."""

    sparsity: list[float]
    dynamic: list[bool]
    pages: int
    capacity: int
    window: int
    share_ppm: int
    least: int = 0

    def expected(self) -> list[int]:
        """The allocation by its definition: exact fractions, surplus handed round until none is left."""
        heads = len(self.sparsity)
        static = [head for head in range(heads) if not self.dynamic[head]]
        broad = [head for head in range(heads) if self.dynamic[head]]
        given = [0] * heads
        left = min(self.pages, heads * self.capacity)
        if left == heads * self.capacity:
            return [self.capacity] * heads
        if broad:
            ratio = Fraction(self.share_ppm, 10**6) if static else Fraction(1)
            equal = Fraction(self.pages, heads)
            for head in broad:
                given[head] = max(int(ratio * equal), 1 if equal >= 1 else 0)
                if static:
                    given[head] = max(given[head], self._least_that_fits(len(broad), len(static)))
                left -= given[head]
        if static:
            shares = self._static_shares(static, left)
            for head, pages in shares.items():
                given[head] = pages
            left -= sum(shares.values())
        while left:
            for head in broad[: min(left, len(broad))]:
                given[head] += 1
                left -= 1
        return given

    def _least_that_fits(self, num_dynamic: int, num_static: int) -> int:
        """The least, page by page: an equal share in any case, more beside the static heads' floor."""
        floor = math.ceil(Fraction(self.window, PAGE)) + 1
        each = 0
        while each < min(self.least, self.capacity) and (
            (each + 1) * (num_dynamic + num_static) <= self.pages
            or (each + 1) * num_dynamic + floor * num_static <= self.pages
        ):
            each += 1
        return each

    def _static_shares(self, static: list[int], pages: int) -> dict[int, int]:
        mean = Fraction(pages, len(static))
        floor = min(math.ceil((self.window + mean * PAGE / 10) / PAGE), int(mean), self.capacity)
        weight = [max(1, int((1 - self.sparsity[head]) * 2**30)) for head in static]
        return dict(zip(static, weighted(weight, pages, floor, self.capacity), strict=True))
