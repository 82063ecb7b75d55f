"""What a rank holds for heads that recall: its tables, and what it asks of the kernels and of the policy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hybridkv_kernels.recall.landmarks import Landmarks
from hybridkv_kernels.recall.tables import STORE_BLOCK
from hybridkv_kernels.recall_decode import RecallPlan

from hybridkv_vllm.config import parse_server_options
from hybridkv_vllm.plan import make_plan
from hybridkv_vllm.worker import recall
from hybridkv_vllm.worker.recall import RecallState, begin_recall
from hybridkv_vllm.worker.tables import CacheShape

CPU = torch.device("cpu")
SHAPE = CacheShape(num_layers=3, num_kv_heads=1, num_query_heads=1, head_size=16)


def make_state(max_chunks: int = 30, **options: Any) -> RecallState:
    """Two slots' tables."""
    chosen = parse_server_options(options)
    landmarks = Landmarks.create(chosen.landmark_kind, SHAPE.head_size, torch.float32, CPU)
    return RecallState.create(
        SHAPE, chosen, landmarks, slots=2, max_rows=2, max_chunks=max_chunks, backend="torch", device=CPU
    )


def test_the_kernels_are_told_the_options_of_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(recall_interval=3, pin_first_chunks=1, pin_recent_chunks=2)
    told: dict[str, Any] = {}
    planned: list[Any] = []
    monkeypatch.setattr(recall, "recall_decode", lambda *_, **options: told.update(options))
    state.plan = cast(RecallPlan, SimpleNamespace(update=lambda *arguments: planned.extend(arguments)))
    unused: Any = None
    state.update_plan(unused, unused, unused)
    state.decode(unused, unused, unused, unused, unused, unused, layer=0, scale=1.0)
    assert (told["interval"], told["pin_first"], told["pin_recent"]) == (3, 1, 2)
    assert planned[-1] == 3


def test_the_longest_prompt_has_room_for_all_its_store_blocks() -> None:
    heads, chunks = SHAPE.num_layers * SHAPE.num_kv_heads, 30
    assert STORE_BLOCK < heads * chunks < 2 * STORE_BLOCK
    assert make_state(chunks).tables.store_blocks.shape == (2, 2)


def test_a_slot_that_is_empty_recalls_nothing() -> None:
    state = make_state()
    state.tables.chunk_first.fill_(5)
    state.reset(1)
    assert state.tables.chunk_first[:, :, 0].tolist() == [[5] * 3, [-1] * 3]


@pytest.mark.parametrize(("tokens", "window", "in_arena"), [(480, 20, 20), (495, 20, 5), (495, 9, 0)])
def test_the_windows_tokens_in_the_tail_need_no_pages(
    tokens: int, window: int, in_arena: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tokens, ((0, tokens - window),), 0.3, 64, "host")
    asked: list[Any] = []
    monkeypatch.setattr(recall, "recall_limits", lambda *arguments: asked.extend(arguments))
    assert begin_recall(make_state(), SHAPE, 0, plan) is None
    assert asked[-1] == in_arena
