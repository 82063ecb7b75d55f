"""The HTTP routes on a FastAPI application, with the files of real writers behind them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.datastructures import State

from hybridkv_vllm.observe.api import HeadsResponse, HybridKVEndpoints, RequestsResponse, Stats
from hybridkv_vllm.observe.heads import HeadTables, heads_report
from hybridkv_vllm.observe.metrics import engine_metrics, worker_metrics
from hybridkv_vllm.plan import make_plan

OPTIONS = {"classifier": "union", "theta": 0.8}
FIGURES = ("/hybridkv/stats", "/hybridkv/requests", "/hybridkv/heads")


@pytest.fixture
def endpoints(directory: Path, monkeypatch: pytest.MonkeyPatch) -> HybridKVEndpoints:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return HybridKVEndpoints()


@pytest.fixture
def client(endpoints: HybridKVEndpoints) -> TestClient:
    app = FastAPI()
    endpoints.attach_router(app)
    return TestClient(app)


def configure(endpoints: HybridKVEndpoints, api_key: list[str] | None = None) -> None:
    """What vLLM does once the engine runs."""
    engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"hybridkv": OPTIONS}))
    asyncio.run(endpoints.init_state(engine, State(), Namespace(api_key=api_key)))


def compress(name: str) -> None:
    """A worker's report of one prompt of 4,000 tokens and one of 17."""
    report = heads_report(0, 0, 0)
    heads = HeadTables(
        figure=[[0.9501, 0.25], [0.5, 0.125]],
        dynamic=[[False, True], [True, True]],
        recalled=[[False, True], [False, False]],
        pages=[[10, 70], [15, 5]],
        kept_tokens=[[150, 900], [240, 80]],
    )
    report.record(name, make_plan(4000, (), 0.1, 64), 0.125, heads)
    short = HeadTables(figure=[[1.0]], dynamic=[[False]], recalled=[[False]], pages=[[1]], kept_tokens=[[16]])
    report.record("cmpl-2", make_plan(17, (), 1.0, 64), 0.5, short)
    report.end(name, 7, 1)
    report.end("cmpl-2", 0, 0)


def test_before_the_first_request(client: TestClient) -> None:
    answer = client.get("/hybridkv/heads")
    assert answer.status_code == 200
    assert answer.json() == {"requests": [], "classifier": None, "theta": None}
    assert client.get("/hybridkv/requests").json() == {"requests": []}
    stats = Stats.model_validate(client.get("/hybridkv/stats").json())
    assert (stats.chunks_recalled, stats.chunks_hit, stats.host_bytes) == (0, 0, 0)
    assert stats.hit_rate is None
    assert stats.kept_share is None
    assert (stats.compress_seconds_count, stats.compress_seconds_sum) == (0, 0)


def test_heads(client: TestClient, endpoints: HybridKVEndpoints) -> None:
    configure(endpoints)
    compress("cmpl-1")
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
    (only,) = client.get("/hybridkv/heads?limit=1").json()["requests"]
    assert only == body["requests"][0]
    assert client.get("/hybridkv/heads?limit=0").status_code == 422


def test_requests(client: TestClient) -> None:
    compress("cmpl-1")
    body = client.get("/hybridkv/requests").json()
    newest, older = body["requests"]
    assert newest.pop("compressed_at") >= older.pop("compressed_at") > 1e9
    assert newest == {
        "request_id": "cmpl-2",
        "prompt_tokens": 17,
        "kept_tokens": 17.0,
        "kept_share": 1.0,
        "blocks_freed": 1,
        "arena_blocks": 2,
        "dynamic_share": 0.0,
        "recalled_share": 0.0,
        "hit_rate": None,
        "compress_seconds": 0.5,
    }
    assert older == {
        "request_id": "cmpl-1",
        "prompt_tokens": 4000,
        "kept_tokens": 342.5,
        "kept_share": 342.5 / 4000,
        "blocks_freed": 250,
        "arena_blocks": 25,
        "dynamic_share": 0.75,
        "recalled_share": 0.25,
        "hit_rate": 0.875,
        "compress_seconds": 0.125,
    }
    assert set(RequestsResponse.model_json_schema()["$defs"]["RequestSummary"]["properties"]) == {
        "compressed_at",
        *older,
    }


def test_stats(client: TestClient, endpoints: HybridKVEndpoints) -> None:
    configure(endpoints)
    engine_metrics().compressed(make_plan(400, (), 0.25, 64), blocks_freed=25)
    engine_metrics().set_blocks(arena=7, replaced=25)
    worker = worker_metrics(1, 0)
    worker.compressed(100.0, num_static=3, num_dynamic=5, seconds=0.25)
    worker.chunks(hit=30, recalled=10)
    worker.set_host_bytes(4096)
    worker.heads_pruned("host_pool_full", 2)
    stats = Stats.model_validate(client.get("/hybridkv/stats").json())
    assert stats.kept_share == 0.25
    assert stats.heads == {"static": 3, "dynamic": 5}
    assert (stats.chunks_hit, stats.chunks_recalled, stats.hit_rate) == (30, 10, 0.75)
    assert stats.host_bytes == 4096
    assert (stats.blocks_arena, stats.blocks_replaced) == (7, 25)
    assert (stats.compress_seconds_count, stats.compress_seconds_sum) == (1, 0.25)
    assert stats.fallbacks == {"host_pool_full": 2}
    assert stats.options is not None
    assert stats.options.theta == 0.8


def test_the_routes_only_read_and_say_what_a_pruned_head_is(client: TestClient) -> None:
    for path in ("/hybridkv", *FIGURES):
        assert client.post(path).status_code == 405
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert "pruned" in schemas["Head"]["properties"]["recalled"]["description"]
    fields = (
        field
        for schema in ("Stats", "HeadsResponse", "RequestHeads", "Head", "RequestsResponse", "RequestSummary")
        for field in schemas[schema]["properties"].values()
    )
    assert all(field["description"] for field in fields)


@pytest.mark.parametrize("sent", [None, "Bearer ", "Bearer wrong", "Basic one", "one", "Bearer one two"])
def test_the_figures_need_the_servers_key(
    client: TestClient, endpoints: HybridKVEndpoints, sent: str | None
) -> None:
    configure(endpoints, ["one", "two"])
    headers = {} if sent is None else {"Authorization": sent}
    for path in FIGURES:
        assert client.get(path, headers=headers).status_code == 401
        for key in ("one", "two"):
            assert client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    # The page holds none of them.
    assert client.get("/hybridkv", headers=headers).status_code == 200
    described = client.get("/openapi.json").json()
    assert [described["paths"][path]["get"]["security"] for path in FIGURES] == [[{"HTTPBearer": []}]] * 3
    assert "security" not in described["paths"]["/hybridkv"]["get"]


def test_the_key_is_found_where_vllm_finds_it(
    client: TestClient, endpoints: HybridKVEndpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opens(key: str) -> bool:
        answer = client.get("/hybridkv/stats", headers={"Authorization": f"Bearer {key}"})
        return answer.status_code == 200

    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    configure(endpoints)
    assert [opens(key) for key in ("of the environment", "", "other")] == [True, False, False]
    configure(endpoints, ["of the command line"])
    assert [opens(key) for key in ("of the environment", "of the command line")] == [False, True]
    monkeypatch.delenv("VLLM_API_KEY")
    for none in (None, [""]):
        configure(endpoints, none)
        assert opens("anything")
        assert client.get("/hybridkv/stats").status_code == 200


def test_the_page_is_one_file_under_a_policy_of_its_own(client: TestClient) -> None:
    answer = client.get("/hybridkv")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    # Nothing from elsewhere, and nothing that the policy would block: no style or handler in an attribute.
    elsewhere = re.findall(r"https?://[^\"]*|@import|url\(| style=| on\w+=", answer.text)
    assert elsewhere == ["http://www.w3.org/2000/svg"]
    assert answer.headers["x-content-type-options"] == "nosniff"
