"""What vLLM can do beside plain requests: at budget 1.0 the answers are stock vLLM's."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from engines import SCENE, Answer, Ask, Engine, answers, assert_same, crowd, engine, picture
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams

from hybridkv_vllm.tiny_model import HIDDEN

pytestmark = pytest.mark.slow

SETTINGS: Mapping[str, Any] = {
    "scheduling_policy": "priority",
    "enable_prompt_embeds": True,
    "enable_lora": True,
    "max_lora_rank": 8,
    "max_loras": 2,
    # So few that ours, which are of 16 tokens on a CPU too, run short.
    "num_gpu_blocks_override": 64,
    "max_model_len": 400,
}
TEXT = Ask("text", SCENE * 12)
PICTURE = Ask("one picture", "What is this?", (picture(336, 280, 1),))
# What clients send beside a temperature; vLLM has kernels of its own for most of it.
SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 20},
    "top_p and top_k": {"top_p": 0.9, "top_k": 20},
    "min_p": {"min_p": 0.02},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {5: 4.0}},
    "bad words": {"bad_words": ["the"]},
    "allowed tokens": {"allowed_token_ids": list(range(5, 25))},
    "prompt logprobs": {"prompt_logprobs": 2},
}

Given = dict[str, list[Answer]]


def priorities(of: Engine) -> Given:
    """The least urgent requests come first: where blocks are short they lose theirs."""
    asks = crowd()
    outputs = of.llm.generate(
        [ask.prompt() for ask in asks],
        [ask.sampling() for ask in asks],
        use_tqdm=False,
        priority=[-number for number in range(len(asks))],
    )
    return {ask.name: answers(output) for ask, output in zip(asks, outputs, strict=True)}


def embeddings(of: Engine) -> Given:
    """A prompt of embeddings in place of tokens."""
    prompt = torch.randn(150, HIDDEN, generator=torch.Generator().manual_seed(1))
    (output,) = of.llm.generate([{"prompt_embeds": prompt}], [TEXT.sampling()], use_tqdm=False)
    return {"embeddings": answers(output)}


def sampling(of: Engine) -> Given:
    """Seeded, so that equal logits give equal tokens; one batch, which gets smaller."""
    asks = [
        dataclasses.replace(
            PICTURE if number % 2 else TEXT,
            name=name,
            params={"temperature": 0.9, "seed": number, "max_tokens": 8 + number, **params},
        )
        for number, (name, params) in enumerate(SAMPLING.items())
    ]
    outputs = of.llm.generate(
        [ask.prompt() for ask in asks], [ask.sampling() for ask in asks], use_tqdm=False
    )
    given = {ask.name: answers(output) for ask, output in zip(asks, outputs, strict=True)}
    # Of the last one's prompt too, but for its first token, which nothing predicts.
    tokens, places = outputs[-1].prompt_token_ids[1:], outputs[-1].prompt_logprobs[1:]
    of_prompt = [place[token].logprob for token, place in zip(tokens, places, strict=True)]
    return {**given, "the prompt itself": [Answer(tuple(tokens), tuple(of_prompt))]}


def adapters(of: Engine) -> Given:
    """Two LoRA adapters in a batch, and again: one prompt's cache is another for each of them.

    Every request has one: stock vLLM answers wrongly on a CPU where a request without runs beside them.
    """
    given = {}
    with tempfile.TemporaryDirectory() as folder:
        loras = [LoRARequest(str(seed), seed, str(write_adapter(Path(folder), seed))) for seed in (1, 2)]
        for turn in (1, 2):
            outputs = of.llm.generate(
                [PICTURE.prompt()] * 2, PICTURE.sampling(max_tokens=8), use_tqdm=False, lora_request=loras
            )
            given |= {
                f"adapter {lora.name}, turn {turn}": answers(output)
                for lora, output in zip(loras, outputs, strict=True)
            }
    assert given["adapter 1, turn 1"] != given["adapter 2, turn 1"]
    return given


def reset_while_running(of: Engine) -> Given:
    """What trainers do between updates: every running request starts again, without the prefix cache."""
    vllm_engine, asks = of.llm.llm_engine, (TEXT, PICTURE)
    before = of.preemptions
    for ask in asks:
        vllm_engine.add_request(ask.name, ask.prompt(), ask.sampling())
    ended, steps = {}, 0
    while vllm_engine.has_unfinished_requests():
        ended |= {output.request_id: answers(output) for output in vllm_engine.step() if output.finished}
        steps += 1
        if steps == 8:
            assert of.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert of.preemptions == before + len(asks)
    return ended


def beams(of: Engine) -> Given:
    """Each step of each beam is a request of its own, whose prompt ends with what was found so far."""
    (found,) = of.llm.beam_search([PICTURE.prompt()], BeamSearchParams(beam_width=2, max_tokens=6))
    return {
        f"beam {number}": [Answer(tuple(beam.tokens), (beam.cum_logprob,))]
        for number, beam in enumerate(found.sequences)
    }


FEATURES: tuple[Callable[[Engine], Given], ...] = (
    priorities,
    embeddings,
    adapters,
    beams,
    sampling,
    reset_while_running,
)


@pytest.fixture(scope="module")
def stock_gives(tiny_model: Path) -> dict[str, Given]:
    """What stock vLLM answers."""
    with engine(tiny_model, **SETTINGS) as stock:
        return {feature.__name__: feature(stock) for feature in FEATURES}


@pytest.fixture(scope="module")
def ours(tiny_model: Path, stock_gives: dict[str, Given]) -> Iterator[Engine]:
    """One engine for all of them; two do not live in a process at a time."""
    del stock_gives
    with engine(tiny_model, options={"budget": 1.0}, **SETTINGS) as ours:
        yield ours


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
def test_answers_equal_stock_vllm(
    feature: Callable[[Engine], Given], ours: Engine, stock_gives: dict[str, Given]
) -> None:
    """Each on an engine that has done the others before; nothing is left behind."""
    before = ours.preemptions
    given, expected = feature(ours), stock_gives[feature.__name__]
    assert given.keys() == expected.keys()
    for name, answer in given.items():
        assert_same(answer, expected[name], name)
    assert (ours.preemptions > before) == (feature in (priorities, reset_while_running))
    ours.assert_empty()
