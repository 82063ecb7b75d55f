"""What the command refuses, before anything is started, and what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args

import pytest
from hybridkv_quality import command
from hybridkv_quality.conditions import Conditions
from hybridkv_quality.settings import EvalError, UsageError
from hybridkv_quality.sources import SuiteSamples
from vllm.config.model import ModelDType

from hybridkv_vllm.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is printed on stderr; the exit code must be 2."""
    assert main(["eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "snapvk"], "choose among"),
        (["--tasks", "nothing"], "unknown tasks nothing"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--concurrency", "0"], "--concurrency must be at least 1"),
        (["--max-model-len", "0"], "--max-model-len must be at least 1"),
        (["--option", "thet=1"], "unknown option 'thet' (known: "),
        (["--option", "theta=7"], "option 'theta' is '7'"),
        (["--option", "policy=full"], "use --policies"),
        (["--option", "budget=0.1"], "use --budgets"),
        (["--option", "theta=0.5", "--option", "theta=0.6"], "given twice"),
        (["--model", "/nowhere"], "--model /nowhere is no folder"),
        (["--samples", "/tmp"], "--samples and --format go together"),
        (["--format", "jsonl"], "--samples and --format go together"),
        (["--url", ""], "--url is empty; give it a value, or leave it out"),
        (["--model", ""], "--model is empty; give it a value, or leave it out"),
        (["--served-model", "m"], "go with --url"),
        (["--kv-bytes-per-token", "1"], "go with --url"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_do(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "run"
    model = [] if "--model" in arguments or "--served-model" in arguments else ["--model", str(tiny_model)]
    assert message in refused(capsys, "--out", str(out), *model, *arguments)
    assert not out.exists()


def test_a_dtype_that_is_none_leaves_the_folder_to_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--out", str(tmp_path / "run"), "--dtype", "fp16"])
    assert stop.value.code == 2
    assert "invalid choice: 'fp16'" in capsys.readouterr().err
    assert get_args(ModelDType) == command.DTYPES
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "quest"], "start one server a policy"),
        (["--option", "theta=0.5"], "give options to the server"),
        (["--model", "m"], "name it with --served-model"),
        ([], "no server answers"),
    ],
)
def test_arguments_that_do_not_go_with_a_server(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    address = ["--url", "http://127.0.0.1:9/v1", "--contexts", "1", "--tokens", "500"]
    assert message in refused(capsys, "--out", str(tmp_path / "run"), *address, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "/nowhere"], "is no folder"), (["--url", "http://127.0.0.1:9/v1"], "no server answers")],
)
def test_pictures_are_drawn_for_nothing_that_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    """Those of the whole suite take a minute."""
    monkeypatch.setattr(SuiteSamples, "names", lambda _: pytest.fail("all were drawn"))
    assert message in refused(capsys, "--out", str(tmp_path / "run"), *arguments)


@pytest.mark.parametrize("budgets", ["0", "1.5", "x", "nan", ""])
def test_budgets_out_of_range_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, budgets: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--out", str(tmp_path / "run"), "--budgets", budgets])
    assert ended.value.code == 2
    assert "--budgets" in capsys.readouterr().err


def test_a_missing_package_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        command.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    said = refused(capsys, "--out", str(tmp_path / "run"))
    assert said == "hybridkv eval: missing: matplotlib (for plots); pip install 'hybridkv-vllm[eval]'\n"


def test_a_failed_engine_and_an_interruption_are_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> None:
        def raise_it(_: object) -> None:
            raise error

        monkeypatch.setattr(command, "_evaluate", raise_it)

    fail(EvalError("the engine stopped"))
    assert main(["eval", "--out", str(tmp_path)]) == 1
    assert "the engine stopped" in capsys.readouterr().err
    fail(KeyboardInterrupt())
    assert main(["eval", "--out", str(tmp_path)]) == 1
    assert "the same command" in capsys.readouterr().err


def test_the_full_cache_is_asked_once() -> None:
    conditions = Conditions.make(["hybridkv", "full", "snapkv", "hybridkv"], [0.5, 0.1, 1.0, 0.5])
    assert list(conditions) == [
        ("full", 1.0),
        ("hybridkv", 0.1),
        ("hybridkv", 0.5),
        ("snapkv", 0.1),
        ("snapkv", 0.5),
    ]
    assert list(Conditions.make(["full"], [0.5])) == [("full", 1.0)]
    assert list(Conditions.make(["quest"], [1.0])) == [("full", 1.0)]
    assert list(Conditions.make(["quest"], [0.5])) == [("quest", 0.5)]
    with pytest.raises(UsageError, match="choose among"):
        Conditions.make(["nothing"], [0.5])
    with pytest.raises(UsageError, match="--budgets"):
        Conditions.make(["quest"], [1.5])


def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    said = capsys.readouterr().out
    assert "examples:" in said
    assert "exit code:" in said
