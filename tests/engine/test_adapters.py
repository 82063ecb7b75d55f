"""LoRA adapters, where there are more of them than run at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter
from engines import SCENE, Ask, engine
from observer import given, seen_by
from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.slow


def test_a_prompt_that_waits_for_room_for_its_window_keeps_its_adapters_place(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, but not in this step: another adapter that takes its place is one too many in the next."""
    first, second = (LoRARequest(str(n), n, str(write_adapter(tmp_path, n))) for n in (1, 2))
    settings = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "max_num_batched_tokens": 128}
    with engine(tiny_model, options={"budget": 0.3}, enable_prefix_caching=False, **settings) as ours:
        vllm_engine, tokens = ours.llm.llm_engine, ours.llm.get_tokenizer().encode(SCENE * 20)
        without_chunk = set()

        def look(call: Callable[[], Any], *_: Any) -> Any:
            output = call()
            running = {request.request_id for request in ours.scheduler.running}
            without_chunk.update(map(given, running - output.num_scheduled_tokens.keys()))
            return output

        monkeypatch.setattr(ours.scheduler, "schedule", seen_by(ours.scheduler.schedule, look))

        def add(name: str, length: int, adapter: LoRARequest | None, max_tokens: int = 8) -> None:
            prompt = {"prompt_token_ids": tokens[:length]}
            sampling = Ask(name, "").sampling(max_tokens=max_tokens)
            vllm_engine.add_request(name, prompt, sampling, lora_request=adapter)

        add("decodes", 40, None, 40)
        vllm_engine.step()
        # In steps of 128 tokens, one of which decodes: 127, 127, 96 up to its window, and the 64 of that.
        add("prompt", 414, None)
        # 31 beside the 96. Its window of 64 does not fit beside the 64.
        add("waits", 95, first)
        add("other", 40, second)
        lengths = {}
        while vllm_engine.has_unfinished_requests():
            ended = [output for output in vllm_engine.step() if output.finished]
            lengths |= {output.request_id: len(output.outputs[0].token_ids) for output in ended}
        assert without_chunk == {"waits"}
        assert lengths == {"decodes": 40, "prompt": 8, "waits": 8, "other": 8}
        ours.assert_empty()
