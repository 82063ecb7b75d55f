"""`make demo`, the first thing that a newcomer sees, with the model that ships; and how it ends otherwise."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hybridkv_vllm import demo, exit_codes
from hybridkv_vllm.server import Server, ServerFailed


@pytest.mark.slow
@pytest.mark.server
def test_the_demo_answers_right_and_shows_what_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    printed = capsys.readouterr().out
    assert "right, word for word" in printed
    assert "blocks given back" in printed


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of servers that were started and ended; there is nothing behind them."""
    names: list[str] = []

    @contextmanager
    def serve(model: Any, arguments: Any, log: Path) -> Iterator[Server]:
        try:
            yield Server("http://127.0.0.1:9", log)
        finally:
            names.append("server")

    monkeypatch.setattr(demo, "serve", serve)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return names


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_ends_the_server_too(
    number: signal.Signals,
    ended: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "ask", lambda *_: signal.raise_signal(number))
    before = signal.signal(number, signal.default_int_handler)
    try:
        assert demo.main() == exit_codes.PROBLEM
    except KeyboardInterrupt:
        pytest.fail("it is not caught")
    finally:
        signal.signal(number, before)
    assert ended == ["server"]
    assert capsys.readouterr().err == "hybridkv demo: stopped\n"


def test_the_log_is_shown_as_it_is(
    ended: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").write_text("INFO [core.py:5] reads [/usr/lib]\n")

    def fail(*_: object) -> None:
        raise ServerFailed("it stopped", tmp_path / "log")

    monkeypatch.setattr(demo, "ask", fail)
    assert demo.main() == exit_codes.PROBLEM
    assert "INFO [core.py:5] reads [/usr/lib]" in capsys.readouterr().out
