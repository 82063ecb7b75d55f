"""An operation that is ready to be run, checked and timed, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speed.clock import milliseconds
from speed.layer import KV_HEADS

# One in so many heads may choose a chunk otherwise than the reference does, where rounding decides.
HEADS_PER_TIE = 16


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`; infinite where something is not a number."""
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def _errors_of_heads(found: Tensor, expected: Tensor) -> list[float]:
    heads = found.shape[0] * KV_HEADS
    pairs = zip(found.reshape(heads, -1), expected.reshape(heads, -1), strict=True)
    return sorted(relative_error(*pair) for pair in pairs)


def error_of_worst_head(found: Tensor, expected: Tensor) -> float:
    """The largest `relative_error` of a KV head's answers `[N, Hq, D]`."""
    return _errors_of_heads(found, expected)[-1]


def error_of_most_heads(found: Tensor, expected: Tensor) -> float:
    """The same without the worst of many heads."""
    errors = _errors_of_heads(found, expected)
    return errors[len(errors) - 1 - len(errors) // HEADS_PER_TIE]


@dataclass(frozen=True)
class Prepared:
    """An operation that can be repeated.

    Attributes:
        run: does it once; the same each time, or in turns that come back to the first.
        result: a copy of what `run` wrote, to compare; call it behind `run`.
        num_bytes: of KV, landmarks or chunks that have to be read, the least.
        poison: spoils what `run` has to write.
        eager: whether it is launched from Python each time, as in the engine, and not replayed as a graph.
        error: of a result against the reference's.
        turns: 1, or 2 where two states take turns; `poison` spoils what the first of them writes.
        restore: brings back the state that `run` starts from and ends; not part of the operation.
    """

    run: Callable[[], object]
    result: Callable[[], Any]
    num_bytes: int
    poison: Callable[[], object]
    eager: bool = False
    error: Callable[[Any, Any], float] = relative_error
    turns: int = 1
    restore: Callable[[], object] | None = None


def first_results(prepared: Prepared) -> list[Any]:
    """What each turn writes, to nothing that could have been there before."""
    prepared.poison()
    found = []
    for _ in range(prepared.turns):
        if prepared.restore is not None:
            prepared.restore()
        prepared.run()
        found.append(prepared.result())
    return found


def measure(
    sets: Sequence[Prepared], device: torch.device, expected: Sequence[Any] | None
) -> tuple[float | None, float | None]:
    """Times runs over sets of data in turn, and checks the first set's results.

    Both its first runs are checked and what the timed ones leave: those are replays of a graph, on streams
    of their own, and overlap with each other.

    Args:
        expected: of the first set, by the reference; None to check nothing.

    Returns:
        Milliseconds of a run, None on a CPU, and the largest error, None where nothing is checked.
    """
    first = sets[0]
    found = first_results(first)
    restores = [one.restore for one in sets if one.restore is not None]
    ms = milliseconds(
        [one.run for one in sets],
        device,
        eager=first.eager,
        spoil=first.poison,
        restore=(lambda: [restore() for restore in restores]) if restores else None,
    )
    if expected is None:
        return ms, None
    pairs = zip([*found, first.result()], [*expected, expected[-1]], strict=True)
    return ms, max(first.error(*pair) for pair in pairs)
