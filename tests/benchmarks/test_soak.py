"""What `benchmarks/soak.py` takes for a server that does not bear its load."""

from __future__ import annotations

from typing import Any

import pytest
from hybridkv_quality.environment import environment
from scripts import load

soak = load("soak")
FINE = {
    "answers": 400,
    "memory_after_warm_up": {"a": 700.0, "b": 300.0},
    "memory_at_end": {"a": 620.0, "b": 400.0},
    "metrics_p99": 0.02,
}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, None),
        ({"errors": ["APIError: 500", "another"]}, "2 errors, the first: APIError: 500"),
        ({"memory_at_end": {"a": 640.0, "b": 400.0}}, "memory grew from 1000 to 1040 MiB"),
        ({"metrics_p99": 0.2}, "/metrics took 0.200 s"),
        ({"left_over": {"blocks_arena": 3.0}}, "not empty at the end: {'blocks_arena': 3.0}"),
        ({"answers": 0}, "no answer at all"),
    ],
)
def test_problems(changed: dict[str, Any], problem: str | None) -> None:
    found = soak.Soak(
        environment=environment("a card"),
        server="hybridkv",
        clients=64,
        warm_up=240,
        seconds=300,
        **(FINE | changed),
    ).problems()
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]
