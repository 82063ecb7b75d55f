"""A server that refuses, hangs or answers something else: one line for the user, and no answer lost."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hybridkv_quality import server_target
from hybridkv_quality.records import JsonLines, Record
from hybridkv_quality.settings import locked
from quality_cases import write_lines

from hybridkv_vllm.cli import main

MODELS = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]})
ANSWER = json.dumps(
    {"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": "red"}}], "usage": None}
)
HTML = "<html>Welcome</html>"
Reply = Callable[[str], tuple[int, str]]
SAMPLES = 16


class CannedServer:
    """Answers every list of models and every question as the test says."""

    def __init__(self) -> None:
        self.models = MODELS
        self.reply: Reply = lambda _: (200, ANSWER)
        canned = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                self._send(200, canned.models) if self.path == "/v1/models" else self._send(404, "{}")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._send(*canned.reply(body))

            def _send(self, status: int, text: str) -> None:
                self.send_response(status)
                kind = "text/html" if text == HTML else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def canned() -> Iterator[CannedServer]:
    server = CannedServer()
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()


@pytest.fixture
def arguments(canned: CannedServer, tmp_path: Path) -> list[str]:
    lines = [{"id": n, "task": "t", "question": f"Question {n}.", "answer": "red"} for n in range(SAMPLES)]
    write_lines(tmp_path / "questions" / "q.jsonl", lines)
    given = ["eval", "--url", canned.url, "--out", str(tmp_path / "out")]
    return [*given, "--samples", str(tmp_path / "questions"), "--format", "jsonl"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


def records(tmp_path: Path) -> list[Record]:
    return list(JsonLines(tmp_path / "out" / "records.jsonl", Record).read())


def test_the_other_answers_of_a_group_are_kept_when_one_is_refused(
    canned: CannedServer, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canned.reply = lambda body: (400, "{}") if "Question 3." in body else (200, ANSWER)
    assert main(arguments) == 1
    assert "t/3: the server says HTTP 400" in said(capsys)
    assert {record.sample for record in records(tmp_path)} == {str(n) for n in range(SAMPLES) if n != 3}
    canned.reply = lambda _: (200, ANSWER)
    assert main(arguments) == 0
    assert len(records(tmp_path)) == SAMPLES


def test_the_first_interruption_ends_a_run_on_a_server_that_hangs(
    canned: CannedServer, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hang(_: str) -> tuple[int, str]:
        asked.set()
        go_on.wait(20)
        return 200, ANSWER

    def interrupt() -> None:
        asked.wait(20)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    canned.reply = hang
    begun = time.monotonic()
    threading.Thread(target=interrupt).start()
    try:
        assert main(arguments) == 1
        assert time.monotonic() - begun < 10
        # Those that are not daemons would be waited for at the end of the process.
        asking = [thread for thread in threading.enumerate() if "work" in thread.name]
        assert asking
        assert all(thread.daemon for thread in asking)
    finally:
        go_on.set()
    assert said(capsys) == "hybridkv eval: stopped; run the same command to go on\n"


@pytest.mark.parametrize("models", [HTML, "[]", '{"data": [null]}', '{"data": null}'])
def test_a_list_of_models_that_is_none_is_no_openai_server(
    canned: CannedServer, arguments: list[str], models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    canned.models = models
    assert main(arguments) == 2
    assert f"--url {canned.url} is no OpenAI server" in said(capsys)


def test_a_list_of_models_has_little_time(
    canned: CannedServer,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(server_target, "MODELS_SECONDS", 0.2)
    canned.http.RequestHandlerClass.do_GET = lambda _: time.sleep(1)  # type: ignore[attr-defined]
    assert main(arguments) == 2
    assert "no list of models within 0.2 s; wait until" in said(capsys)


@pytest.mark.parametrize(
    "answer", [HTML, "[]", "{", '{"id": "1", "choices": []}', '{"choices": null}', '{"choices": [null]}']
)
def test_an_answer_that_is_no_chat_completion_is_one_line(
    canned: CannedServer, arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    canned.reply = lambda _: (200, answer)
    assert main(arguments) == 1
    assert "answers with no chat completion; answers so far are kept" in said(capsys)


def test_a_key_that_no_header_can_carry_is_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    assert main(arguments) == 2
    assert "OPENAI_API_KEY has a character that is not ASCII" in said(capsys)


def test_a_folder_in_use_by_another_run_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        assert main(arguments) == 2
        assert "is in use by another run" in said(capsys)
    assert main(arguments) == 0


@pytest.mark.parametrize("out", ["/proc/x", "/dev/null/x"])
def test_a_folder_that_cannot_be_made_is_refused(
    arguments: list[str], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", out]) == 2
    assert f"--out {out} cannot be written: " in said(capsys)


def test_files_in_the_place_of_others_are_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(arguments) == 0
    (out / "plots").rename(out / "before")
    (out / "plots").touch()
    capsys.readouterr()
    assert main(arguments) == 1
    assert f"--out {out} cannot be written: [Errno 17] File exists: '{out / 'plots'}'" in said(capsys)
    (out / "records.jsonl").unlink()
    (out / "records.jsonl").mkdir()
    assert main(arguments) == 2
    assert f"--out {out} cannot be written: [Errno 21] Is a directory" in said(capsys)


def test_a_full_disk_is_one_line(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened = JsonLines.__enter__

    def full(lines: JsonLines[Record]) -> JsonLines[Record]:
        opened(lines)
        lines._file = open("/dev/full", "ab")  # noqa: SIM115
        return lines

    monkeypatch.setattr(JsonLines, "__enter__", full)
    assert main(arguments) == 1
    assert f"--out {tmp_path / 'out'} cannot be written: [Errno 28]" in said(capsys)


def test_a_name_in_brackets_is_shown_as_it_is(
    canned: CannedServer, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "[red]", tmp_path / "marked"
    common = {"question": "Which?", "answer": "red blue", "metric": "words"}
    write_lines(folder / "q.jsonl", [{"id": 1, "task": "a/b[/bold] $\\x$", **common}])
    assert main([*arguments, "--samples", str(folder), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "a/b[/bold] $\\x$" in shown
    assert "[red]" in shown
    (name,) = (file.name for file in (out / "plots").glob("hops_*"))
    assert name.startswith("hops_a_b_bold_x_-")
