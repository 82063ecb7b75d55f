"""Budget 0.25: what is held, what is given back, and that the result depends on nothing but the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import (
    SCENE,
    TOLERANCE,
    Answer,
    Ask,
    Engine,
    answers,
    assert_same,
    crowd,
    engine,
    lifecycle_asks,
    picture,
    schedule_asynchronously,
)
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import ExternalBlockHash, get_block_hash, maybe_convert_block_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from hybridkv_vllm.observe.metrics import read_samples
from hybridkv_vllm.plan import PAGE_TOKENS, arena_blocks, ceil_pages

pytestmark = pytest.mark.slow

QUARTER = {"budget": 0.25}
LONG = SCENE * 45  # About 1024 tokens.


def compressible_asks() -> list[Ask]:
    """Requests whose answers a lost or misplaced page would change."""
    exempt = ("shorter than a page", "prompt log-probabilities")
    return [ask for ask in lifecycle_asks() if ask.name not in exempt]


def count(name: str) -> float:
    """A counter's value, over all its labels."""
    return sum(sample.value for sample in read_samples() if sample.name == name)


def pages(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    """The tokens of each full block."""
    full = len(tokens) // PAGE_TOKENS * PAGE_TOKENS
    return {tuple(tokens[start : start + PAGE_TOKENS]) for start in range(0, full, PAGE_TOKENS)}


def answers_in_turn(ours: Engine, asks: Sequence[Ask]) -> dict[str, list[Answer]]:
    """Each request alone, so that nothing is shared but the prefix cache."""
    return {name: given for ask in asks for name, given in ours.ask([ask]).items()}


def test_the_result_does_not_depend_on_chunks_hits_batch_or_preemption(tiny_model: Path) -> None:
    """Invariant 4, and more than it asks: a resumed request continues as if it had never lost its blocks."""
    asks, many = compressible_asks(), crowd()
    with engine(tiny_model, options=QUARTER) as ours:
        alone = answers_in_turn(ours, asks)
        again = ours.ask(asks)  # All at once, prefixes cached.
        crowded = ours.ask(many)
        (output,) = ours.llm.generate([asks[1].prompt()], [asks[1].sampling()], use_tqdm=False)
        assert output.num_cached_tokens > 0, "no prefix was hit: the comparison would prove nothing"
    with engine(tiny_model, options=QUARTER, max_num_batched_tokens=80, max_num_seqs=8) as ours:
        chunked = ours.ask(asks)
    with engine(tiny_model, options=QUARTER, num_gpu_blocks_override=36, max_model_len=400) as ours:
        squeezed = ours.ask(many)
        assert ours.preemptions > 0
        ours.assert_empty()
    for ask in asks:
        assert_same(again[ask.name], alone[ask.name], f"{ask.name}, with prefix hits")
        assert_same(chunked[ask.name], alone[ask.name], f"{ask.name}, in small chunks")
    for ask in many:
        assert_same(squeezed[ask.name], crowded[ask.name], f"{ask.name}, preempted")


def test_pruning_is_real(tiny_model: Path, stock_answers: dict[str, list[Answer]]) -> None:
    """At a quarter the answers differ from stock vLLM's; otherwise the tests above would prove nothing."""
    ask = next(ask for ask in lifecycle_asks() if ask.name == "text only")
    with engine(tiny_model, options=QUARTER) as ours:
        pruned, exact = ours.ask([ask])[ask.name][0], stock_answers[ask.name][0]
    assert pruned.logprobs != pytest.approx(exact.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_a_request_holds_its_arena_and_its_tail(
    scheduling: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at after every step, at the pool itself."""
    if scheduling == "async":
        schedule_asynchronously(monkeypatch)
    ask = Ask("long", LONG, (picture(224, 224, 3),), params={"max_tokens": 40})
    freed_before = count("hybridkv_blocks_freed_total")
    compressed_before = count("hybridkv_requests_compressed_total")
    with engine(tiny_model, options=QUARTER, max_num_batched_tokens=500) as ours:
        ours.llm.llm_engine.add_request("r", ask.prompt(), ask.sampling())
        seen_after = 0
        held_when_scheduled: list[int] = []
        schedule = ours.scheduler.schedule

        def schedule_and_look(*args: Any, **kwargs: Any) -> SchedulerOutput:
            output = schedule(*args, **kwargs)
            held_when_scheduled.append(ours.held_blocks())
            return output

        monkeypatch.setattr(ours.scheduler, "schedule", schedule_and_look)
        while ours.llm.llm_engine.has_unfinished_requests():
            ours.llm.llm_engine.step()
            request: Request | None = next(iter(ours.scheduler.requests.values()), None)
            if request is None:
                continue
            num_prompt = request.num_prompt_tokens
            processed = request.num_computed_tokens - request.num_in_flight_tokens
            if processed < num_prompt:
                assert ours.held_blocks() >= ceil_pages(min(request.num_computed_tokens, num_prompt))
                continue
            seen_after += 1
            tail = ceil_pages(request.num_computed_tokens) - num_prompt // 16
            assert ours.held_blocks() == arena_blocks(0.25, num_prompt) + tail
        assert seen_after > 30
        assert max(held_when_scheduled) == ceil_pages(num_prompt) + arena_blocks(0.25, num_prompt)
        ours.assert_empty()
    assert count("hybridkv_requests_compressed_total") - compressed_before == 1
    assert count("hybridkv_blocks_freed_total") - freed_before == num_prompt // 16
    assert count("hybridkv_blocks_arena") == 0


def decoding_at_once(ours: Engine, asks: Sequence[Ask]) -> int:
    """Most requests that generated a token in the same step; all of them must finish."""
    for number, ask in enumerate(asks):
        ours.llm.llm_engine.add_request(str(number), ask.prompt(), ask.sampling())
    most = finished = 0
    while ours.llm.llm_engine.has_unfinished_requests():
        outputs = ours.llm.llm_engine.step()
        most = max(most, sum(bool(output.outputs[0].token_ids) for output in outputs))
        finished += sum(output.finished for output in outputs)
    assert finished == len(asks)
    return most


def test_more_requests_decode_at_once_in_the_same_memory(tiny_model: Path) -> None:
    """A pool of about five prompts of 1024 tokens: at least 2.5 times as many requests as stock vLLM."""
    # vLLM's kernels for log-probabilities take a third of the time under Triton's interpreter.
    params = {"max_tokens": 60, "logprobs": None}
    asks = [Ask(str(n), f"{n}. " + LONG, params=params) for n in range(20)]
    tokens = 5 * 1056
    settings = {"max_num_seqs": 20, "max_model_len": 1400}
    # vLLM's own CPU attention wants blocks of 32; the memory is the same.
    with engine(tiny_model, block_size=32, num_gpu_blocks_override=tokens // 32, **settings) as stock:
        with_stock = decoding_at_once(stock, asks)
    with engine(tiny_model, options=QUARTER, num_gpu_blocks_override=tokens // 16, **settings) as ours:
        with_ours = decoding_at_once(ours, asks)
        ours.assert_empty()
    print(f"decoding at once in memory for {tokens} tokens: stock {with_stock}, hybridkv {with_ours}")
    assert with_stock >= 4
    assert with_ours >= 2.5 * with_stock


def test_a_prompt_and_arena_that_need_the_whole_pool_do_not_lock_up(tiny_model: Path) -> None:
    """Several of the longest prompts that the server admits, in the smallest pool it starts with."""
    longest = 400
    pool = ceil_pages(longest) + arena_blocks(0.25, longest) + 1
    asks = [Ask(str(n), f"{n}: " + SCENE * 15, params={"max_tokens": 30}) for n in range(3)]
    with engine(tiny_model, options=QUARTER, num_gpu_blocks_override=pool, max_model_len=longest) as ours:
        assert decoding_at_once(ours, asks) >= 1
        ours.assert_empty()


def test_a_budget_that_cannot_fit_falls_back_and_is_counted(tiny_model: Path) -> None:
    """The request asks for more arena than there is beside its prompt: served uncompressed, not starved."""
    before = count("hybridkv_fallbacks_total")
    ask = Ask("greedy", SCENE * 15, params={"extra_args": {"hybridkv_budget": 1.0}})
    with engine(tiny_model, options=QUARTER, num_gpu_blocks_override=34, max_model_len=400) as ours:
        compressed = count("hybridkv_requests_compressed_total")
        assert len(ours.ask([ask])["greedy"][0].tokens) == 24
        assert count("hybridkv_requests_compressed_total") == compressed
        ours.assert_empty()
    assert count("hybridkv_fallbacks_total") == before + 1


def test_short_and_disabled_prompts_stay_exact(
    tiny_model: Path, stock_answers: dict[str, list[Answer]]
) -> None:
    asks = [ask for ask in lifecycle_asks() if ask.name in ("text only", "one picture")]
    disabled = [
        Ask(
            ask.name, ask.text, ask.pictures, params={**ask.params, "extra_args": {"hybridkv_enabled": False}}
        )
        for ask in asks
    ]
    before = count("hybridkv_requests_compressed_total")
    with engine(tiny_model, options={**QUARTER, "min_prompt_tokens": 1024}) as ours:
        short = ours.ask(asks)
    with engine(tiny_model, options=QUARTER) as ours:
        switched_off = ours.ask(disabled)
    assert count("hybridkv_requests_compressed_total") == before
    for ask in asks:
        assert_same(short[ask.name], stock_answers[ask.name], ask.name)
        assert_same(switched_off[ask.name], stock_answers[ask.name], ask.name)


def test_a_second_turn_hits_exact_blocks_only(tiny_model: Path) -> None:
    """The second turn repeats prompt and answer: the answer's KV was approximate and must not be reused."""
    first = Ask("first", SCENE * 6, params={"max_tokens": 64})
    with engine(tiny_model, options=QUARTER) as ours:
        (output,) = ours.llm.generate([first.prompt()], [first.sampling()], use_tqdm=False)
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        turn = [*tokens, *output.prompt_token_ids[:70]]
        (second,) = ours.llm.generate([{"prompt_token_ids": turn}], [first.sampling()], use_tqdm=False)
        assert second.num_cached_tokens == len(output.prompt_token_ids) // 16 * 16
    with engine(tiny_model, options=QUARTER, enable_prefix_caching=False) as ours:
        (fresh,) = ours.llm.generate([{"prompt_token_ids": turn}], [first.sampling()], use_tqdm=False)
    assert second.outputs[0].token_ids == fresh.outputs[0].token_ids


def test_what_routers_hear_of_the_prefix_cache_is_there(tiny_model: Path) -> None:
    """`--kv-events-config` publishes prompts, no answer (it is approximate), and no block that has gone."""
    heard: set[ExternalBlockHash] = set()
    published: set[tuple[int, ...]] = set()

    def hear(batch: KVEventBatch) -> None:
        for event in batch.events:
            if isinstance(event, BlockStored):
                heard.update(event.block_hashes)
                published.update(pages(event.token_ids))
            elif isinstance(event, BlockRemoved):
                heard.difference_update(event.block_hashes)

    with engine(
        tiny_model,
        options=QUARTER,
        num_gpu_blocks_override=36,
        max_model_len=400,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    ) as ours:
        ours.scheduler.kv_event_publisher.publish = hear
        asks = crowd()
        outputs = ours.llm.generate(
            [ask.prompt() for ask in asks], [ask.sampling() for ask in asks], use_tqdm=False
        )
        cached = {block.block_hash for block in ours.pool.blocks if block.block_hash is not None}
        assert ours.preemptions > 0
        assert heard
        assert heard <= {maybe_convert_block_hash(get_block_hash(key)) for key in cached}
    assert published == {page for output in outputs for page in pages(output.prompt_token_ids)}


def test_a_chunk_that_never_ran_leaves_nothing_in_the_prefix_cache(tiny_model: Path) -> None:
    """By priority a request is preempted in the step that has scheduled it: stock vLLM is wrong then."""
    low = Ask("low", "V " + SCENE * 18, params={"max_tokens": 8})
    high = Ask("high", "H " + SCENE * 2 + "x y " * 3, params={"max_tokens": 16}, raw=True)
    options = {"budget": 0.05, "dynamic_tier": "off"}
    with engine(tiny_model, options=options, max_model_len=448) as ours:
        (expected,) = ours.ask([low]).values()
    settings = {
        "max_model_len": 448,
        "max_num_batched_tokens": 128,
        "long_prefill_token_threshold": 64,
        "scheduling_policy": "priority",
        "num_gpu_blocks_override": 32,
    }
    with engine(tiny_model, options=options, **settings) as ours:
        preempt, registered = ours.scheduler._preempt_request, []

        def watch(request: Request, *args: Any, **kwargs: Any) -> None:
            blocks = ours.manager.req_to_blocks[request.request_id]
            not_computed = blocks[request.num_computed_tokens // PAGE_TOKENS :]
            registered.append(sum(block.block_hash is not None for block in not_computed))
            preempt(request, *args, **kwargs)

        ours.scheduler._preempt_request = watch
        running = ours.llm.llm_engine
        running.add_request("low", low.prompt(), low.sampling(), priority=5)
        running.step()
        for number in range(3):
            more = {"extra_args": {"hybridkv_enabled": False}, "skip_reading_prefix_cache": True}
            running.add_request(str(number), high.prompt(), high.sampling(**more), priority=0)
        outputs = {}
        while running.has_unfinished_requests():
            outputs |= {output.request_id: output for output in running.step() if output.finished}
        assert max(registered) > 0
        assert_same(answers(outputs["low"]), expected, "low")
        ours.assert_empty()
