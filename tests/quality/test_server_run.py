"""Answers over HTTP: a real server, and what its counters can and cannot tell."""

from __future__ import annotations

import asyncio
import socket
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import uvicorn
from fastapi import FastAPI, Header, HTTPException
from hybridkv_quality.evaluate_server import in_batches
from hybridkv_quality.records import JsonLines, Record
from hybridkv_quality.report import Results
from hybridkv_quality.sample import Message, Sample
from hybridkv_quality.server_target import OpenAIServer, ServerRun, ServerSettings
from hybridkv_quality.settings import UsageError
from openai.types.chat import ChatCompletion
from quality_cases import heads_example, write_lines
from starlette.datastructures import State

from hybridkv_vllm.cli import main
from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.observe.api import HybridKVEndpoints, Stats
from hybridkv_vllm.observe.heads import RequestHeads
from hybridkv_vllm.observe.metrics import DIRECTORY_VARIABLE
from hybridkv_vllm.plan import PAGE_TOKENS, arena_blocks, ceil_pages
from hybridkv_vllm.server import serve
from hybridkv_vllm.tiny_model import sample_picture

TOKENS, BUDGET, BYTES = 600, 0.25, 100


def stats(**counted: Any) -> Stats:
    zero = {
        "requests_compressed": 0,
        "prompt_tokens": 0,
        "kept_tokens": 0.0,
        "kept_share": None,
        "blocks_freed": 0,
        "blocks_arena": 0,
        "blocks_replaced": 0,
        "heads": {},
        "chunks_recalled": 0,
        "chunks_hit": 0,
        "hit_rate": None,
        "host_bytes": 0,
        "compress_seconds_count": 0,
        "compress_seconds_sum": 0.0,
        "fallbacks": {},
        "options": ServerOptions(),
    }
    return Stats(**{**zero, **counted})


def completion(number: int, output_tokens: int) -> ChatCompletion:
    return ChatCompletion.model_validate(
        {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "red"}}
            ],
            "usage": {
                "prompt_tokens": TOKENS,
                "completion_tokens": output_tokens,
                "total_tokens": TOKENS + output_tokens,
            },
        }
    )


class FakeServer:
    """Answers every question alike; its counters change by what the test says."""

    policy = "hybridkv"

    def __init__(
        self, change: dict[str, Any] | None, compressed: int, output_tokens: Sequence[int] = (3, 3)
    ) -> None:
        self.options = None if change is None else ServerOptions()
        self._change = change or {}
        self._compressed = compressed
        self._output_tokens = output_tokens
        self._asked = 0

    def stats(self) -> Stats:
        return stats(**self._change) if self._asked else stats()

    def heads(self) -> list[RequestHeads]:
        heads = heads_example("t", BUDGET).heads
        return [
            heads.model_copy(update={"request_id": f"chatcmpl-{number}-0"})
            for number in range(self._compressed)
        ]

    def ask(self, sample: Sample, budget: float | None) -> ChatCompletion:
        self._asked += 1
        number = int(sample.name)
        return completion(number, self._output_tokens[number])


def answers(server: FakeServer, budget: float | None = BUDGET) -> list[Record]:
    samples = [Sample("t", str(n), (Message("user", ("q",)),), "red", f"c{n}") for n in range(2)]
    settings = ServerSettings(url="http://x/v1", concurrency=1, kv_bytes_per_token=BYTES)
    run = ServerRun(server, settings, "c")  # type: ignore[arg-type]
    return [message.record for message in run.answers(samples, budget) if message.record is not None]


FREED = TOKENS // PAGE_TOKENS
HELD = ceil_pages(TOKENS) - FREED + arena_blocks(BUDGET, TOKENS)


def test_counters_that_add_up_tell_what_each_prompt_held() -> None:
    change = {"requests_compressed": 2, "prompt_tokens": 2 * TOKENS, "blocks_freed": 2 * FREED}
    for record in answers(FakeServer(change, 2)):
        assert record.score == 1.0
        assert (record.policy, record.budget, record.compressed) == ("hybridkv", BUDGET, True)
        assert (record.blocks_full, record.blocks_held) == (ceil_pages(TOKENS), HELD)
        assert record.block_bytes == PAGE_TOKENS * BYTES
        assert record.host_bytes == FREED * PAGE_TOKENS * BYTES // 2


def test_blocks_that_stay_are_held_beside_the_arena() -> None:
    change = {"requests_compressed": 2, "prompt_tokens": 2 * TOKENS, "blocks_freed": 0}
    held = {record.blocks_held for record in answers(FakeServer(change, 2))}
    assert held == {ceil_pages(TOKENS) + arena_blocks(BUDGET, TOKENS)}


@pytest.mark.parametrize(
    "change",
    [
        # Somebody else's prompt, one that was preempted, blocks that only some gave back.
        {"requests_compressed": 3, "prompt_tokens": 3 * TOKENS, "blocks_freed": 3 * FREED},
        {"requests_compressed": 2, "prompt_tokens": 2 * TOKENS + 5, "blocks_freed": 2 * FREED},
        {"requests_compressed": 2, "prompt_tokens": 2 * TOKENS, "blocks_freed": FREED},
    ],
)
def test_counters_that_do_not_add_up_tell_nothing(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridkv_quality.server_target.HEADS_SECONDS", 0.0)
    assert {record.blocks_held for record in answers(FakeServer(change, 2))} == {None}


def test_an_answer_of_one_token_is_not_said_to_hold_anything() -> None:
    change = {"requests_compressed": 2, "prompt_tokens": 2 * TOKENS, "blocks_freed": FREED}
    short, long = answers(FakeServer(change, 2, output_tokens=(1, 3)))
    assert short.blocks_held is None
    assert long.blocks_held == HELD


def test_prompts_served_uncompressed_hold_all_their_blocks() -> None:
    for record in answers(FakeServer({}, 0)):
        assert record.compressed is False
        assert record.blocks_held == record.blocks_full


def test_a_server_without_counters_is_reported_as_served() -> None:
    server = FakeServer(None, 0)
    server.policy = "as served"
    for record in answers(server, None):
        assert (record.policy, record.budget, record.compressed) == ("as served", None, None)
        assert record.blocks_held is None


def test_the_full_cache_is_called_so_whatever_the_servers_policy() -> None:
    assert {record.policy for record in answers(FakeServer({}, 0), 1.0)} == {"full"}


def test_batches_are_whole_contexts() -> None:
    samples = [Sample("t", str(n), (), "a", f"c{n // 3}") for n in range(10)]
    assert [[s.name for s in batch] for batch in in_batches(samples, 4)] == [  # type: ignore[arg-type]
        ["0", "1", "2", "3", "4", "5"],
        ["6", "7", "8", "9"],
    ]


@pytest.mark.slow
@pytest.mark.server
def test_a_real_server_is_asked_and_its_memory_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions"
    questions.mkdir()
    lines = []
    for number in range(3):
        sample_picture().crop((0, 40 * number, 448, 336 + 40 * number)).save(questions / f"{number}.png")
        common = {"question": "What is it?", "answer": "a woman", "metric": "words"}
        lines.append({"id": number, "task": "photo", "images": [f"{number}.png"], **common})
    write_lines(questions / "q.jsonl", lines)
    options = ["--attention-backend", "hybridkv", "--additional-config.hybridkv.min_prompt_tokens", "64"]
    options += ["--max-model-len", "2048", "--max-num-seqs", "4", "--num-gpu-blocks-override", "400"]
    options += [
        "--max-num-batched-tokens",
        "2048",
        "--served-model-name",
        "tiny",
        "--limit-mm-per-prompt.image",
        "2",
    ]
    out = tmp_path / "out"
    given = ["eval", "--out", str(out), "--samples", str(questions), "--format", "jsonl"]
    given += ["--budgets", "0.25,1.0", "--concurrency", "2", "--kv-bytes-per-token", "2048"]
    with serve(tiny_model, options, tmp_path / "log") as server:
        assert main([*given, "--url", server.url + "/v1", "--served-model", "huge"]) == 2
        assert "the server has tiny" in capsys.readouterr().err
        assert main([*given, "--url", server.url + "/v1"]) == 0
        assert main([*given, "--url", server.url + "/v1", "--json"]) == 0
    records = list(JsonLines(out / "records.jsonl", Record).read())
    assert sorted((r.policy, r.budget or 0, r.sample) for r in records) == [
        (policy, budget, name) for policy, budget in (("full", 1.0), ("hybridkv", 0.25)) for name in "012"
    ]
    for record in records:
        assert record.budget is not None
        tokens = record.prompt_tokens
        assert record.compressed
        assert record.blocks_held == arena_blocks(record.budget, tokens) + (tokens % PAGE_TOKENS > 0)
        # Of eight heads four are dynamic, and a quarter of the cache holds the landmarks of all four.
        recalling = 4 if record.policy == "hybridkv" else 0
        assert record.host_bytes == tokens // PAGE_TOKENS * PAGE_TOKENS * 2048 * recalling // 8
    results = Results.model_validate_json((out / "results.json").read_text())
    assert results.conditions[0].memory.seen == 3
    assert (out / "plots" / "heads_photo.png").exists()


@pytest.fixture
def url_with_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with a key: HybridKV's own routes, and a list of models behind the same key."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    endpoints, app = HybridKVEndpoints(), FastAPI()
    endpoints.attach_router(app)
    config = SimpleNamespace(additional_config={"hybridkv": {}})
    asyncio.run(
        endpoints.init_state(SimpleNamespace(vllm_config=config), State(), Namespace(api_key=["right"]))
    )

    @app.get("/v1/models")
    def models(authorization: Annotated[str, Header()]) -> dict[str, Any]:
        if authorization != "Bearer right":
            raise HTTPException(401)
        return {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "us"}]}

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # From here on a client waits, where it would be refused until the thread is that far.
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


def test_a_servers_key_comes_from_the_environment(url_with_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    target = OpenAIServer(ServerSettings(url=url_with_key))
    assert (target.model, target.policy) == ("m", "hybridkv")
    assert target.stats() is not None
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(UsageError, match="is OPENAI_API_KEY the server's key"):
        OpenAIServer(ServerSettings(url=url_with_key))
