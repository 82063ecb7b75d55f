"""Other models than Qwen2.5-VL: at budget 1.0 they answer as with stock vLLM, at less they are compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import SCENE, Ask, assert_same, engine, picture, video
from other_models import MODELS, write_model

from hybridkv_vllm.observe.heads import read_requests

pytestmark = pytest.mark.slow

TEXT = Ask("text", SCENE * 12)
PICTURE = Ask("one picture", "What is this?", (picture(336, 280, 1),))
PICTURES = Ask("several pictures", "Compare them.", tuple(picture(224, 168, n) for n in (2, 3)))
VIDEO = Ask("video", "What happens?", frames=video(8, 5))
ASKS = {
    "Qwen3-VL": (TEXT, PICTURE, PICTURES, VIDEO),
    "Qwen3-VL-MoE": (TEXT, PICTURE, PICTURES, VIDEO),
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
    assert len(reports) == len(asks)
    assert all(report.blocks_freed > report.arena_blocks for report in reports)
    assert sum(report.dynamic_share > 0 for report in reports) == len(asks) - 1
    # The shortest prompts have no room for landmarks.
    assert any(report.recalled_share > 0 for report in reports) == (len(asks) > 1)
