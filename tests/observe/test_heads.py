"""The report on prompts and KV heads: ranks put together, whole files only, the last 64 and 16 requests."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hybridkv_vllm.observe import heads
from hybridkv_vllm.observe.heads import (
    KEPT_REQUESTS,
    LISTED_REQUESTS,
    LONGEST_ID,
    HeadsReport,
    HeadTables,
    heads_report,
    read_heads,
    read_requests,
)
from hybridkv_vllm.plan import make_plan

HEADS = 2
LAYERS = 3
BUDGET = 0.0625  # Of 1,000 tokens and a few more: 4 blocks.


def code(number: int, pp_rank: int, tp_rank: int, layer: int, head: int) -> int:
    """A number that says whose head it is."""
    return number * 10_000 + pp_rank * 1000 + tp_rank * 100 + layer * 10 + head


def record(
    report: HeadsReport,
    number: int,
    pp_rank: int = 0,
    tp_rank: int = 0,
    layers: int = LAYERS,
    name: str | None = None,
) -> None:
    """Reports request `number`: every figure is made from its place."""
    places = [
        [code(number, pp_rank, tp_rank, layer, head) for head in range(HEADS)] for layer in range(layers)
    ]
    heads = HeadTables(
        figure=[[place / 8 for place in row] for row in places],
        dynamic=[[place % 2 == 0 for place in row] for row in places],
        recalled=[[place % 2 == 0 and tp_rank == 0 for place in row] for row in places],
        pages=[[place + 1 for place in row] for row in places],
        kept_tokens=[[place + 2 for place in row] for row in places],
    )
    plan = make_plan(1000 + number, (), BUDGET, 64)
    report.record(name or f"r{number}", plan, 0.01 + pp_rank + 10 * tp_rank, heads)


def names() -> list[str]:
    """Ids of the requests that are shown, in order."""
    return [request.request_id for request in read_heads()]


def report_as_rank(connection: Connection, dp_rank: int, pp_rank: int, tp_rank: int, layers: int) -> None:
    """A worker: reports each request it is told, and each end."""
    report = heads_report(dp_rank, pp_rank, tp_rank)
    connection.send("ready")
    while True:
        message = connection.recv()
        if len(message) == 3:
            report.end(*message)
        else:
            number, name = message
            record(report, number, pp_rank, tp_rank, layers, name)
        connection.send("reported")


def write_until_told(connection: Connection) -> None:
    """A worker: reports large requests one after the other, until it is told to stop."""
    report = heads_report(0, 0, 0)
    connection.send("ready")
    number = 0
    while not connection.poll():
        number += 1
        record(report, number, layers=60)
    connection.send(number)


def tell(worker: Any, number: int, name: str | None = None) -> None:
    worker.tell((number, name))
    assert worker.hear() == "reported"


def end(worker: Any, name: str, chunks_hit: int, chunks_recalled: int) -> None:
    worker.tell((name, chunks_hit, chunks_recalled))
    assert worker.hear() == "reported"


def test_ranks_of_a_request_are_put_together(directory: Path, start_worker: Callable[..., Any]) -> None:
    depth = {0: 2, 1: 1}  # Layers of each pipeline rank.
    ranks = {
        (pp, tp): start_worker(report_as_rank, 0, pp, tp, depth[pp]) for pp in range(2) for tp in range(2)
    }
    for worker in ranks.values():
        assert worker.hear() == "ready"
    assert names() == []
    # One rank after the other: shown only once all have reported.
    for number in (5, 6):
        for worker in ranks.values():
            assert f"r{number}" not in names()
            tell(worker, number)
    newest, older = read_heads()
    assert (newest.request_id, older.request_id) == ("r6", "r5")
    assert newest.prompt_tokens == 1006
    assert newest.arena_pages == 2 * (2 + 1) * HEADS * 4
    places = [
        [code(6, pp, tp, layer, head) for tp in range(2) for head in range(HEADS)]
        for pp in range(2)
        for layer in range(depth[pp])
    ]
    assert [[head.model_dump() for head in layer] for layer in newest.layers] == [
        [
            {
                "figure": place / 8,
                "type": "dynamic" if place % 2 == 0 else "static",
                "recalled": place % 2 == 0 and place // 100 % 10 == 0,
                "pages": place + 1,
                "kept_tokens": place + 2,
            }
            for place in layer
        ]
        for layer in places
    ]
    assert newest.dynamic_share == 1 / 2
    assert newest.recalled_share == 1 / 4

    listed = read_requests()
    assert [request.request_id for request in listed] == ["r6", "r5"]
    request = listed[0]
    assert request.prompt_tokens == 1006
    # The mean over heads, and the 14 tokens of the last block.
    flat = [place + 2 for layer in places for place in layer]
    assert request.kept_tokens == sum(flat) / len(flat) + 1006 % 16
    assert request.kept_share == request.kept_tokens / 1006
    assert (request.blocks_freed, request.arena_blocks) == (62, 4)
    assert (request.dynamic_share, request.recalled_share) == (1 / 2, 1 / 4)
    # Of each pipeline rank what its first tensor rank measured.
    assert request.compress_seconds == pytest.approx(0.01 + 1.01)
    assert listed[1].compressed_at < request.compressed_at <= time.time()

    # Chunks count once all ranks with heads that recall have seen the end: here the first of each stage.
    for number, (rank, worker) in enumerate(ranks.items()):
        assert read_requests()[0].hit_rate == (0.8 if number > 2 else None)
        end(worker, "r6", 90, 10 if rank[0] == 0 else 35)
    newest, older = read_requests()
    assert newest == request.model_copy(update={"hit_rate": 180 / 225})
    assert older.hit_rate is None
    # It is compressed again after a preemption, and has not ended.
    for worker in ranks.values():
        tell(worker, 6)
    assert read_requests()[0].hit_rate is None

    # The dead have left their files, but these do not count.
    for worker in ranks.values():
        worker.kill()
    assert read_heads() == read_requests() == []
    assert len(list(directory.glob("heads-*.json"))) == 4


def test_replicas_are_kept_apart(directory: Path, start_worker: Callable[..., Any]) -> None:
    first, second = (start_worker(report_as_rank, dp_rank, 0, 0, 1) for dp_rank in range(2))
    assert first.hear() == second.hear() == "ready"
    tell(first, 1, "a")
    tell(second, 2, "b")
    tell(first, 3, "c")
    # The same id in two replicas is two requests.
    tell(second, 4, "a")
    requests = read_heads()
    assert [(request.request_id, request.prompt_tokens) for request in requests] == [
        ("a", 1004),
        ("c", 1003),
        ("b", 1002),
        ("a", 1001),
    ]
    assert all(len(layer) == HEADS for request in requests for layer in request.layers)


def test_a_reader_never_sees_part_of_a_file(directory: Path, start_worker: Callable[..., Any]) -> None:
    writer = start_worker(write_until_told)
    assert writer.hear() == "ready"
    seen = set()
    # A torn file would fail to parse, a mixed one would hold other requests than the last in a row.
    while len(seen) < 60:
        requests = read_heads()
        if requests:
            numbers = [request.prompt_tokens - 1000 for request in requests]
            assert numbers == list(range(numbers[0], max(0, numbers[0] - KEPT_REQUESTS), -1))
            assert [request.layers[59][1].pages for request in requests] == [
                code(number, 0, 0, 59, 1) + 1 for number in numbers
            ]
            seen.add(numbers[0])
    writer.tell("stop")
    assert isinstance(written := writer.hear(), int)
    assert written >= max(seen)


def test_the_last_16_requests_stay(directory: Path) -> None:
    report = heads_report(0, 0, 0)
    for number in range(1, 21):
        record(report, number)
    assert names() == [f"r{number}" for number in range(20, 4, -1)]
    # A preempted request is compressed again: its last report counts, and is the newest.
    record(report, 30, name="r9")
    assert names()[:2] == ["r9", "r20"]
    assert len(names()) == KEPT_REQUESTS
    assert read_heads()[0].prompt_tokens == 1030
    for number in range(40, 45):
        record(report, number)
    assert [name for name in names() if name in ("r8", "r9", "r10", "r11")] == ["r9", "r11"]


def test_long_ids_are_shortened_and_still_told_apart(directory: Path) -> None:
    """A client may choose megabytes; vLLM adds what tells requests apart at the end."""
    report = heads_report(0, 0, 0)
    longest = "b" * LONGEST_ID
    for name in ("chatcmpl-" + "a" * 3_000_000 + "-1", "chatcmpl-" + "a" * 3_000_000 + "-2", longest):
        record(report, 1, name=name)
    report.end("chatcmpl-" + "a" * 3_000_000 + "-1", 3, 1)
    listed = {request.request_id: request.hit_rate for request in read_requests()}
    assert len(listed) == 3
    assert listed.pop(longest) is None
    for name, hit_rate in listed.items():
        assert len(name) == LONGEST_ID
        assert name.startswith("chatcmpl-aaa")
        assert hit_rate == (0.75 if name.endswith("aaa-1") else None)
    assert sum(file.stat().st_size for file in directory.iterdir()) < 20_000


def test_the_last_64_requests_are_listed(directory: Path) -> None:
    report = heads_report(0, 0, 0)
    for number in range(1, 71):
        record(report, number)
    listed = [request.request_id for request in read_requests()]
    assert listed == [f"r{number}" for number in range(70, 6, -1)]
    assert len(listed) == LISTED_REQUESTS
    assert names() == listed[:KEPT_REQUESTS]
    assert [request.request_id for request in read_heads(limit=1)] == ["r70"]
    # The heads of older ones are not in the file.
    (file,) = directory.iterdir()
    assert [entry["heads"] is not None for entry in json.loads(file.read_text())] == [False] * 48 + [
        True
    ] * 16
    record(report, 80, name="r20")
    assert names()[:2] == ["r20", "r70"]
    assert len(read_requests()) == LISTED_REQUESTS


def test_a_rank_that_is_ahead_hides_no_heads_that_all_have(
    directory: Path, start_worker: Callable[..., Any]
) -> None:
    ahead, behind = (start_worker(report_as_rank, 0, 0, tp_rank, 1) for tp_rank in range(2))
    assert ahead.hear() == behind.hear() == "ready"
    for number in range(1, 19):
        tell(ahead, number)
    for number in range(1, 18):
        tell(behind, number)
    assert [request.request_id for request in read_requests()] == [f"r{n}" for n in range(17, 0, -1)]
    # One rank has the heads of 3 to 18, the other those of 2 to 17.
    assert names() == [f"r{number}" for number in range(17, 2, -1)]


def test_blocks_that_stay_are_not_freed(directory: Path) -> None:
    heads = HeadTables(figure=[[0.5]], dynamic=[[True]], recalled=[[True]], pages=[[4]], kept_tokens=[[32]])
    heads_report(0, 0, 0).record("r1", make_plan(1000, ((10, 900),), BUDGET, 64, "gpu"), 0.1, heads)
    (request,) = read_requests()
    assert (request.blocks_freed, request.arena_blocks) == (0, 4)


def test_a_new_worker_of_a_rank_replaces_the_old(directory: Path) -> None:
    record(heads_report(0, 0, 0), 1)
    assert names() == ["r1"]
    record(heads_report(0, 0, 0), 2)
    assert names() == ["r2"]


def test_a_forked_child_leaves_its_parents_file_alone(directory: Path) -> None:
    report = heads_report(0, 0, 0)
    record(report, 1)
    (ours,) = directory.iterdir()
    assert ours.name.startswith(f"heads-0-0-0-{os.getpid()}-")
    before = ours.read_bytes()
    child = multiprocessing.get_context("fork").Process(target=record, args=(report, 2))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert ours.read_bytes() == before
    (theirs,) = set(directory.iterdir()) - {ours}
    assert theirs.name.startswith(f"heads-0-0-0-{child.pid}-")
    # The child is dead: what it wrote last does not stand for the rank.
    assert names() == ["r1"]


def test_a_full_disk_does_not_stop_the_worker(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = heads_report(0, 0, 0)
    record(report, 1)
    warnings: list[str] = []
    monkeypatch.setattr(os, "rename", _no_space)
    # What becomes of a record depends on how engines of other tests have set up vLLM's loggers.
    monkeypatch.setattr(heads.logger, "warning", lambda text, *args: warnings.append(text % args))
    record(report, 2)
    record(report, 3)
    assert warnings == [
        "hybridkv: /hybridkv/requests and /heads will lack requests, "
        "[Errno 28] No space left on device; free some space"
    ]
    assert names() == ["r1"]
    monkeypatch.undo()
    monkeypatch.setenv("HYBRIDKV_METRICS_DIR", str(directory))
    record(report, 4)
    assert names() == ["r4", "r3", "r2", "r1"]


def _no_space(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_directory_that_is_gone_stops_nobody(directory: Path) -> None:
    report = heads_report(0, 0, 0)
    shutil.rmtree(directory)
    record(report, 1)
    directory.mkdir()
    record(report, 2)
    assert names() == ["r2", "r1"]


def test_the_file_holds_no_more_than_the_figures(directory: Path) -> None:
    record(heads_report(0, 0, 0), 1)
    (file,) = directory.iterdir()
    (entry,) = json.loads(file.read_text())
    assert set(entry) == {
        "request_id",
        "recorded_at",
        "prompt_tokens",
        "arena_blocks",
        "blocks_freed",
        "compress_seconds",
        "num_heads",
        "num_dynamic",
        "num_recalled",
        "num_kept",
        "chunks_hit",
        "chunks_recalled",
        "heads",
    }
    assert set(entry["heads"]) == {"figure", "dynamic", "recalled", "pages", "kept_tokens"}


def test_a_wrong_type_is_refused(directory: Path) -> None:
    table: Any = [0.5]
    with pytest.raises(ValidationError, match="figure"):
        HeadTables(figure=table, dynamic=[[True]], recalled=[[True]], pages=[[1]], kept_tokens=[[1]])
