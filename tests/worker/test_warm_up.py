"""What is compiled before the first request: all that a request may launch, whatever the server's budget."""

from __future__ import annotations

import pytest

from hybridkv_vllm.config import parse_server_options
from hybridkv_vllm.worker.state import MIN_WARM_UP_TOKENS, warm_up_plan


@pytest.mark.parametrize("budget", [0.01, 0.6, 1.0])
@pytest.mark.parametrize(
    ("options", "recalls"),
    [
        ({}, True),
        ({"dynamic_tier": "gpu"}, True),
        ({"dynamic_tier": "off"}, False),
        ({"policy": "snapkv"}, False),
    ],
    ids=str,
)
def test_heads_recall_in_the_warm_up_if_they_may_while_serving(
    budget: float, options: dict[str, object], recalls: bool
) -> None:
    plan = warm_up_plan(MIN_WARM_UP_TOKENS, parse_server_options({**options, "budget": budget}))
    assert plan.recalls == recalls
