"""An answer's report, where a token that was under way ends a request that had to make room meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import SCENE, Ask, Engine, engine, picture, schedule_asynchronously
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from hybridkv_vllm.observe.metrics import read_samples

pytestmark = pytest.mark.slow

COMPRESSED = "hybridkv_requests_compressed_total"
COMPRESSED_BY_WORKER = "hybridkv_compress_seconds_count"


@contextmanager
def small_engine(model: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Engine]:
    """Of 12 blocks, scheduling asynchronously: a step is under way when the next one is planned."""
    schedule_asynchronously(monkeypatch)
    settings |= {"num_gpu_blocks_override": 13, "max_model_len": 128, "max_num_batched_tokens": 256}
    options = {"budget": 0.5, "dynamic_tier": "off"}
    with engine(model, options=options, enable_prefix_caching=False, **settings) as ours:
        yield ours
        ours.assert_empty()


def add(of: Engine, name: str, first: int, tokens: int, answer: int, priority: int = 0, **extra: Any) -> None:
    """Asks with so many tokens of a scene, from the `first` on."""
    prompt = of.llm.get_tokenizer().encode(SCENE * 10)[first : first + tokens]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=answer, extra_args=extra)
    of.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params, priority=priority)


def count(name: str) -> float:
    return sum(sample.value for sample in read_samples() if sample.name == name)


def test_a_request_that_makes_room_as_its_last_token_comes_is_reported(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests of higher priority need its last block while its n-th token is under way, for some n."""
    with small_engine(tiny_model, monkeypatch, max_num_seqs=4, scheduling_policy="priority") as ours:
        preemptions = set()
        for answer in range(13, 16):
            before, counted = ours.preemptions, count(COMPRESSED)
            wanted = {"hybridkv_report": True, "hybridkv_budget": 0.75}
            add(ours, f"asked {answer}", 5, 64, answer, priority=5, **wanted)
            step, reports = 0, {}
            while ours.llm.llm_engine.has_unfinished_requests():
                if step == 3:
                    add(ours, f"first {answer}", 0, 70, 30, hybridkv_enabled=False)
                    add(ours, f"second {answer}", 3, 37, 20, hybridkv_enabled=False)
                step += 1
                ended = [output for output in ours.llm.llm_engine.step() if output.finished]
                reports |= {output.request_id: output.kv_transfer_params for output in ended}
            report = reports[f"asked {answer}"]["hybridkv"]
            assert (report["compressed"], report["arena_blocks"], report["blocks_freed"]) == (True, 3, 4)
            preemptions.add((ours.preemptions - before, count(COMPRESSED) - counted))
    # None; at the last token, which needs no second compression; before it, which does.
    assert preemptions == {(0, 1), (1, 1), (1, 2)}


def test_a_compression_under_way_counts_although_it_makes_room(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other request's next block is due while this one's only step is under way, for some arrival."""
    with small_engine(tiny_model, monkeypatch, max_num_seqs=2) as ours:
        for arrival in range(6, 10):
            before = count(COMPRESSED), count(COMPRESSED_BY_WORKER)
            add(ours, f"other {arrival}", 0, 40, 24, hybridkv_enabled=False)
            step, report = 0, None
            while ours.llm.llm_engine.has_unfinished_requests():
                if step == arrival:
                    add(ours, f"asked {arrival}", 5, 96, 1, hybridkv_report=True)
                step += 1
                for output in ours.llm.llm_engine.step():
                    if output.request_id.startswith("asked"):
                        report = output.kv_transfer_params
            ours.core.step_fn()
            assert report is not None
            assert (report["hybridkv"]["compressed"], report["hybridkv"]["blocks_freed"]) == (True, 0)
            assert (count(COMPRESSED), count(COMPRESSED_BY_WORKER)) == (before[0] + 1, before[1] + 1)
        assert ours.preemptions > 0


def test_a_picture_that_came_with_bad_options_is_no_loss_without_a_server_either(tiny_model: Path) -> None:
    ask = Ask("picture", "What is this?", (picture(336, 280, 1),))
    bad = ask.sampling(extra_args={"hybridkv_budget": 7})
    with engine(tiny_model, options={"budget": 0.5}) as ours:
        for prompts, params in (([ask.prompt()], [bad]), ([ask.prompt()] * 2, [ask.sampling(), bad])):
            with pytest.raises(VLLMValidationError, match="hybridkv_budget"):
                ours.llm.generate(prompts, params, use_tqdm=False)
            assert ours.ask([ask])
        ours.assert_empty()
