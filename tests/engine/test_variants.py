"""Other ways to run the same thing: Triton kernels, two ranks, every policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import Answer, Ask, assert_same, engine, lifecycle_asks, picture

from hybridkv_vllm.policies import POLICIES

pytestmark = pytest.mark.slow

FEW = ("text only", "one picture", "video")


def few_asks() -> list[Ask]:
    """One request of each kind of content."""
    return [ask for ask in lifecycle_asks() if ask.name in FEW]


def test_triton_kernels_answer_like_the_torch_kernels(tiny_model: Path) -> None:
    """The GPU's code path, interpreted: our kernels, vLLM's dense attention, the work split."""
    asks = [
        Ask("picture", "What?", (picture(112, 112, 1),), params={"max_tokens": 6}),
        Ask("text", "Ships came home. " * 6, params={"max_tokens": 6}),
    ]
    options = {"budget": 0.25}
    with engine(tiny_model, options={**options, "kernels": "torch"}) as ours:
        with_torch = ours.ask(asks)
    with engine(tiny_model, options={**options, "kernels": "triton"}, max_num_batched_tokens=72) as ours:
        with_triton = ours.ask(asks)
        ours.assert_empty()
    for ask in asks:
        assert_same(with_triton[ask.name], with_torch[ask.name], ask.name)


@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_answer_like_stock_vllm(
    split: str, tiny_model: Path, stock_answers: dict[str, list[Answer]]
) -> None:
    """Each rank scores, allocates and moves the KV heads of its own heads or layers."""
    with engine(tiny_model, options={"budget": 1.0}, **{split: 2}) as ours:
        given = ours.ask(few_asks())
        ours.assert_empty()
    for ask in few_asks():
        assert_same(given[ask.name], stock_answers[ask.name], ask.name)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_serves(policy: str, tiny_model: Path, stock_answers: dict[str, list[Answer]]) -> None:
    """`full` answers like stock vLLM at any budget; the others prune, each in its way."""
    with engine(tiny_model, options={"budget": 0.25, "policy": policy}) as ours:
        given = ours.ask(few_asks())
        ours.assert_empty()
    differs = False
    for ask in few_asks():
        if policy == "full":
            assert_same(given[ask.name], stock_answers[ask.name], ask.name)
        differs |= given[ask.name] != stock_answers[ask.name]
    assert differs or policy == "full"
