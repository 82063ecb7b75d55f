"""Other ways to run the same thing: Triton kernels, two ranks, every policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines import Answer, Ask, assert_same, engine, lifecycle_asks, picture

from hybridkv_vllm.observe.heads import read_heads
from hybridkv_vllm.policies import POLICIES
from hybridkv_vllm.profile import HeadProfile

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
    with engine(tiny_model, options={**options, "kernels": "torch"}, enforce_eager=True) as ours:
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


@pytest.mark.parametrize("split", ["", "tensor_parallel_size", "pipeline_parallel_size"])
def test_a_profile_says_what_each_rank_does_with_its_heads(
    split: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Of a prompt of text too, whose heads are all static by their text mass."""
    text = json.loads((tiny_model / "config.json").read_text())["text_config"]
    layers, heads = text["num_hidden_layers"], text["num_key_value_heads"]
    moving = [
        [round((7 * (layer + heads * head) % 10) / 20, 2) for head in range(heads)] for layer in range(layers)
    ]
    profile = HeadProfile(model="tiny", tasks=["chain"], tokens=1, prompts=1, share=0.1, moving=moving)
    file = tmp_path / "profile.json"
    file.write_text(profile.model_dump_json())
    settings = {split: 2} if split else {}
    with engine(tiny_model, options={"budget": 0.5, "profile": str(file)}, **settings) as ours:
        ours.ask([Ask("text", "Ships came home. " * 60)])
        ours.core.step_fn()
        (report, *_) = read_heads()
        ours.assert_empty()
    assert [[head.figure for head in layer] for layer in report.layers] == [
        [pytest.approx(1 - share) for share in layer] for layer in moving
    ]
    types = [head.type for layer in report.layers for head in layer]
    assert types == ["dynamic" if share > 0.1 else "static" for layer in moving for share in layer]
    assert "static" in types
    assert report.recalled_share > 0


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
