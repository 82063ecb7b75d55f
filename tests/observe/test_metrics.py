"""The counters: all names from the start, sums over processes, and nothing left of a dead one's gauges."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.observe import metrics
from hybridkv_vllm.observe.metrics import (
    COMPRESS_BUCKETS,
    DIRECTORY_VARIABLE,
    LABELS,
    METRICS,
    VLLM_DIRECTORY_VARIABLE,
    LiveCollector,
    engine_metrics,
    is_alive,
    prepare_directory,
    read_samples,
    worker_metrics,
)
from hybridkv_vllm.plan import make_plan
from hybridkv_vllm.scheduling import scheduler
from hybridkv_vllm.worker.recall import NO_ROOM_FOR_LANDMARKS, NO_ROOM_ON_HOST

NAMES = {
    f"{name}_total" if description.kind == "counter" else name
    for name, description in METRICS.items()
    if description.kind != "histogram"
}

LABELLED = [
    f'{name}{{{label}="{value}"}}'
    for name in NAMES
    for labels in LABELS.get(name.removesuffix("_total"), ())
    for label, value in labels.items()
]


def histogram(*seconds: float) -> dict[str, float]:
    """What `/metrics` shows of these compressions' times."""
    name = "hybridkv_compress_seconds"
    limits = {floatToGoString(limit): limit for limit in COMPRESS_BUCKETS}
    return {
        **{f'{name}_bucket{{le="{le}"}}': sum(s <= limit for s in seconds) for le, limit in limits.items()},
        f"{name}_sum": pytest.approx(sum(seconds)),
        f"{name}_count": len(seconds),
    }


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


def count_as_rank(connection: Connection, num_ranks: int, tp_rank: int, host_bytes: int) -> None:
    """A worker: each message sets the host bytes anew, the first also counts one compression."""
    metrics = worker_metrics(num_ranks, tp_rank)
    metrics.compressed(100.0, num_static=3, num_dynamic=1, seconds=0.02 + tp_rank)
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


def test_a_folder_that_is_not_there_is_made(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = directory / "new" / "one"
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(folder))
    monkeypatch.setattr(metrics, "REGISTRY", CollectorRegistry())
    prepare_directory()
    # Nobody else is to read or write there.
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []
    prepare_directory()


def test_a_folder_that_cannot_be_made_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "file").touch()
    for folder in (directory / "file", directory / "file" / "new"):
        monkeypatch.setenv(DIRECTORY_VARIABLE, str(folder))
        with pytest.raises(HybridKVConfigError) as refused:
            prepare_directory()
        assert str(refused.value).startswith(
            f"hybridkv: {DIRECTORY_VARIABLE}={folder} cannot be written to ("
        )
        assert str(refused.value).endswith("); name another folder, or unset it")


def test_every_name_shows_zero_from_the_start(directory: Path) -> None:
    worker_metrics(1, 0)
    plain = {name for name in NAMES if name.removesuffix("_total") not in LABELS}
    expected = dict.fromkeys((*plain, *LABELLED), 0) | histogram()
    assert {"hybridkv_chunks_recalled_total", "hybridkv_chunks_hit_total", "hybridkv_host_bytes"} < set(
        expected
    )
    assert scraped(directory) == expected
    text = generate_latest(_registry(directory)).decode()
    assert "# TYPE hybridkv_host_bytes gauge" in text
    assert "# TYPE hybridkv_chunks_recalled_total counter" in text
    assert "# TYPE hybridkv_compress_seconds histogram" in text


def test_the_reasons_that_show_zero_are_those_that_are_counted() -> None:
    text = inspect.getsource(scheduler)
    counted = {*re.findall(r'_fall_back\(\s*"(\w+)"', text), NO_ROOM_FOR_LANDMARKS, NO_ROOM_ON_HOST}
    assert {labels["reason"] for labels in LABELS["hybridkv_fallbacks"]} == counted


def _registry(directory: Path) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(LiveCollector(str(directory)))
    return registry


def test_the_help_text_names_the_unit_of_pruned_heads(directory: Path) -> None:
    worker_metrics(1, 0).heads_pruned("landmarks", 4)
    text = generate_latest(_registry(directory)).decode()
    (line,) = (line for line in text.splitlines() if line.startswith("# HELP hybridkv_fallbacks"))
    assert "KV heads" in line
    assert scraped(directory)['hybridkv_fallbacks_total{reason="landmarks"}'] == 4


def test_requests_and_heads_of_one_reason_do_not_mix(directory: Path) -> None:
    engine_metrics().fallback("pool_too_small")
    worker_metrics(1, 0).heads_pruned("host_pool_full", 7)
    values = scraped(directory)
    assert values['hybridkv_fallbacks_total{reason="pool_too_small"}'] == 1
    assert values['hybridkv_fallbacks_total{reason="host_pool_full"}'] == 7


def test_ranks_add_up_and_a_dead_one_holds_nothing(directory: Path, start_worker: Callable[..., Any]) -> None:
    server = start_worker(serve_registry)
    assert server.hear() == "prepared"
    engine_metrics().compressed(make_plan(400, (), 0.25, 64), blocks_freed=25)
    engine_metrics().set_blocks(arena=7, replaced=25)
    ranks = [
        start_worker(count_as_rank, 2, tp_rank, host_bytes) for tp_rank, host_bytes in enumerate((1000, 200))
    ]
    for rank in ranks:
        assert rank.hear() == "counted"
    totals = {
        **dict.fromkeys(LABELLED, 0),
        "hybridkv_requests_compressed_total": 1,
        "hybridkv_prompt_tokens_total": 400,
        "hybridkv_blocks_freed_total": 25,
        "hybridkv_blocks_arena": 7,
        "hybridkv_blocks_replaced": 25,
        "hybridkv_kept_tokens_total": 100,
        'hybridkv_heads{type="static"}': 6,
        'hybridkv_heads{type="dynamic"}': 2,
        "hybridkv_chunks_hit_total": 62,
        "hybridkv_chunks_recalled_total": 14,
        'hybridkv_fallbacks_total{reason="host_pool_full"}': 10,
        # The first tensor rank's time stands for both.
        **histogram(0.02),
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


def test_times_are_counted_over_processes_and_in_the_right_bucket(
    directory: Path, start_worker: Callable[..., Any]
) -> None:
    stages = [start_worker(count_as_rank, 2, 0, 0) for _ in range(2)]
    assert [stage.hear() for stage in stages] == ["counted"] * 2
    # A time that is a limit belongs to its bucket.
    times = (0.0, 0.0005, 0.001, 0.0010001, 0.5, 10.0, 10.1, 7200.0)
    metrics = worker_metrics(2, 0)
    for seconds in times:
        metrics.compressed(1.0, num_static=1, num_dynamic=0, seconds=seconds)
    shown = {name: value for name, value in scraped(directory).items() if "seconds" in name}
    assert shown == histogram(*times, 0.02, 0.02)
    # What a dead process has timed stays.
    stages[0].kill()
    assert scraped(directory)["hybridkv_compress_seconds_count"] == len(times) + 2


def test_vllms_own_collector_reads_the_same_where_there_are_several_api_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the files lie in vLLM's own directory, among its own; to its collector a name is a pattern."""
    directory = tmp_path / "plain"
    directory.mkdir()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(directory))
    monkeypatch.delenv(VLLM_DIRECTORY_VARIABLE, raising=False)
    worker_metrics(1, 0).compressed(10.0, num_static=1, num_dynamic=1, seconds=0.3)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    shown = exposed(generate_latest(registry).decode())
    assert shown == scraped(directory)
    assert shown.items() >= histogram(0.3).items()


def test_what_a_dead_engine_held_is_held_no_more(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_metrics().set_blocks(arena=7, replaced=25)
    worker_metrics(1, 0).set_host_bytes(1000)
    monkeypatch.setattr(metrics, "is_alive", lambda pid: False)
    shown = scraped(directory)
    assert "hybridkv_requests_compressed_total" in shown
    assert not {"hybridkv_blocks_arena", "hybridkv_blocks_replaced", "hybridkv_host_bytes"} & shown.keys()


def test_a_running_process_is_alive() -> None:
    assert is_alive(os.getpid())


def test_a_running_process_of_someone_else_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    # In its place: root may send a signal to everyone.
    monkeypatch.setattr(os, "kill", refuse)
    assert is_alive(1)
