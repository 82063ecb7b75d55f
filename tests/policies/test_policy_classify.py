"""Classifier figures against plain loops over explicit attention matrices, and the heads they call static."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from policy_cases import CASES, causal, made_scores, random_scores, scores_of
from torch import Tensor

from hybridkv_vllm.policies import CLASSIFIERS, POLICIES, PROFILE, PolicyOptions, PromptScores, get_policy
from hybridkv_vllm.policies.classify import classify

LAYERS, HEADS, GROUP, WINDOW, TOKENS = 2, 3, 2, 5, 43


def figures(rows: list[list[list[float]]], visual: list[bool]) -> dict[str, float]:
    """Every figure of one KV head from its `[group][window][token]` probabilities."""
    tokens, pairs = len(visual), [row for member in rows for row in member]
    window = len(rows[0])
    mass = [sum(row[j] for row in pairs) / len(pairs) for j in range(tokens)]
    causal_pairs = important = 0
    touched = set()
    for member in rows:
        for w, row in enumerate(member):
            i = tokens - window + w
            causal_pairs += i + 1
            matters = [j for j in range(i + 1) if row[j] >= 0.01 * max(row)]
            important += len(matters)
            touched.update(matters)
    return {
        "sparsity": 1 - important / causal_pairs,
        "text_mass": sum(m for m, v in zip(mass, visual, strict=True) if not v),
        "top_mass": sum(sorted(mass, reverse=True)[: math.ceil(tokens / 10)]),
        "union": 1 - len(touched) / tokens,
    }


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("seed", range(3))
def test_figures_follow_their_formulas(classifier: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(LAYERS, HEADS, GROUP, WINDOW, TOKENS, generator=random) * 4
    probabilities = causal(logits)
    visual = torch.rand(TOKENS, generator=random) < 0.5
    scores = scores_of(probabilities, visual)
    verdict = classify(scores, PolicyOptions(classifier=classifier, theta=0.6))
    for layer in range(LAYERS):
        for head in range(HEADS):
            expected = figures(probabilities[layer, head].tolist(), visual.tolist())
            assert float(verdict.figure[layer, head]) == pytest.approx(expected[classifier], abs=1e-5)
            assert float(verdict.sparsity[layer, head]) == pytest.approx(expected["sparsity"], abs=1e-6)
            assert bool(verdict.dynamic[layer, head]) == (expected[classifier] < 0.6)


def known_heads() -> tuple[Tensor, Tensor]:
    """Four KV heads of 320 tokens, 240 of them visual: what each one's 64 queries look at."""
    window, tokens = 64, 320
    visual = torch.zeros(tokens, dtype=torch.bool)
    visual[8:248] = True
    logits = torch.zeros(1, 4, 1, window, tokens)
    logits[0, 0, :, :, 0] = 20  # one text token, the sink
    logits[0, 2, 0, torch.arange(window), 20 + 3 * torch.arange(window)] = 20  # another visual token each
    logits[0, 3, :, :, 100:104] = 20  # always the same few visual tokens
    return causal(logits), visual


@pytest.mark.parametrize(
    ("classifier", "dynamic"),
    [
        # In order: sink, broad, sharp but moving (a retrieval head), fixed on a piece of the picture.
        ("sparsity", [False, True, False, False]),
        ("text_mass", [False, True, True, True]),
        ("top_mass", [False, True, True, False]),
        ("union", [False, True, True, False]),
    ],
)
def test_known_heads_are_called_as_expected(classifier: str, dynamic: list[bool]) -> None:
    verdict = classify(scores_of(*known_heads()), PolicyOptions(classifier=classifier))
    assert verdict.dynamic[0].tolist() == dynamic


@pytest.mark.parametrize("seed", range(8))
def test_prompt_of_text_alone_is_static_at_any_theta(seed: int) -> None:
    scores = random_scores(seed, visual=(0, 0))
    assert not classify(scores, PolicyOptions(classifier="text_mass", theta=1.0)).dynamic.any()


def test_static_at_exactly_theta() -> None:
    scores = random_scores(0)
    figure = float(classify(scores, PolicyOptions()).figure[0, 0])
    assert not classify(scores, PolicyOptions(theta=figure)).dynamic[0, 0]


# With no number among the votes `union` finds no token that matters: that is a figure, 1.
@pytest.mark.parametrize("classifier", [name for name in CLASSIFIERS if name != "union"])
def test_a_head_without_a_figure_is_dynamic_unless_theta_is_0(classifier: str) -> None:
    nan = torch.full((1, 2, 32), torch.nan)
    scores = made_scores(nan, nan, window=4, is_visual=torch.arange(32) < 9)
    assert classify(scores, PolicyOptions(classifier=classifier)).dynamic.all()
    assert not classify(scores, PolicyOptions(classifier=classifier, theta=0.0)).dynamic.any()


def one_layer(scores: PromptScores, layer: int) -> PromptScores:
    rows = slice(layer, layer + 1)
    return replace(scores, mass=scores.mass[rows], votes=scores.votes[rows])


@pytest.mark.parametrize("case", [*CASES, "very_long"])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_is_judged_as_among_all(policy: str, classifier: str, case: str) -> None:
    """The verdict falls layer by layer while the prefill runs."""
    scores = CASES[case] if case in CASES else random_scores(5, tokens=5000, visual=(40, 4900))
    options = PolicyOptions(classifier=classifier)
    whole = POLICIES[policy].classify(scores, options)
    for layer in range(scores.mass.shape[0]):
        alone = POLICIES[policy].classify(one_layer(scores, layer), options)
        for name, value in vars(whole).items():
            assert torch.equal(getattr(alone, name)[0], value[layer])


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_the_papers_reading_judges_by_sparsity_whatever_is_asked(classifier: str) -> None:
    scores = CASES["long"]
    verdict = POLICIES["hybridkv-paper"].classify(scores, PolicyOptions(classifier=classifier, theta=0.5))
    usual = classify(scores, PolicyOptions(classifier="sparsity", theta=0.5))
    assert torch.equal(verdict.figure, verdict.sparsity)
    assert all(torch.equal(getattr(verdict, name), value) for name, value in vars(usual).items())


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_quest_calls_every_head_dynamic_and_reports_the_figure(classifier: str) -> None:
    scores, options = CASES["long"], PolicyOptions(classifier=classifier)
    verdict, usual = POLICIES["quest"].classify(scores, options), classify(scores, options)
    assert verdict.dynamic.all()
    assert torch.equal(verdict.figure, usual.figure)
    assert torch.equal(verdict.sparsity, usual.sparsity)


def test_a_profile_takes_the_classifiers_place() -> None:
    scores = CASES["long"]
    layers, heads = scores.mass.shape[:2]
    profile = torch.rand(layers, heads, generator=torch.Generator().manual_seed(2))
    options = PolicyOptions(classifier=PROFILE, theta=0.5, profile=profile)
    verdict = get_policy("hybridkv").classify(scores, options)
    assert torch.equal(verdict.figure, profile)
    assert torch.equal(verdict.dynamic, profile < 0.5)
    assert torch.equal(verdict.sparsity, classify(scores, PolicyOptions()).sparsity)
    assert get_policy("hybridkv").may_recall(False, options)
    # A method that defines its classifier keeps it.
    papers = get_policy("hybridkv-paper").classify(scores, options)
    assert torch.equal(papers.figure, papers.sparsity)
    with pytest.raises(ValueError, match="unknown classifier 'profile'"):
        classify(scores, PolicyOptions(classifier=PROFILE))


def test_a_prompt_of_text_alone_has_no_head_that_recalls_by_its_text_mass() -> None:
    """So the scheduler need not set anything aside for one; other classifiers may find dynamic heads."""
    logits = torch.randn(2, 2, 1, 8, 64, generator=torch.Generator().manual_seed(1))
    text = scores_of(causal(logits), torch.zeros(64, dtype=torch.bool))
    for classifier in CLASSIFIERS:
        options = PolicyOptions(classifier=classifier, theta=1.0)
        found = bool(classify(text, options).dynamic.any())
        assert get_policy("hybridkv").may_recall(False, options) or not found
        for policy in POLICIES.values():
            assert policy.may_recall(True, options) == policy.recalls
        for name in ("hybridkv-paper", "quest"):
            assert get_policy(name).classify(text, options).dynamic.any()
            assert get_policy(name).may_recall(False, options)
    assert not get_policy("hybridkv").may_recall(False, PolicyOptions())
