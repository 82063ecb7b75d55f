"""The HTTP routes on a FastAPI application, with the files of real writers behind them."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.datastructures import State

from hybridkv_vllm.observe.api import HeadsResponse, HybridKVEndpoints, Stats
from hybridkv_vllm.observe.heads import heads_report
from hybridkv_vllm.observe.metrics import engine_metrics, worker_metrics
from hybridkv_vllm.plan import make_plan

OPTIONS = {"classifier": "union", "theta": 0.8}


@pytest.fixture
def endpoints(directory: Path) -> HybridKVEndpoints:
    return HybridKVEndpoints()


@pytest.fixture
def client(endpoints: HybridKVEndpoints) -> TestClient:
    app = FastAPI()
    endpoints.attach_router(app)
    return TestClient(app)


def configure(endpoints: HybridKVEndpoints) -> None:
    """What vLLM does once the engine runs."""
    engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"hybridkv": OPTIONS}))
    asyncio.run(endpoints.init_state(engine, State(), Namespace()))


def test_before_the_first_request(client: TestClient) -> None:
    answer = client.get("/hybridkv/heads")
    assert answer.status_code == 200
    assert answer.json() == {"requests": [], "classifier": None, "theta": None}
    stats = Stats.model_validate(client.get("/hybridkv/stats").json())
    assert (stats.chunks_recalled, stats.chunks_hit, stats.host_bytes) == (0, 0, 0)
    assert stats.hit_rate is None
    assert stats.kept_share is None


def test_heads(client: TestClient, endpoints: HybridKVEndpoints) -> None:
    configure(endpoints)
    report = heads_report(0, 0, 0)
    report.record(
        "cmpl-1",
        prompt_tokens=4000,
        arena_pages=100,
        figure=[[0.9501, 0.25], [0.5, 0.125]],
        dynamic=[[False, True], [True, True]],
        recalled=[[False, True], [False, False]],
        pages=[[10, 70], [15, 5]],
        kept_tokens=[[150, 900], [240, 80]],
    )
    report.record("cmpl-2", 17, 1, [[1.0]], [[False]], [[False]], [[1]], [[16]])
    answer = client.get("/hybridkv/heads")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["classifier"], body["theta"]) == ("union", 0.8)
    assert [request["request_id"] for request in body["requests"]] == ["cmpl-2", "cmpl-1"]
    assert body["requests"][1] == {
        "request_id": "cmpl-1",
        "prompt_tokens": 4000,
        "arena_pages": 100,
        "dynamic_share": 0.75,
        "recalled_share": 0.25,
        "layers": [
            [
                {"figure": 0.9501, "type": "static", "recalled": False, "pages": 10, "kept_tokens": 150},
                {"figure": 0.25, "type": "dynamic", "recalled": True, "pages": 70, "kept_tokens": 900},
            ],
            [
                {"figure": 0.5, "type": "dynamic", "recalled": False, "pages": 15, "kept_tokens": 240},
                {"figure": 0.125, "type": "dynamic", "recalled": False, "pages": 5, "kept_tokens": 80},
            ],
        ],
    }
    assert HeadsResponse.model_validate(body).model_dump() == body


def test_stats(client: TestClient, endpoints: HybridKVEndpoints) -> None:
    configure(endpoints)
    engine_metrics().compressed(make_plan(400, (), 0.25, 64), blocks_freed=25)
    worker = worker_metrics(1)
    worker.compressed(100.0, num_static=3, num_dynamic=5)
    worker.chunks(hit=30, recalled=10)
    worker.set_host_bytes(4096)
    worker.heads_pruned("host_pool_full", 2)
    stats = Stats.model_validate(client.get("/hybridkv/stats").json())
    assert stats.kept_share == 0.25
    assert stats.heads == {"static": 3, "dynamic": 5}
    assert (stats.chunks_hit, stats.chunks_recalled, stats.hit_rate) == (30, 10, 0.75)
    assert stats.host_bytes == 4096
    assert stats.fallbacks == {"host_pool_full": 2}
    assert stats.options is not None
    assert stats.options.theta == 0.8


def test_the_routes_only_read_and_say_what_a_pruned_head_is(client: TestClient) -> None:
    for path in ("/hybridkv/heads", "/hybridkv/stats"):
        assert client.post(path).status_code == 405
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert "pruned" in schemas["Head"]["properties"]["recalled"]["description"]
    fields = (
        field
        for schema in ("HeadsResponse", "RequestHeads", "Head")
        for field in schemas[schema]["properties"].values()
    )
    assert all(field["description"] for field in fields)
