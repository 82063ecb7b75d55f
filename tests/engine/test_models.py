"""Other models than Qwen2.5-VL, and adapters on it: budget 1.0 answers like stock vLLM, less compresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import SCENE, Answer, Ask, Engine, answers, assert_same, engine, picture, video
from other_models import MODELS, write_adapter, write_model
from vllm.lora.request import LoRARequest

from hybridkv_vllm.observe.heads import read_requests

pytestmark = pytest.mark.slow

TEXT = Ask("text", SCENE * 12)
PICTURE = Ask("one picture", "What is this?", (picture(336, 280, 1),))
PICTURES = Ask("several pictures", "Compare them.", tuple(picture(224, 168, n) for n in (2, 3)))
VIDEO = Ask("video", "What happens?", frames=video(8, 5))
ASKS = {
    "Qwen3-VL": (TEXT, PICTURE, PICTURES, VIDEO),
    "LLaVA-OneVision": (TEXT, PICTURE, PICTURES, VIDEO),
    "InternVL": (TEXT, PICTURE, PICTURES),
    "Llama": (TEXT,),
}


@pytest.mark.parametrize("name", MODELS)
def test_another_model_answers_like_stock_vllm(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """In chunks that cut pictures apart; then at half the budget, where some heads recall."""
    model, asks = write_model(name, tiny_model, tmp_path / "model"), ASKS[name]
    settings: dict[str, Any] = {} if len(asks) > 1 else {"limit_mm_per_prompt": {}}
    with engine(model, **settings) as stock:
        expected = stock.ask(asks)
    with engine(model, options={"budget": 1.0}, max_num_batched_tokens=160, **settings) as ours:
        given = ours.ask(asks)
        compressed = ours.ask(asks, extra_args={"hybridkv_budget": 0.5})
        ours.assert_empty()
        reports = read_requests()[: len(asks)]
    for ask in asks:
        assert_same(given[ask.name], expected[ask.name], ask.name)
    assert compressed[TEXT.name] != expected[TEXT.name]
    assert all(report.blocks_freed > report.arena_blocks for report in reports)
    assert sum(report.dynamic_share > 0 for report in reports) == len(asks) - 1
    # The shortest prompts have no room for landmarks.
    assert any(report.recalled_share > 0 for report in reports) == (len(asks) > 1)


def test_adapters_answer_like_stock_vllm(tiny_model: Path, tmp_path: Path) -> None:
    """Two LoRA adapters in a batch: one prompt's cache is another for each of them.

    Every request has one: stock vLLM answers wrongly on a CPU where a request without runs beside them.
    """
    adapters = [
        LoRARequest(str(seed), seed, str(write_adapter(tiny_model, tmp_path / str(seed), seed=seed)))
        for seed in (1, 2)
    ]

    def ask_with_both(of: Engine) -> dict[int, Answer]:
        outputs = of.llm.generate(
            [PICTURE.prompt()] * 2, PICTURE.sampling(max_tokens=8), use_tqdm=False, lora_request=adapters
        )
        return {
            adapter.lora_int_id: answers(output)[0] for adapter, output in zip(adapters, outputs, strict=True)
        }

    settings = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with engine(tiny_model, **settings) as stock:
        expected = ask_with_both(stock)
    with engine(tiny_model, options={"budget": 1.0}, **settings) as ours:
        for _ in range(2):
            given = ask_with_both(ours)
            for seed, answer in given.items():
                assert_same([answer], [expected[seed]], f"adapter {seed}")
        ours.assert_empty()
    assert expected[1].tokens != expected[2].tokens
