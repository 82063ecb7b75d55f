"""Intervals: Wilson's for shares, the bootstrap over contexts for the suite's mean."""

from __future__ import annotations

import numpy as np
import pytest
from hybridkv_quality.intervals import Estimate, Scored, suite_mean, wilson
from hypothesis import given, settings
from hypothesis import strategies as st

COUNTS = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # From the closed form, and as R's binom::binom.wilson prints them.
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_has_the_published_values(successes: int, total: int, low: float, high: float) -> None:
    estimate = wilson(successes, total)
    assert estimate.value == successes / total
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-4)


@given(COUNTS)
def test_wilson_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    successes, total = counts
    estimate, mirrored = wilson(successes, total), wilson(total - successes, total)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((estimate.low, estimate.high))


@given(COUNTS)
def test_more_trials_of_the_same_share_narrow_wilson(counts: tuple[int, int]) -> None:
    successes, total = counts
    few, many = wilson(successes, total), wilson(4 * successes, 4 * total)
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_share(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="nothing to estimate"):
        wilson(successes, total)


def shared(contexts: int, tasks: tuple[str, ...], share: float, seed: int) -> list[Scored]:
    """Each context has one question of each task."""
    generator = np.random.default_rng(seed)
    return [
        Scored(task, f"c{context}", float(generator.random() < share))
        for context in range(contexts)
        for task in tasks
    ]


def test_the_mean_weighs_tasks_alike_whatever_their_size() -> None:
    scores = [Scored("a", f"c{n}", 1.0) for n in range(9)] + [Scored("b", "c9", 0.0)]
    assert suite_mean(scores, seed=0).value == 0.5


@given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_bootstrap_holds_the_mean_within_its_interval(contexts: int, share: float, seed: int) -> None:
    scores = shared(contexts, ("a", "b"), share, seed)
    estimate = suite_mean(scores, seed=seed, resamples=200)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.value == pytest.approx(np.mean([scored.score for scored in scores]))
    # Neither the order of the scores nor another run changes anything.
    assert suite_mean(scores[::-1], seed=seed, resamples=200) == estimate


def test_the_bootstrap_has_the_width_that_independent_contexts_have() -> None:
    scores = shared(400, ("a",), 0.5, 1)
    estimate = suite_mean(scores, seed=0)
    expected = wilson(sum(scored.score for scored in scores), 400)
    assert estimate.high - estimate.low == pytest.approx(expected.high - expected.low, rel=0.05)


def test_questions_about_one_context_do_not_count_as_independent() -> None:
    alone = [Scored("a", f"c{n}", float(n % 2)) for n in range(40)]
    repeated = [scored for scored in alone for _ in range(10)]
    once, often = suite_mean(alone, seed=0), suite_mean(repeated, seed=0)
    assert often == once


def test_every_task_stays_in_every_draw() -> None:
    # One context of each task: nothing to draw, so no width, and no division by zero.
    scores = [Scored("a", "c0", 1.0), Scored("b", "c1", 0.0)]
    assert suite_mean(scores, seed=0) == Estimate(value=0.5, low=0.5, high=0.5)


def test_no_scores_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no scores"):
        suite_mean([], seed=0)
