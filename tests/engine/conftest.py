"""Engines cost seconds to start: stock vLLM's answers are computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import Answer, crowd, engine, lifecycle_asks

from hybridkv_vllm.observe.metrics import prepare_directory


@pytest.fixture(autouse=True, scope="session")
def _counters() -> None:
    """Tests read counters before their first engine has made a place for them."""
    prepare_directory()


@pytest.fixture(scope="session")
def stock_answers(tiny_model: Path) -> dict[str, list[Answer]]:
    """What stock vLLM answers to every lifecycle request."""
    with engine(tiny_model) as stock:
        return stock.ask([*lifecycle_asks(), *crowd()])
