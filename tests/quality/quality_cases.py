"""Records, results and folders of questions that several tests need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridkv_quality.records import HeadsExample, Record
from PIL import Image

from hybridkv_vllm.observe.heads import Head, RequestHeads


def record(**changes: Any) -> Record:
    """A record of a compressed prompt of 600 tokens, with some fields changed."""
    fields: dict[str, Any] = {
        "configuration": "c",
        "task": "chain",
        "sample": "s0",
        "context": "k0",
        "policy": "hybridkv",
        "budget": 0.25,
        "metric": "words",
        "answer": "red blue",
        "output": "red green",
        "score": 0.0,
        "word_hits": [True, False],
        "prompt_tokens": 600,
        "cached_tokens": 0,
        "output_tokens": 3,
        "compressed": True,
        "blocks_full": 38,
        "blocks_held": 11,
        "block_bytes": 1000,
        "recalled_share": 0.5,
        "host_bytes": 18500,
    }
    return Record(**{**fields, **changes})


def heads_example(task: str, budget: float, policy: str = "hybridkv") -> HeadsExample:
    """Two layers of two heads: one static, one that recalls."""
    layer = [
        Head(figure=0.95, type="static", recalled=False, pages=4, kept_tokens=64),
        Head(figure=0.2, type="dynamic", recalled=True, pages=6, kept_tokens=48),
    ]
    heads = RequestHeads(
        request_id="1",
        prompt_tokens=600,
        arena_pages=20,
        dynamic_share=0.5,
        recalled_share=0.5,
        layers=[layer, layer],
    )
    return HeadsExample(
        task=task, sample="s0", policy=policy, budget=budget, classifier="text_mass", theta=0.9, heads=heads
    )


def save_picture(path: Path, size: tuple[int, int] = (56, 56), colour: str = "red") -> None:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_lines(path: Path, lines: Sequence[Any]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
