"""What every command has in common: how it is stopped from outside, and where its output goes."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hybridkv_quality import calibrate
from hybridkv_quality.model_path import model_folder
from hybridkv_serving.figures import COLUMNS
from rich.table import Table

from hybridkv_vllm import cli, exit_codes, stops
from hybridkv_vllm.profile import HeadProfile
from hybridkv_vllm.terminal import standard_output

COMMAND = Path(sys.executable).with_name("hybridkv")
PLAN = ["plan", "--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--gpu", "h200", "--context", "32k"]
FULL = "hybridkv: the output cannot be written: No space left on device; free some space\n"
SECONDS = 60
# `vllm serve` is a script here that says its process and sleeps.
SERVE = """\
import sys
from pathlib import Path
from hybridkv_vllm import cli, server

folder = Path(sys.argv[1])
sys.executable = str(folder / "python")

def run(args):
    with server.serve("model", [], folder / "log"):
        raise AssertionError("it does not answer")

cli._doctor = run
sys.exit(cli.main(["doctor"]))
"""


@pytest.fixture(autouse=True)
def at_a_terminal() -> Iterator[None]:
    """Under `nohup` these tests would inherit that SIGHUP is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_from_outside_stops_the_server_too(number: signal.Signals, tmp_path: Path) -> None:
    """Said twice, as by `timeout`: the second must not cut the stopping short."""
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\ntrap 'sleep 0.5; exit' INT\necho $$ > pid.new\nmv pid.new pid\nsleep 60 & wait\n"
    )
    fake.chmod(0o755)
    command = subprocess.Popen(
        [sys.executable, "-c", SERVE, tmp_path], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "pid").exists():
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server = int((tmp_path / "pid").read_text())
    try:
        command.send_signal(number)
        time.sleep(0.2)
        command.send_signal(number)
        _, said = command.communicate(timeout=SECONDS)
        assert (command.returncode, said) == (exit_codes.PROBLEM, "hybridkv: stopped\n")
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)
    finally:
        command.kill()
        with suppress(ProcessLookupError):
            os.killpg(server, signal.SIGKILL)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in stops.STOPS]


def test_the_callers_own_handlers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    during = []

    def run(_: argparse.Namespace) -> int:
        during.append(handlers())
        return exit_codes.OK

    monkeypatch.setattr(cli, "_doctor", run)
    before = handlers()
    assert cli.main(["doctor"]) == exit_codes.OK
    assert handlers() == before
    # As under nohup.
    ignoring = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["doctor"]) == exit_codes.OK
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, ignoring)
    # Only the main thread may set any.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(cli.main, ["doctor"]).result() == exit_codes.OK
    assert during == [[stops._stop, stops._stop], [stops._stop, signal.SIG_IGN], before]


def run_into(output: int, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of the command; its output is buffered, as it is for a user."""
    done = subprocess.run(
        [COMMAND, *arguments],
        stdout=output,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        text=True,
        timeout=SECONDS,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [PLAN, [*PLAN, "--json"], ["--help"]], ids=["table", "json", "help"])
def test_output_that_nobody_takes_is_no_traceback(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as broken, Path("/dev/full").open("wb") as full:
        assert run_into(broken.fileno(), *arguments) == (exit_codes.PROBLEM, "")
        assert run_into(full.fileno(), *arguments) == (exit_codes.PROBLEM, FULL)


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "modèle"
    folder.mkdir()
    shutil.copy(model_folder() / "config.json", folder)
    asked = [COMMAND, "plan", "--model", str(folder), "--gpu", "h200", "--context", "1k"]
    done = subprocess.run(
        asked, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=SECONDS
    )
    assert (done.returncode, done.stderr) == (exit_codes.OK, b"")
    assert b"mod\\xe8le" in done.stdout


def test_json_is_json_whatever_the_terminal_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escaped as JSON does it: the terminal's way would be none."""
    profile = HeadProfile(model="modèle", tasks=["chain"], tokens=1, prompts=1, share=0.1, moving=[[0.0]])
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: profile)
    assert cli.main(["calibrate", "--out", str(tmp_path / "heads.json"), "--json"]) == exit_codes.OK
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert HeadProfile.model_validate_json(printed) == profile


def test_without_standard_output_it_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main([*PLAN, "--json"]) == exit_codes.OK


def test_tables_in_a_pipe_are_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert cli.main(PLAN) == exit_codes.OK
    shown = capsys.readouterr().out
    assert "Qwen/Qwen2.5-VL-7B-Instruct on h200, a rank" in shown
    assert "requests decoding, for the times" in shown
    words = ["figure 1,234,567"] * len(COLUMNS)
    table = Table(*COLUMNS)
    table.add_row(*words)
    standard_output().print(table)
    assert capsys.readouterr().out.count("1,234,567") == len(COLUMNS)


def test_another_error_is_not_taken_for_one_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        raise FileNotFoundError(2, "No such file or directory", "model")

    monkeypatch.setattr(cli, "_doctor", run)
    with pytest.raises(FileNotFoundError):
        cli.main(["doctor"])
