"""Budget 1.0 takes the whole path, scores, arena, compaction, freed blocks, and answers like stock vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Answer, assert_same, crowd, engine, lifecycle_asks, schedule_asynchronously
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

pytestmark = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "small chunks": {"max_num_batched_tokens": 96, "max_num_seqs": 8},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 200},
}


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo traces the model, as on a GPU; elsewhere the CPU harness saves the seconds that it takes."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_answers_equal_stock_vllm(
    settings: dict[str, Any], tiny_model: Path, stock_answers: dict[str, list[Answer]]
) -> None:
    """Every kind of request, all at once, twice: the second time with prefix hits."""
    asks = lifecycle_asks()
    with engine(tiny_model, options={"budget": 1.0}, **settings) as ours:
        for _ in range(2):
            given = ours.ask(asks)
            for ask in asks:
                assert_same(given[ask.name], stock_answers[ask.name], ask.name)
            ours.assert_empty()


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_answers_equal_stock_vllm_when_requests_are_preempted(
    scheduling: str,
    tiny_model: Path,
    stock_answers: dict[str, list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pool so small that decoding requests lose their blocks and start again."""
    if scheduling == "async":
        schedule_asynchronously(monkeypatch)
    with engine(tiny_model, options={"budget": 1.0}, num_gpu_blocks_override=64, max_model_len=400) as ours:
        assert isinstance(ours.scheduler, AsyncScheduler) == (scheduling == "async")
        given = ours.ask(crowd())
        assert ours.preemptions > 0
        for ask in crowd():
            assert_same(given[ask.name], stock_answers[ask.name], ask.name)
        ours.assert_empty()


def test_transformers_is_a_second_witness(tiny_model: Path, stock_answers: dict[str, list[Answer]]) -> None:
    """The request with one picture, decoded greedily by Hugging Face Transformers in fp32."""
    (ask,) = (ask for ask in lifecycle_asks() if ask.name == "one picture")
    processor = AutoProcessor.from_pretrained(tiny_model)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float32).eval()
    inputs = processor(text=[ask.prompt()["prompt"]], images=list(ask.pictures), return_tensors="pt")
    output = model.generate(
        **inputs,
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    logprobs = torch.stack(output.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    witness = Answer(tuple(tokens.tolist()), tuple(logprobs.tolist()))
    with engine(tiny_model, options={"budget": 1.0}) as ours:
        assert_same(ours.ask([ask])[ask.name], [witness], "Transformers")
    assert_same(stock_answers[ask.name], [witness], "stock vLLM")
