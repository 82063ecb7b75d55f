"""An operation that is ready to be run, checked and timed, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speed.layer import KV_HEADS

# One in so many heads may choose a chunk otherwise than the reference does, where rounding decides.
HEADS_PER_TIE = 16


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`; infinite where something is not a number."""
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def error_of_most_heads(found: Tensor, expected: Tensor) -> float:
    """The largest `relative_error` of a KV head's answers `[N, Hq, D]`, without the worst of many heads."""
    heads = found.shape[0] * KV_HEADS
    pairs = zip(found.reshape(heads, -1), expected.reshape(heads, -1), strict=True)
    errors = sorted(relative_error(*pair) for pair in pairs)
    return errors[heads - 1 - heads // HEADS_PER_TIE]


@dataclass(frozen=True)
class Prepared:
    """An operation that can be repeated.

    Attributes:
        run: does it once, from the same state each time.
        result: what `run` wrote, to compare; call it behind `run`.
        num_bytes: of KV, landmarks or chunks that have to be read, the least.
        poison: spoils what `run` has to write.
        eager: whether it is launched from Python each time, as in the engine, and not replayed as a graph.
        error: of a result against the reference's.
    """

    run: Callable[[], object]
    result: Callable[[], Tensor]
    num_bytes: int
    poison: Callable[[], object]
    eager: bool = False
    error: Callable[[Tensor, Tensor], float] = relative_error
