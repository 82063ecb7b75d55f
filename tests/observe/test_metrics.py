"""The counters: all names from the start, sums over processes, and nothing left of a dead one's gauges."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hybridkv_vllm.observe.metrics import (
    LABELLED,
    METRICS,
    LiveCollector,
    engine_metrics,
    is_alive,
    prepare_directory,
    read_samples,
    worker_metrics,
)
from hybridkv_vllm.plan import make_plan

NAMES = {f"{name}_total" if description.kind == "counter" else name for name, description in METRICS.items()}


def exposed(text: str) -> dict[str, float]:
    """Samples of a `/metrics` text; labels are part of the name."""
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = "".join(f'{{{name}="{value}"}}' for name, value in sample.labels.items())
            values[sample.name + label] = sample.value
    return values


def scraped(directory: Path) -> dict[str, float]:
    """What the API server shows, which must be what it reads for its own JSON."""
    registry = CollectorRegistry()
    registry.register(LiveCollector(str(directory)))
    values = exposed(generate_latest(registry).decode())
    read = {
        sample.name + "".join(f'{{{name}="{value}"}}' for name, value in sample.labels.items()): sample.value
        for sample in read_samples()
    }
    assert values == read
    return values


def count_as_rank(connection: Connection, num_ranks: int, host_bytes: int) -> None:
    """A worker: each message sets the host bytes anew, the first also counts one compression."""
    metrics = worker_metrics(num_ranks)
    metrics.compressed(100.0, num_static=3, num_dynamic=1)
    metrics.chunks(hit=30, recalled=2)
    metrics.chunks(hit=1, recalled=5)
    metrics.heads_pruned("host_pool_full", 2)
    metrics.heads_pruned("host_pool_full", 3)
    metrics.set_host_bytes(1)
    metrics.set_host_bytes(host_bytes)
    connection.send("counted")
    while True:
        metrics.set_host_bytes(connection.recv())
        connection.send("set")


def serve_registry(connection: Connection) -> None:
    """An API server: its own /metrics, as its registry gives it at each message."""
    prepare_directory()
    connection.send("prepared")
    while True:
        connection.recv()
        connection.send(generate_latest(REGISTRY).decode())


def test_every_name_shows_zero_from_the_start(directory: Path) -> None:
    worker_metrics(1)
    expected = {name: 0 for name in NAMES if name.removesuffix("_total") not in LABELLED}
    assert {"hybridkv_chunks_recalled_total", "hybridkv_chunks_hit_total", "hybridkv_host_bytes"} < set(
        expected
    )
    assert scraped(directory) == expected
    text = generate_latest(_registry(directory)).decode()
    assert "# TYPE hybridkv_host_bytes gauge" in text
    assert "# TYPE hybridkv_chunks_recalled_total counter" in text


def _registry(directory: Path) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(LiveCollector(str(directory)))
    return registry


def test_the_help_text_names_the_unit_of_pruned_heads(directory: Path) -> None:
    worker_metrics(1).heads_pruned("landmarks", 4)
    text = generate_latest(_registry(directory)).decode()
    (line,) = (line for line in text.splitlines() if line.startswith("# HELP hybridkv_fallbacks"))
    assert "KV heads" in line
    assert scraped(directory)['hybridkv_fallbacks_total{reason="landmarks"}'] == 4


def test_requests_and_heads_of_one_reason_do_not_mix(directory: Path) -> None:
    engine_metrics().fallback("pool_too_small")
    worker_metrics(1).heads_pruned("host_pool_full", 7)
    values = scraped(directory)
    assert values['hybridkv_fallbacks_total{reason="pool_too_small"}'] == 1
    assert values['hybridkv_fallbacks_total{reason="host_pool_full"}'] == 7


def test_ranks_add_up_and_a_dead_one_holds_nothing(directory: Path, start_worker: Callable[..., Any]) -> None:
    server = start_worker(serve_registry)
    assert server.hear() == "prepared"
    engine_metrics().compressed(make_plan(400, (), 0.25, 64), blocks_freed=25)
    engine_metrics().set_arena_blocks(7)
    ranks = [start_worker(count_as_rank, 2, host_bytes) for host_bytes in (1000, 200)]
    for rank in ranks:
        assert rank.hear() == "counted"
    totals = {
        "hybridkv_requests_compressed_total": 1,
        "hybridkv_prompt_tokens_total": 400,
        "hybridkv_blocks_freed_total": 25,
        "hybridkv_blocks_arena": 7,
        "hybridkv_kept_tokens_total": 100,
        'hybridkv_heads{type="static"}': 6,
        'hybridkv_heads{type="dynamic"}': 2,
        "hybridkv_chunks_hit_total": 62,
        "hybridkv_chunks_recalled_total": 14,
        'hybridkv_fallbacks_total{reason="host_pool_full"}': 10,
    }
    assert scraped(directory) == {**totals, "hybridkv_host_bytes": 1200}
    # `set` is a process' own value: it replaces that, not the other's.
    ranks[1].tell(50)
    assert ranks[1].hear() == "set"
    assert scraped(directory) == {**totals, "hybridkv_host_bytes": 1050}

    ranks[0].kill()
    assert not is_alive(ranks[0].process.pid)
    expected = {**totals, "hybridkv_host_bytes": 50}
    assert scraped(directory) == expected
    server.tell("scrape")
    text = server.hear()
    assert isinstance(text, str)
    shown = exposed(text)
    assert {name: value for name, value in shown.items() if name.startswith("hybridkv_")} == expected


@pytest.mark.parametrize("pid", [1, None], ids=["someone else's", "this process"])
def test_a_running_process_is_alive(pid: int | None) -> None:
    assert is_alive(pid or os.getpid())
