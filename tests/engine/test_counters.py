"""Counters against an observer, over requests that arrive, are aborted and preempted at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import SCENE, Ask, engine, picture, random_arrivals, schedule_asynchronously
from observer import Observer, given, seen_by

from hybridkv_vllm.observe.heads import read_requests
from hybridkv_vllm.observe.metrics import Sample, read_samples
from hybridkv_vllm.plan import arena_blocks

pytestmark = pytest.mark.slow

LEAST = 64
BUDGET = 0.25
HOST_GIB = 0.004
# Requests that do not fit into the pool with a whole prompt's arena beside the prompt.
GREEDY_SCENES = 25


def counters() -> dict[str, float]:
    """All counters by name, over their labels; of fallbacks those that count requests."""
    totals: dict[str, float] = {}
    for sample in read_samples():
        if _counts_requests(sample):
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def _counts_requests(sample: Sample) -> bool:
    return sample.name != "hybridkv_fallbacks_total" or sample.labels["reason"] == "pool_too_small"


class Requests:
    """Mixed requests, all of which ask for a report."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self.greedy: set[str] = set()
        self.disabled: set[str] = set()
        self.budgets: dict[str, float] = {}
        self.with_pictures: set[str] = set()

    def new(self, number: int) -> tuple[Ask, dict[str, Any]]:
        dice = self._dice
        extra: dict[str, Any] = {"hybridkv_report": True}
        pictures = (picture(280, 252, dice.randrange(5)),) if dice.random() < 0.25 else ()
        # A third begins like others: blocks of the prefix cache have several holders.
        start = dice.choice([f"{dice.random()} ", f"{dice.random()} ", ""])
        ask = Ask("", start + SCENE * dice.choice([0, 2, 3, 3, 4, 4, 6, 12]), pictures)
        draw = dice.random()
        if draw < 0.04:
            self.greedy.add(str(number))
            ask = Ask("", f"{number} " + SCENE * GREEDY_SCENES)
            extra["hybridkv_budget"] = 1.0
        elif draw < 0.15:
            self.disabled.add(str(number))
            extra["hybridkv_enabled"] = False
        elif draw < 0.6:
            # Enough for landmarks: heads that look at pictures recall.
            extra["hybridkv_budget"] = 0.5 if pictures else dice.choice([0.1, 0.25, 0.5])
        self.budgets[str(number)] = extra.get("hybridkv_budget", BUDGET)
        if pictures:
            self.with_pictures.add(str(number))
        # vLLM's kernels for log-probabilities take a third of the time under Triton's interpreter.
        return ask, {
            "logprobs": None,
            "max_tokens": dice.choice([1, 2, dice.randrange(3, 160)]),
            "extra_args": extra,
        }


@pytest.mark.parametrize(("scheduling", "number"), [("sync", 200), ("async", 60)])
def test_counters_are_what_an_observer_counts(
    scheduling: str, number: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Aborts fall anywhere: while waiting, in prefill, on the step that compresses, while decoding."""
    if scheduling == "async":
        schedule_asynchronously(monkeypatch)
    dice = random.Random(5)
    requests = Requests(dice)
    options = {"budget": BUDGET, "min_prompt_tokens": LEAST, "host_pool_gib": HOST_GIB}
    settings = {
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 50,
        "max_model_len": 608,
        "max_num_batched_tokens": 112,
    }
    with engine(tiny_model, options=options, **settings) as ours:
        observer, before = Observer(ours, monkeypatch), counters()
        arena_seen = []

        def look(call: Callable[[], Any], *_: Any) -> Any:
            result = call()
            now = counters()
            arena_seen.append(now["hybridkv_blocks_arena"])
            assert now["hybridkv_blocks_arena"] == observer.num_arena_blocks()
            assert now["hybridkv_blocks_replaced"] == observer.num_replaced_blocks()
            return result

        update = seen_by(ours.scheduler.update_from_output, look)
        monkeypatch.setattr(ours.scheduler, "update_from_output", update)
        ended = random_arrivals(ours, dice, requests.new, number=number, arrives=0.8, aborted=0.08)
        ours.assert_empty()
        listed = read_requests()
        counted = {name: value - before.get(name, 0.0) for name, value in counters().items()}
    reports = {
        request_id: output.kv_transfer_params["hybridkv"] for request_id, output in ended.answered.items()
    }
    # The mixture is one: else the sums below would prove little.
    assert len(ended.aborted) > number // 20
    assert len(observer.preempted) > 3
    assert max(arena_seen) > 0
    assert min(observer.all_chunks) > 100
    assert sum(report["compressed"] for report in reports.values()) > number // 4

    given_back, kept = dict(observer.given_back), dict(observer.kept)
    for request_id, report in reports.items():
        tokens = observer.prompt_tokens(request_id)
        assert report["prompt_tokens"] == tokens
        if not report["compressed"]:
            assert request_id not in kept
            continue
        assert report["blocks_freed"] == given_back.get(request_id, 0)
        assert report["arena_blocks"] == arena_blocks(requests.budgets[request_id], tokens)
        held = min(tokens, 16 * report["arena_blocks"] + tokens % 16)
        assert report["memory_share"] == round(held / tokens, 4)
        if request_id in requests.with_pictures:
            # Landmarks take room, and a head that recalls keeps whole chunks.
            assert held / 2 < kept[request_id] <= held
        else:
            assert kept[request_id] == pytest.approx(held)
    assert counted["hybridkv_requests_compressed_total"] == len(observer.kept)
    assert counted["hybridkv_prompt_tokens_total"] == sum(
        observer.prompt_tokens(request_id) for request_id, _ in observer.kept
    )
    assert counted["hybridkv_blocks_freed_total"] == sum(blocks for _, blocks in observer.given_back)
    assert counted["hybridkv_kept_tokens_total"] == pytest.approx(sum(tokens for _, tokens in observer.kept))
    assert counted["hybridkv_compress_seconds_count"] == len(observer.kept)
    assert counted["hybridkv_heads"] == len(observer.kept) * observer.num_kv_heads
    chunks = counted["hybridkv_chunks_hit_total"], counted["hybridkv_chunks_recalled_total"]
    assert chunks == observer.all_chunks
    for request in listed:
        hit, recalled = observer.chunks.get(given(request.request_id), (0, 0))
        assert request.hit_rate == (hit / (hit + recalled) if hit + recalled else None)
    assert sum(request.hit_rate is not None for request in listed) > 2
    fell_back = [
        request_id
        for request_id, report in reports.items()
        if not report["compressed"]
        and report["prompt_tokens"] >= LEAST
        and request_id not in requests.disabled
    ]
    assert counted["hybridkv_fallbacks_total"] == len({*fell_back, *requests.greedy & {*ended.aborted}})
    assert fell_back


def test_a_prompt_counts_whose_client_leaves_while_it_is_compressed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker and scheduler count it, so that kept tokens have their prompt tokens."""
    schedule_asynchronously(monkeypatch)
    with engine(tiny_model, options={"budget": BUDGET}) as ours:
        before, vllm_engine = counters(), ours.llm.llm_engine
        ask = Ask("", SCENE * 10)
        vllm_engine.add_request("leaves", ask.prompt(), ask.sampling())
        vllm_engine.step()
        (request,) = ours.scheduler.requests.values()
        assert request.num_in_flight_tokens == request.num_prompt_tokens
        vllm_engine.abort_request(["leaves"])
        for _ in range(3):
            ours.core.step_fn()
        changes = {name: value - before.get(name, 0.0) for name, value in counters().items()}
        assert changes["hybridkv_compress_seconds_count"] == 1
        assert changes["hybridkv_kept_tokens_total"] > 0
        assert changes["hybridkv_requests_compressed_total"] == 1
        assert changes["hybridkv_prompt_tokens_total"] == request.num_prompt_tokens
        assert changes["hybridkv_blocks_freed_total"] == 0
        ours.assert_empty()
