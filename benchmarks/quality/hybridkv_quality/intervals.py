"""How sure a share or a mean is: Wilson's interval, and the bootstrap over contexts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from pydantic import BaseModel, ConfigDict

# Of the standard normal distribution: 95% lie within.
Z_95 = 1.959963984540054
RESAMPLES = 10_000


class Estimate(BaseModel):
    """A value with its 95% interval."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scored:
    """One score as the bootstrap needs it: `context` is what was drawn at random, and may span tasks."""

    task: str
    context: str
    score: float


def wilson(successes: float, total: int) -> Estimate:
    """Wilson's 95% interval for a share.

    Raises:
        ValueError: no trials, or more successes than trials.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}: nothing to estimate from")
    share, z2 = successes / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 * sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # The exact ends at 0 and 1, which rounding would miss.
    low = 0.0 if successes == 0 else max(0.0, min(centre - half, share))
    high = 1.0 if successes == total else min(1.0, max(centre + half, share))
    return Estimate(value=share, low=low, high=high)


def suite_mean(scores: Sequence[Scored], *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Mean over tasks of the mean score in each, with a 95% bootstrap interval over contexts.

    Questions about one context are not independent, so whole contexts are drawn, with replacement, among
    those that serve the same tasks. One context alone gives an interval of no width.

    Args:
        scores: at least one.
        seed: of the draws; the same scores and seed give the same interval.
        resamples: number of draws.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("no scores to take a mean of")
    tasks = sorted({scored.task for scored in scores})
    contexts = sorted({scored.context for scored in scores})
    column = {task: index for index, task in enumerate(tasks)}
    row = {context: index for index, context in enumerate(contexts)}
    sums = np.zeros((len(contexts), len(tasks)))
    counts = np.zeros_like(sums)
    for scored in scores:
        place = row[scored.context], column[scored.task]
        sums[place] += scored.score
        counts[place] += 1
    value = float((sums.sum(0) / counts.sum(0)).mean())
    strata: dict[tuple[bool, ...], list[int]] = defaultdict(list)
    for index, served in enumerate(counts > 0):
        strata[tuple(served.tolist())].append(index)
    generator = np.random.default_rng(seed)
    weights = np.zeros((resamples, len(contexts)))
    for members in strata.values():
        even = np.full(len(members), 1 / len(members))
        weights[:, members] = generator.multinomial(len(members), even, size=resamples)
    means = ((weights @ sums) / (weights @ counts)).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    # A skewed distribution of few contexts may lie beside the value itself.
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))
