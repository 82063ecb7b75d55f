"""Heads that recall: the engine's memory, the host's memory, answers that depend on the prompt only."""

from __future__ import annotations

import json
import random
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    SCENE,
    TOLERANCE,
    Answer,
    Ask,
    Engine,
    assert_same,
    engine,
    picture,
    random_arrivals,
    schedule_asynchronously,
    video,
)
from hybridkv_kernels.recall.layout import LandmarkLayout
from torch.multiprocessing.reductions import StorageWeakRef
from vllm.config import set_current_vllm_config
from vllm.v1.worker.gpu import attn_utils, cudagraph_utils

from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.observe.heads import Head, RequestHeads, read_heads
from hybridkv_vllm.observe.metrics import read_samples
from hybridkv_vllm.plan import arena_blocks, ceil_pages
from hybridkv_vllm.worker.host_tier import HostTier
from hybridkv_vllm.worker.state import HybridKVModelState

pytestmark = pytest.mark.slow

# The tiny model's picture heads are dynamic, its text heads static: both kinds in every request.
RECALL = {"budget": 0.3}
STORE_BLOCK_GIB = 64 * 16 * 2 * 64 * 4 / 2**30  # 64 pages of the tiny model's heads in fp32.


def picture_asks(count: int = 5, max_tokens: int = 24) -> list[Ask]:
    """Prompts of about 350 tokens, most of them one picture's."""
    return [
        Ask(
            f"picture {n}",
            f"{n}. What is this?",
            (picture(504, 448 + 28 * (n % 3), n),),
            params={"max_tokens": max_tokens},
        )
        for n in range(count)
    ]


def count(name: str, **labels: str) -> float:
    """A counter's value, over all labels but these."""
    samples = [sample for sample in read_samples() if sample.name == name]
    return sum(s.value for s in samples if all(s.labels.get(k) == v for k, v in labels.items()))


def heads_of(ours: Engine, asks: Sequence[Ask]) -> list[RequestHeads]:
    """What the heads report says of these requests, newest last."""
    ours.ask(asks)
    ours.core.step_fn()
    return read_heads()[: len(asks)][::-1]


def host_tier(ours: Engine) -> HostTier | None:
    """The worker's own host tier."""
    recall = ours.core.model_executor.driver_worker.worker.model_runner.model_state._recall
    return None if recall is None else recall.tier


@contextmanager
def recalling(model: Path, **changes: Any) -> Iterator[Engine]:
    """An engine whose host memory must be empty again at the end; options and engine settings by name."""
    options = {name: changes.pop(name) for name in list(changes) if name in OPTIONS}
    with engine(model, options={**RECALL, **options}, **changes) as ours:
        yield ours
        ours.assert_empty()
        tier = host_tier(ours)
        if tier is not None:
            assert tier.num_free_blocks == tier.num_blocks
            assert count("hybridkv_host_bytes") == 0


# KV memory that the paper reports at a nominal 10%, of the full cache's (0.22 of 1.73 GB).
PAPER_SHARE = 0.22 / 1.73
OPTIONS = {
    "budget",
    "classifier",
    "dynamic_tier",
    "host_pool_gib",
    "kernels",
    "landmark",
    "pin_first_chunks",
    "pin_recent_chunks",
    "policy",
    "recall_interval",
    "theta",
}


def test_the_result_does_not_depend_on_chunks_hits_batch_or_preemption(tiny_model: Path) -> None:
    asks = [
        *picture_asks(),
        Ask("video", "What happens?", frames=video(56, 5)),
        Ask(
            "two answers",
            "Two, please.",
            (picture(504, 504, 8),),
            params={"n": 2, "temperature": 0.9, "seed": 7},
        ),
    ]
    long = picture_asks(6, max_tokens=90)
    with recalling(tiny_model) as ours:
        alone = {name: given for ask in asks for name, given in ours.ask([ask]).items()}
        recalled_shares = [request.recalled_share for request in read_heads()]
        assert len(recalled_shares) == len(asks) + 1, "each request once, that of two answers twice"
        assert all(0 < share < 1 for share in recalled_shares), "both kinds of heads must be there"
        again = ours.ask(asks)  # All at once, prefixes cached.
        (output,) = ours.llm.generate([asks[1].prompt()], [asks[1].sampling()], use_tqdm=False)
        assert output.num_cached_tokens > 0, "no prefix was hit: the comparison would prove nothing"
        roomy = ours.ask(long)
        assert ours.preemptions == 0
    with recalling(tiny_model, max_num_batched_tokens=96) as ours:
        chunked = ours.ask(asks)
    with recalling(tiny_model, num_gpu_blocks_override=78, max_model_len=640) as ours:
        squeezed = ours.ask(long)
        assert ours.preemptions > 0
    for ask in asks:
        assert_same(again[ask.name], alone[ask.name], f"{ask.name}, with prefix hits")
        assert_same(chunked[ask.name], alone[ask.name], f"{ask.name}, in small chunks")
    for ask in long:
        assert_same(squeezed[ask.name], roomy[ask.name], f"{ask.name}, preempted")


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize("tier", ["host", "gpu"])
def test_a_request_holds_its_arena_and_its_tail(
    tier: str, scheduling: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at after every step, at the pool itself. The GPU tier holds the prompt's blocks too."""
    if scheduling == "async":
        schedule_asynchronously(monkeypatch)
    (ask,) = picture_asks(1, max_tokens=40)
    before = {name: count(f"hybridkv_{name}_total") for name in ("blocks_freed", "chunks_hit")}
    with recalling(tiny_model, dynamic_tier=tier) as ours:
        ours.llm.llm_engine.add_request("r", ask.prompt(), ask.sampling())
        seen_after, host_blocks = 0, 0
        while ours.llm.llm_engine.has_unfinished_requests():
            ours.llm.llm_engine.step()
            request = next(iter(ours.scheduler.requests.values()), None)
            if request is None:
                continue
            tokens = request.num_prompt_tokens
            if request.num_computed_tokens - request.num_in_flight_tokens < tokens:
                continue
            seen_after += 1
            blocks = ceil_pages(request.num_computed_tokens) - (tokens // 16 if tier == "host" else 0)
            assert ours.held_blocks() == arena_blocks(RECALL["budget"], tokens) + blocks
            if tier == "host" and seen_after > 2:
                # Reserved for all heads, and trimmed to those that recall once their number is known.
                host_blocks = host_tier(ours).num_blocks - host_tier(ours).num_free_blocks
        assert seen_after > 30
        ours.core.step_fn()
        report = read_heads()[0]
        num_recalled = sum(head.recalled for layer in report.layers for head in layer)
        if tier == "host":
            assert host_blocks == -(-num_recalled * (tokens // 16) // 64) > 0
    freed = count("hybridkv_blocks_freed_total") - before["blocks_freed"]
    assert freed == (tokens // 16 if tier == "host" else 0)
    assert count("hybridkv_chunks_hit_total") > before["chunks_hit"]


def test_tiers_answer_alike_and_unlike_pruning(tiny_model: Path) -> None:
    asks = picture_asks(3)
    given: dict[str, dict[str, list[Answer]]] = {}
    for tier in ("host", "gpu", "off"):
        recalled = count("hybridkv_chunks_recalled_total")
        with recalling(tiny_model, dynamic_tier=tier) as ours:
            given[tier] = ours.ask(asks)
        assert (count("hybridkv_chunks_recalled_total") > recalled) == (tier != "off")
    for ask in asks:
        assert_same(given["gpu"][ask.name], given["host"][ask.name], ask.name)
    assert any(
        given["off"][ask.name][0].logprobs
        != pytest.approx(given["host"][ask.name][0].logprobs, abs=TOLERANCE)
        for ask in asks
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"recall_interval": 3, "pin_first_chunks": 1, "pin_recent_chunks": 1},
        {"landmark": "mean"},
        {"landmark": "minmax"},
        {"policy": "quest"},
        {"classifier": "sparsity", "theta": 1.0},
    ],
    ids=lambda changes: ", ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_options_of_recall(changes: dict[str, Any], tiny_model: Path) -> None:
    """Each serves, recalls, and gives the same result twice, the second time with prefix hits."""
    asks = picture_asks(2)
    recalled = count("hybridkv_chunks_recalled_total")
    with recalling(tiny_model, **changes) as ours:
        first, second = ours.ask(asks), ours.ask(asks)
        reports = read_heads()[:4]
    assert count("hybridkv_chunks_recalled_total") > recalled
    for ask in asks:
        assert_same(second[ask.name], first[ask.name], ask.name)
    if "policy" in changes or "theta" in changes:
        assert [report.recalled_share for report in reports] == [1] * 4


def test_buffers_are_there_before_the_cache(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that vLLM, which measures memory in between, leaves them their room."""
    initialize, seen = HybridKVModelState.initialize_kv_cache, []

    def begin(self: HybridKVModelState, *args: Any) -> None:
        seen.append(self._recall)
        initialize(self, *args)

    monkeypatch.setattr(HybridKVModelState, "initialize_kv_cache", begin)
    with recalling(tiny_model, kernels="triton") as ours:
        state = ours.core.model_executor.driver_worker.worker.model_runner.model_state
        assert seen
        assert all(recall is state._tables.recall for recall in seen)
    seen.clear()
    with engine(tiny_model, options={**RECALL, "dynamic_tier": "off"}):
        assert set(seen) == {None}


def test_an_interval_moves_fewer_chunks(tiny_model: Path) -> None:
    moved = []
    for interval in (1, 6):
        before = count("hybridkv_chunks_recalled_total")
        with recalling(tiny_model, recall_interval=interval) as ours:
            ours.ask(picture_asks(1))
        moved.append(count("hybridkv_chunks_recalled_total") - before)
    assert 0 < moved[1] < moved[0] / 2


def test_a_full_host_pool_prunes_counts_and_recovers(tiny_model: Path) -> None:
    """Room for a few heads' chunks: the others are pruned, nothing fails, the next request finds it again."""
    asks = picture_asks(2)
    with recalling(tiny_model, host_pool_gib=STORE_BLOCK_GIB * 1.01) as ours:
        assert host_tier(ours).num_blocks == 1
        first = {}
        for ask in asks:
            before = count("hybridkv_fallbacks_total", reason="host_pool_full")
            (report,) = heads_of(ours, [ask])
            heads = [head for layer in report.layers for head in layer]
            recalled = [head for head in heads if head.recalled]
            fits = 64 // (report.prompt_tokens // 16)
            assert len(recalled) == fits
            pruned = sum(head.type == "dynamic" for head in heads) - fits
            assert count("hybridkv_fallbacks_total", reason="host_pool_full") - before == pruned > 0
            first[ask.name] = ours.ask([ask])[ask.name]
        # Both at once: whoever comes second finds nothing left. Nobody waits, nobody fails.
        assert len(ours.ask(asks)) == 2
        for ask in asks:
            assert_same(ours.ask([ask])[ask.name], first[ask.name], ask.name)


def in_order(report: RequestHeads) -> list[Head]:
    """All heads in (layer, KV head) order, in which they find room in the tier."""
    return [head for layer in report.layers for head in layer]


def fallbacks() -> dict[str, float]:
    """Dynamic heads that were pruned so far, by reason."""
    return {
        reason: count("hybridkv_fallbacks_total", reason=reason)
        for reason in ("host_pool_full", "landmarks_do_not_fit")
    }


def grown(before: dict[str, float]) -> dict[str, float]:
    """What `fallbacks` has grown by, where it has."""
    return {reason: n - before[reason] for reason, n in fallbacks().items() if n > before[reason]}


def store_blocks_while_decoding(ours: Engine, ask: Ask) -> int:
    """Host blocks that the request holds in the end; before, as many as all its heads would need."""
    tier, held = host_tier(ours), []
    ours.llm.llm_engine.add_request("r", ask.prompt(), ask.sampling())
    while ours.llm.llm_engine.has_unfinished_requests():
        ours.llm.llm_engine.step()
        held.append(tier.num_blocks - tier.num_free_blocks)
    assert held[-5] < max(held)
    return held[-5]


def test_where_no_landmarks_fit_heads_are_pruned_and_counted(tiny_model: Path) -> None:
    (ask,) = picture_asks(1)
    before = fallbacks()
    with recalling(tiny_model, budget=0.05) as ours:
        (report,) = heads_of(ours, [ask])
    dynamic = sum(head.type == "dynamic" for head in in_order(report))
    assert report.recalled_share == 0
    assert grown(before) == {"landmarks_do_not_fit": dynamic}
    assert dynamic > 0


# A tenth of these prompts is 3 pages a head, 24 in all: every head's page of window and one more leave 8.
# Landmarks (a page) and 4 chunks take 3 pages more, so two heads recall, with a chunk each of what is left.
TENTH = {"budget": 0.1}
TENTH_RECALLING = 2


def test_only_the_most_dynamic_heads_recall_where_not_all_fit(tiny_model: Path) -> None:
    asks = picture_asks(3)[1:]
    given: dict[str, dict[str, list[Answer]]] = {}
    for tier in ("host", "gpu"):
        with recalling(tiny_model, **TENTH, dynamic_tier=tier) as ours:
            given[tier] = {}
            for ask in asks:
                before = fallbacks()
                given[tier] |= ours.ask([ask])
                ours.core.step_fn()
                report = read_heads()[0]
                heads = in_order(report)
                dynamic = [number for number, head in enumerate(heads) if head.type == "dynamic"]
                recalled = [number for number, head in enumerate(heads) if head.recalled]
                by_figure = sorted(dynamic, key=lambda number: heads[number].figure)
                assert recalled == sorted(by_figure[:TENTH_RECALLING])
                assert {heads[number].pages for number in recalled} == {1 + 5}
                assert sum(head.pages for head in heads) == report.arena_pages
                assert grown(before) == {"landmarks_do_not_fit": len(dynamic) - TENTH_RECALLING}
            together = ours.ask(asks)  # At once, prefixes cached.
        with recalling(tiny_model, **TENTH, dynamic_tier=tier, max_num_batched_tokens=96) as ours:
            chunked = ours.ask(asks)
        for ask in asks:
            assert_same(together[ask.name], given[tier][ask.name], f"{ask.name}, with prefix hits")
            assert_same(chunked[ask.name], given[tier][ask.name], f"{ask.name}, in small chunks")
    for ask in asks:
        assert_same(given["gpu"][ask.name], given["host"][ask.name], ask.name)


def test_host_blocks_without_chunks_of_heads_that_recall_go_back(tiny_model: Path) -> None:
    """A head's chunks take almost two blocks here, and those of a head that does not recall lie between."""
    pictures = (picture(1008, 700, 1), picture(1008, 700, 2))
    ask = Ask("large", "What is this?", pictures, params={"max_tokens": 12})
    with recalling(tiny_model, budget=0.03) as ours:
        held = store_blocks_while_decoding(ours, ask)
        report = read_heads()[0]
    heads, chunks = in_order(report), report.prompt_tokens // 16
    dynamic = [head for head in heads if head.type == "dynamic"]
    starts = [place * chunks for place, head in enumerate(dynamic) if head.recalled]
    blocks = {page // 64 for start in starts for page in range(start, start + chunks)}
    assert held == len(blocks) < 1 + max(blocks)


def test_heads_are_counted_by_what_they_lack(tiny_model: Path) -> None:
    """Room on the host for the first three heads' chunks, and in the arena for two of these to recall."""
    ask = picture_asks(3)[2]
    before = fallbacks()
    with recalling(tiny_model, **TENTH, host_pool_gib=STORE_BLOCK_GIB * 1.01) as ours:
        (report,) = heads_of(ours, [ask])
    heads = in_order(report)
    dynamic = [head for head in heads if head.type == "dynamic"]
    in_tier = dynamic[: 64 // (report.prompt_tokens // 16)]
    assert len(dynamic) > len(in_tier) == 3
    assert [head for head in in_tier if not head.recalled] == [max(in_tier, key=lambda head: head.figure)]
    assert sum(head.recalled for head in heads) == TENTH_RECALLING
    assert grown(before) == {"host_pool_full": len(dynamic) - 3, "landmarks_do_not_fit": 1}


def test_random_arrivals_aborts_and_preemptions_leave_no_chunk_behind(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under async scheduling, with a host pool that is often full."""
    schedule_asynchronously(monkeypatch)
    dice = random.Random(11)
    pictures = picture_asks(4)

    def new_request(number: int) -> tuple[Ask, dict[str, Any]]:
        ask = replace(dice.choice(pictures), text=f"{dice.random()} " + SCENE * dice.randrange(3))
        return ask, {"max_tokens": dice.randrange(1, 60)}

    settings = {"num_gpu_blocks_override": 60, "max_model_len": 560, "max_num_batched_tokens": 400}
    with recalling(tiny_model, host_pool_gib=4.01 * STORE_BLOCK_GIB, **settings) as ours:
        tier, free = host_tier(ours), []
        ended = random_arrivals(
            ours,
            dice,
            new_request,
            number=24,
            arrives=0.4,
            aborted=0.08,
            after_step=lambda: free.append(tier.num_free_blocks),
        )
        assert len(ended.aborted) > 2
        assert ours.preemptions > 0
        assert min(free) == 0, "the pool was never full"


def test_triton_kernels_answer_like_the_torch_kernels(tiny_model: Path) -> None:
    """The GPU's code path, interpreted, from the offload to the gather."""
    ask = Ask("picture", "What?", (picture(448, 448, 1),), params={"max_tokens": 4})
    given = {}
    for kernels in ("torch", "triton"):
        with recalling(tiny_model, kernels=kernels, enforce_eager=True) as ours:
            given[kernels] = ours.ask([ask])[ask.name]
            assert read_heads()[0].recalled_share > 0
    assert_same(given["triton"], given["torch"], "triton")


@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_recall_and_report_as_one(split: str, tiny_model: Path) -> None:
    """Each rank has its own arena pages, host pool and landmarks; the report puts the heads together."""
    (ask,) = picture_asks(1)
    with recalling(tiny_model, policy="quest") as one:
        one.ask([ask])
        whole = read_heads()[0]
    with engine(tiny_model, options={**RECALL, "policy": "quest"}, **{split: 2}) as two:
        first, second = two.ask([ask]), two.ask([ask])
        two.assert_empty()
        report = read_heads()[0]
    assert_same(second[ask.name], first[ask.name], ask.name)
    assert [len(layer) for layer in report.layers] == [len(layer) for layer in whole.layers]
    assert report.arena_pages == whole.arena_pages
    assert report.recalled_share == 1
    figures = [[head.figure for layer in r.layers for head in layer] for r in (report, whole)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


@pytest.mark.parametrize(
    ("split", "times"), [("", 1), ("tensor_parallel_size", 1), ("pipeline_parallel_size", 2)]
)
def test_ranks_count_a_prompt_once(split: str, times: int, tiny_model: Path) -> None:
    """Its tokens once; its time once for each pipeline rank."""
    names = ("hybridkv_kept_tokens_total", "hybridkv_compress_seconds_count")
    before = [count(name) for name in names]
    ask, settings = Ask("text", SCENE * 12), {split: 2} if split else {}
    with engine(tiny_model, options={"budget": 0.25, "policy": "snapkv"}, **settings) as ours:
        (output,) = ours.llm.generate([ask.prompt()], [ask.sampling()], use_tqdm=False)
        ours.assert_empty()
        kept, timed = (count(name) - old for name, old in zip(names, before, strict=True))
    tokens = len(output.prompt_token_ids)
    assert kept == pytest.approx(16 * arena_blocks(0.25, tokens) + tokens % 16)
    assert timed == times


def seven_billion_shape(tiny_model: Path, out: Path) -> Path:
    """The tiny model with the heads of Qwen2.5-VL-7B (28 query heads on 4 of size 128), in one layer."""
    shutil.copytree(tiny_model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((out / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 28 * 128,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "layer_types": ["full_attention"],
    }
    config["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    config["vision_config"]["out_hidden_size"] = 28 * 128
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_the_budget_counts_all_that_stays(tiny_model: Path, tmp_path: Path) -> None:
    """T over 8192, all heads dynamic, 10%: the pool itself shows a tenth of the full cache and 2 blocks."""
    model = seven_billion_shape(tiny_model, tmp_path / "seven-billion-shape")
    settings = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "max_model_len": 8448,
        "max_num_batched_tokens": 2048,
        "num_gpu_blocks_override": 600,
        "threads": 2,
    }
    options = {"budget": 0.1, "classifier": "sparsity", "theta": 1.0}
    tokens = 8203
    with recalling(model, **options, **settings) as ours:
        prompt = {"prompt_token_ids": [300 + n % 600 for n in range(tokens)]}
        ask = Ask("long", "", params={"max_tokens": 4})
        ours.llm.llm_engine.add_request("r", prompt, ask.sampling())
        held = []
        while ours.llm.llm_engine.has_unfinished_requests():
            ours.llm.llm_engine.step()
            request = next(iter(ours.scheduler.requests.values()), None)
            if request is not None and request.num_computed_tokens > tokens:
                held.append(ours.held_blocks())
        report = read_heads()[0]
    heads = [head for layer in report.layers for head in layer]
    assert all(head.recalled for head in heads)
    layout = LandmarkLayout(ServerOptions().landmark, 128, 2)
    chunks = tokens // 16
    arena = arena_blocks(0.1, tokens)
    assert report.arena_pages == arena * len(heads)
    assert sum(head.pages for head in heads) == report.arena_pages
    for head in heads:
        assert head.kept_tokens == 16 * (head.pages - layout.pages(chunks)) > 0
    full = ceil_pages(tokens)
    assert max(held) <= 0.1 * full + 2
    print(
        f"pool: {max(held)} of {full} blocks, {full / max(held):.2f}x; the paper's nominal 10% held "
        f"{PAPER_SHARE:.1%}, {1 / PAPER_SHARE:.2f}x"
    )


def test_an_engine_that_has_ended_leaves_no_memory_behind(tiny_model: Path) -> None:
    """Though its model lives on, as vLLM's does where Dynamo has a hook in it."""
    with recalling(tiny_model) as ours:
        ours.ask(picture_asks(1))
        runner = ours.core.model_executor.driver_worker.worker.model_runner
        model, tables = runner.model, runner.model_state._tables
        gone = [weakref.ref(part) for part in (tables, tables.pool, tables.recall, tables.recall.tier)]
        del runner, tables
    assert next(model.parameters()).numel()
    assert [part() for part in gone] == [None] * len(gone)


def test_the_small_cache_of_graph_profiling_is_taken_and_let_go(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU vLLM first captures graphs over a cache of a block a row, to see what they take."""
    asks = picture_asks(1)
    with recalling(tiny_model, budget=1.0, max_num_seqs=1, enforce_eager=True) as ours:
        expected = ours.ask(asks)
        ours.core.step_fn()
        ours.llm.reset_prefix_cache()
        runner = ours.core.model_executor.driver_worker.worker.model_runner
        config = runner.kv_cache_config
        monkeypatch.setattr(runner.cache_config, "num_gpu_blocks_override", None)
        monkeypatch.setattr(runner.compilation_config, "max_cudagraph_capture_size", 1)
        if not torch.cuda.is_available():
            monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
            monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
        allocate = attn_utils.allocate_kv_cache
        small: list[StorageWeakRef] = []

        def allocate_after_the_small_one(*args: Any) -> Any:
            assert all(storage.expired() for storage in small)
            return allocate(*args)

        monkeypatch.setattr(attn_utils, "allocate_kv_cache", allocate_after_the_small_one)
        with set_current_vllm_config(runner.vllm_config):
            cudagraph_utils._teardown_profiling_state(runner)
            cudagraph_utils._init_minimal_kv_cache_for_profiling(runner)
            assert runner.kv_cache_config.num_blocks == 1
            small.append(StorageWeakRef(runner.model_state._tables.pool.untyped_storage()))
            cudagraph_utils._teardown_profiling_state(runner)
            runner.cache_config.num_gpu_blocks = config.num_blocks
            runner.initialize_kv_cache(config)
        for name, answer in ours.ask(asks).items():
            assert_same(answer, expected[name], name)


def test_a_prompt_of_text_alone_sets_nothing_aside(tiny_model: Path) -> None:
    """Its heads are static: no host memory, and with the GPU tier too its blocks go back."""
    ask = Ask("text", SCENE * 20)
    for tier in ("host", "gpu"):
        freed = count("hybridkv_blocks_freed_total")
        with recalling(tiny_model, dynamic_tier=tier) as ours:
            (report,) = heads_of(ours, [ask])
        assert report.recalled_share == report.dynamic_share == 0
        assert sum(head.pages for layer in report.layers for head in layer) == report.arena_pages
        assert count("hybridkv_blocks_freed_total") - freed == report.prompt_tokens // 16
