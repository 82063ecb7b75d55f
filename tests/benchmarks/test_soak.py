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
        ({"memory_at_end": {"a": 640.0, "b": 400.0}}, "memory grew from 1000 to 1040 MiB, 0 as stock's does"),
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


@pytest.mark.parametrize(
    ("stock_grew", "stock_answers", "problem"),
    [
        (0.0, 400, "memory grew from 1000 to 1090 MiB, 0 as stock's does"),
        (70.0, 400, None),
        (-50.0, 400, "0 as stock's does"),
        # As much, but of twice the answers.
        (70.0, 800, "35 as stock's does"),
        (70.0, 0, "0 as stock's does"),
    ],
)
def test_what_stock_keeps_of_each_answer_is_its_own(
    stock_grew: float, stock_answers: int, problem: str | None
) -> None:
    common = {"environment": environment("a card"), "clients": 64, "warm_up": 240, "seconds": 300}
    stock = soak.Soak(
        server="stock",
        **common,
        **(FINE | {"answers": stock_answers, "memory_at_end": {"a": 700.0, "b": 300.0 + stock_grew}}),
    )
    ours = soak.Soak(server="hybridkv", **common, **(FINE | {"memory_at_end": {"a": 690.0, "b": 400.0}}))
    found = ours.problems(stock)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_the_committed_loads_were_borne() -> None:
    """64 clients for five minutes, and stock vLLM under the same load."""
    ours, stock = (
        soak.Soak.model_validate_json((soak.STOCK_RESULT.parent / name).read_text())
        for name in ("soak.json", "soak-stock.json")
    )
    for result, server in ((ours, "hybridkv"), (stock, "stock")):
        assert (result.server, result.clients, result.seconds) == (server, 64, 300)
    assert ours.compressed > 0
    assert ours.problems(stock) == []
