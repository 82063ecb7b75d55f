"""An operation that is ready to be run, checked and timed, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """An operation that can be repeated.

    Attributes:
        run: does it once, from the same state each time.
        result: what `run` wrote, to compare; call it behind `run`.
        num_bytes: of KV, landmarks or chunks that have to be read, the least.
        poison: spoils what `run` has to write.
        eager: whether it is launched from Python each time, as in the engine, and not replayed as a graph.
    """

    run: Callable[[], object]
    result: Callable[[], Tensor]
    num_bytes: int
    poison: Callable[[], object]
    eager: bool = False
