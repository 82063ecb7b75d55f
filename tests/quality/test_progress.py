"""What a person at a terminal sees of `hybridkv eval` while it works."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from hybridkv_quality.progress import AnswerBar
from hybridkv_quality.settings import UsageError
from hybridkv_quality.sources import SuiteSamples

from hybridkv_vllm.cli import main


def test_the_bar_shows_work_before_it_knows_how_many_answers_there_will_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The suite's pictures take seconds to draw, in which nothing is answered yet."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with AnswerBar():
        pass
    assert "preparing questions" in capsys.readouterr().err
    with AnswerBar() as bar:
        bar.expect(3)
        bar.say("snapkv")
        bar.advance()
    shown = capsys.readouterr().err
    assert "snapkv" in shown
    assert "1/3" in shown


def test_nothing_is_shown_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with AnswerBar() as bar:
        bar.expect(1)
        bar.advance()
    assert capsys.readouterr().err == ""


def test_the_bar_is_there_while_the_suite_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(samples: SuiteSamples) -> NoReturn:
        raise UsageError(f"stopped after: {capsys.readouterr().err}")

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(SuiteSamples, "names", stop)
    assert main(["eval", "--out", str(tmp_path)]) == 2
    _, _, shown = capsys.readouterr().err.partition("stopped after: ")
    assert "preparing questions" in shown
