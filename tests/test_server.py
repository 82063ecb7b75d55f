"""Servers that demo and benchmarks start answer them, whatever the environment holds for other servers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hybridkv_quality.sample import Message, Sample
from hybridkv_serving.clients import play
from hybridkv_serving.trace import make_trace
from rich.console import Console

from hybridkv_vllm import demo
from hybridkv_vllm.server import Server, serve

# Stands in for `vllm serve`: tells which key it was given, and answers in one word.
SCRIPT = """\
#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(json.dumps(os.environ.get("VLLM_API_KEY")))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {{"index": 0, "delta": {{"content": "yes"}}, "finish_reason": None}}
        usage = {{"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}}
        chunk = {{"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}}
        chunk |= {{"choices": [choice], "usage": usage}}
        self.send("data: " + json.dumps(chunk) + "\\n\\ndata: [DONE]\\n\\n")

    def send(self, text):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(text.encode())

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Started where the environment names a proxy that is not there, and a key of another server."""
    script = tmp_path / "python"
    script.write_text(SCRIPT.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve("model", [], tmp_path / "log", timeout=20) as started:
        yield started


def test_it_is_asked_directly_and_without_a_key(server: Server) -> None:
    assert json.loads(server.get("/key").text) is None
    question = Sample("demo", "1", (Message("user", ("What?",)),), "yes", "exact", max_tokens=1)
    assert demo.ask(Console(), server, question) == ("yes", 3)
    conversations = list(make_trace("images", 1, 64, 0))
    played = asyncio.run(play(server.url, "m", conversations, clients=1, answer_tokens=1))
    assert [answer.error for answer in played.answers] == [""]
