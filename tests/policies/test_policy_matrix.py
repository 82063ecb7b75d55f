"""Every policy with every classifier on every kind of prompt: what must hold whatever the method."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import CASES, PAGE, Allocation, page_counts, random_scores
from torch import Tensor

from hybridkv_vllm.policies import (
    CLASSIFIERS,
    POLICIES,
    PolicyOptions,
    PromptScores,
    Selection,
    get_policy,
    select,
)

TIERS = ("off", "host", "gpu")
PAGES = tuple(page_counts(CASES["usual"]))


def head_pages(selection: Selection) -> Tensor:
    return -(-selection.lengths // PAGE)


def pooled(scores: PromptScores, layer: int, head: int) -> list[float]:
    """Max over a token and three neighbours each side, none across the observation window's start."""
    mass = scores.mass[layer, head].tolist()
    past = max(0, len(mass) - scores.window)
    ends = [(0, past) if position < past else (past, len(mass)) for position in range(scores.compressible)]
    return [max(mass[max(low, i - 3) : min(high, i + 4)]) for i, (low, high) in enumerate(ends)]


def ranked(scores: PromptScores, text_prior: bool, layer: int, head: int) -> list[int]:
    """Token positions, the first to be kept first."""
    score = pooled(scores, layer, head)

    def key(position: int) -> tuple[int, float, int]:
        if position >= scores.tokens - scores.window:
            kind = 0
        else:
            kind = 2 if text_prior and scores.is_visual[position] else 1
        return kind, -score[position], position

    return sorted(range(scores.compressible), key=key)


def expected_pages(
    scores: PromptScores, pages: int, options: PolicyOptions, selection: Selection
) -> list[int]:
    """Every head static with the tier off; the window counts only where it lies in the arena."""
    split = options.dynamic_tier != "off"
    return Allocation(
        sparsity=selection.sparsity.flatten().tolist(),
        dynamic=[split and dynamic for dynamic in selection.dynamic.flatten().tolist()],
        pages=pages,
        capacity=scores.compressible // PAGE,
        window=sum(position >= scores.tokens - scores.window for position in range(scores.compressible)),
        share_ppm=round(options.dynamic_share * 10**6),
    ).expected()


def check(policy: str, scores: PromptScores, pages: int, options: PolicyOptions) -> None:
    selection = get_policy(policy).select(scores, pages, options)
    layers, heads = scores.mass.shape[:2]
    used, most = head_pages(selection), scores.heads * scores.capacity

    assert selection.keep.shape == (layers, heads, scores.compressible)
    assert selection.keep.dtype == selection.dynamic.dtype == torch.bool
    assert selection.lengths.dtype == selection.first_page.dtype == torch.int32
    assert selection.figure.dtype == selection.sparsity.dtype == torch.float32
    assert torch.isfinite(selection.figure).all()
    assert torch.isfinite(selection.sparsity).all()
    assert torch.equal(selection.dynamic, selection.figure < options.theta)

    assert int(used.sum()) <= pages
    if policy == "snapkv":
        assert selection.lengths.unique().numel() == 1
        assert min(pages, most) - int(used.sum()) < scores.heads
    else:
        assert int(used.sum()) == min(pages, most)
    if policy == "hybridkv":
        assert used.flatten().tolist() == expected_pages(scores, pages, options, selection)
    if pages >= most:
        assert selection.keep.all()
    if pages >= scores.heads:
        assert (used >= 1).all()

    assert torch.equal(selection.lengths, selection.keep.sum(-1, dtype=torch.int32))
    starts = [0, *itertools.accumulate(used.flatten().tolist())][:-1]
    assert selection.first_page.flatten().tolist() == starts

    dest = selection.dest()
    assert dest.dtype == torch.int32
    for layer, head in itertools.product(range(layers), range(heads)):
        length = int(selection.lengths[layer, head])
        kept = selection.keep[layer, head].nonzero().flatten().tolist()
        assert kept == sorted(ranked(scores, policy != "snapkv", layer, head)[:length])
        assert dest[layer, head][kept].tolist() == list(range(length))
    assert (dest[~selection.keep] == -1).all()

    again = get_policy(policy).select(scores, pages, options)
    assert all(torch.equal(getattr(again, name), value) for name, value in vars(selection).items())


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_on_every_prompt(policy: str, classifier: str, case: str, pages: str) -> None:
    scores = CASES[case]
    arena = page_counts(scores)[pages]
    tiers = TIERS if policy == "hybridkv" else ("off",)
    for tier in tiers:
        options = PolicyOptions(classifier=classifier, dynamic_tier=tier)
        if policy == "full" and arena < scores.heads * scores.capacity:
            with pytest.raises(ValueError, match="'full' needs"):
                get_policy(policy).select(scores, arena, options)
        else:
            check(policy, scores, arena, options)


@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_random_prompts(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(16, 130), "tokens")
    scores = random_scores(
        data.draw(st.integers(0, 2**20), "seed"),
        layers=data.draw(st.integers(1, 3), "layers"),
        heads=data.draw(st.integers(1, 4), "heads"),
        group=data.draw(st.integers(1, 3), "group"),
        window=data.draw(st.integers(1, min(tokens, 40)), "window"),
        tokens=tokens,
        visual=(data.draw(st.integers(0, tokens), "start"), data.draw(st.integers(0, tokens), "end")),
    )
    policy = data.draw(st.sampled_from([name for name in POLICIES if name != "full"]), "policy")
    options = PolicyOptions(
        classifier=data.draw(st.sampled_from(list(CLASSIFIERS)), "classifier"),
        theta=data.draw(st.floats(0, 1), "theta"),
        dynamic_share=data.draw(st.floats(0, 1), "dynamic_share"),
        dynamic_tier=data.draw(st.sampled_from(TIERS), "tier"),
    )
    check(policy, scores, data.draw(st.integers(0, scores.heads * scores.capacity + 3), "pages"), options)


@pytest.mark.parametrize("policy", ["hybridkv", "snapkv"])
def test_window_is_kept_wherever_it_fits(policy: str) -> None:
    scores = random_scores(20, tokens=240, window=40, visual=(10, 190))
    in_window = torch.arange(240) >= 200
    for pages in range(3 * scores.heads, scores.heads * scores.capacity, 5):
        selection = get_policy(policy).select(scores, pages, PolicyOptions())
        # The floor is the window: three pages a head hold it whatever the weights are.
        assert (head_pages(selection) >= 3).all()
        assert selection.keep[..., in_window].all()


def test_text_comes_before_visual_and_snapkv_makes_no_difference() -> None:
    scores = CASES["long"]
    text = ~scores.is_visual[: scores.compressible]
    pages = scores.heads * 9
    hybrid = get_policy("hybridkv").select(scores, pages, PolicyOptions())
    snap = get_policy("snapkv").select(scores, pages, PolicyOptions())
    roomy = hybrid.lengths >= int(text.sum())
    assert roomy.any()
    assert hybrid.keep[roomy][:, text].all()
    assert not (hybrid.keep & ~text)[~roomy].any()
    assert not snap.keep[..., text].all()


@pytest.mark.parametrize("scale", [2.0**-1, 2.0**-60, 2.0**-120])
def test_closest_scores_still_rank_visual_tokens(scale: float) -> None:
    """Neighbouring fp32 numbers: a key that added the class to the score would lose their order."""
    tokens = 128
    mass = (1 + torch.arange(tokens) * 2.0**-23).mul(scale).expand(1, 1, tokens).contiguous()
    scores = PromptScores(mass, torch.ones_like(mass), torch.ones(tokens, dtype=torch.bool), 1, 1, tokens)
    keep = get_policy("hybridkv").select(scores, 2, PolicyOptions()).keep[0, 0]
    # Pooling spreads the last token before the window, at 126, no further than 126 itself.
    assert keep[tokens - 32 :].all()


def test_broken_scores_never_overrun_the_arena() -> None:
    usual = CASES["usual"]
    broken = PromptScores(
        torch.full_like(usual.mass, float("nan")),
        torch.full_like(usual.votes, float("nan")),
        usual.is_visual,
        usual.window,
        usual.group,
        usual.compressible,
    )
    for policy, classifier in itertools.product(["hybridkv", "snapkv"], CLASSIFIERS):
        options = PolicyOptions(classifier=classifier, dynamic_tier="host")
        selection = get_policy(policy).select(broken, usual.heads * 2, options)
        assert int(head_pages(selection).sum()) == usual.heads * 2
        assert torch.isfinite(selection.figure).all()


def test_budget_share() -> None:
    assert {name: policy.budget_share(0.1) for name, policy in POLICIES.items()} == {
        "full": 1.0,
        "hybridkv": 0.1,
        "snapkv": 0.1,
    }


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'snap': choose one of full, hybridkv, snapkv"):
        get_policy("snap")
    with pytest.raises(ValueError, match="'mass': choose one of sparsity, text_mass, top_mass, union"):
        get_policy("snapkv").select(CASES["usual"], 24, PolicyOptions(classifier="mass"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"votes": torch.zeros(2, 3, 76)}, "mass and votes"),
        ({"is_visual": torch.zeros(64, dtype=torch.bool)}, "is_visual"),
        ({"window": 0}, "window and group"),
        ({"group": 0}, "window and group"),
        ({"compressible": 63}, "compressible"),
        ({"compressible": 0}, "compressible"),
        ({"compressible": 80}, "compressible"),
    ],
)
def test_scores_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptScores(**{**vars(CASES["usual"]), **change})


@pytest.mark.parametrize(
    "change", [{"theta": 1.1}, {"theta": float("nan")}, {"dynamic_share": -0.1}, {"dynamic_tier": "disk"}]
)
def test_options_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        PolicyOptions(**change)


def test_sorting_a_few_layers_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts are sorted in parts; prompts as short as these tests' would never be."""
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(5, 2, 48, generator=generator)
    priority = torch.randint(0, 3, (48,), generator=generator)
    lengths = torch.randint(0, 49, (5, 2), generator=generator)
    whole = select.keep_best(score, priority, lengths)
    monkeypatch.setattr(select, "SORT_ELEMENTS", 2 * score[0].numel())
    assert torch.equal(select.keep_best(score, priority, lengths), whole)
    assert torch.equal(whole.sum(-1), lengths)
