"""The command `hybridkv`: what the doctor finds in this environment, and when it says no."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hybridkv_vllm import __version__, cli, doctor, exit_codes
from hybridkv_vllm.cli import build_parser, main

SUBJECTS = [
    "python",
    "torch",
    "vllm",
    "triton",
    "device",
    "host memory",
    "cpu harness",
    "model runner",
    "plugin",
    "http routes",
]


def hybridkv(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed command as a user would, with these variables; VLLM_PLUGINS only if given."""
    own = ("VLLM_PLUGINS", "VLLM_LOGGING_LEVEL")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        [Path(sys.executable).with_name("hybridkv"), *arguments],
        # A terminal too narrow would break the table's words.
        env={**inherited, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def problems(done: subprocess.CompletedProcess[str]) -> list[doctor.Finding]:
    """The problems in the doctor's JSON; every problem and note must come with a remedy."""
    findings = [doctor.Finding(**entry) for entry in json.loads(done.stdout)]
    assert [finding.subject for finding in findings] == SUBJECTS
    for finding in findings:
        assert finding.found
        assert finding.status in ("ok", "note", "problem")
        assert finding.remedy or finding.status == "ok"
    return [finding for finding in findings if finding.status == "problem"]


def test_a_sound_environment() -> None:
    done = hybridkv("doctor")
    assert done.returncode == exit_codes.OK, done.stdout + done.stderr
    for subject in SUBJECTS:
        assert subject in done.stdout
    assert "--attention-backend hybridkv -> hybridkv_vllm.attention.backend.HybridKVBackend" in done.stdout
    assert "VLLM_PLUGINS=hybridkv,hybridkv_api" in done.stdout


def test_json_is_json_and_the_routes_are_seen() -> None:
    done = hybridkv("doctor", "--json", VLLM_PLUGINS="hybridkv,hybridkv_api")
    assert done.returncode == exit_codes.OK
    assert not problems(done)
    routes = json.loads(done.stdout)[-1]
    assert (routes["status"], routes["found"]) == (
        "ok",
        "/hybridkv, /hybridkv/stats, /hybridkv/heads, /hybridkv/requests",
    )


def test_the_routes_remedy_keeps_other_plugins() -> None:
    done = hybridkv("doctor", "--json", VLLM_PLUGINS="other,hybridkv")
    assert json.loads(done.stdout)[-1]["remedy"].endswith("VLLM_PLUGINS=other,hybridkv,hybridkv_api")


def test_the_default_of_host_memory_is_a_quarter_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridkv_vllm.worker.host_tier._node_memory", lambda: 50 * 2**30)
    finding = doctor._host_memory()
    assert finding.status == "ok"
    assert finding.found.startswith("up to 12.5 GiB by default")


def test_the_doctor_wants_the_vllm_that_the_package_asks_for() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    low, high = (".".join(map(str, version)) for version in doctor.VLLM_VERSIONS)
    assert project["optional-dependencies"]["gpu"] == [f"vllm>={low},<{high}"]


@pytest.mark.parametrize(
    ("name", "value", "subject", "remedy"),
    [
        (
            "VLLM_USE_V2_MODEL_RUNNER",
            "0",
            "model runner",
            "unset VLLM_USE_V2_MODEL_RUNNER or set it to 1",
        ),
        # vLLM reads a number.
        (
            "VLLM_USE_V2_MODEL_RUNNER",
            "false",
            "model runner",
            "unset VLLM_USE_V2_MODEL_RUNNER or set it to 1",
        ),
        ("VLLM_PLUGINS", "other", "plugin", "add it: VLLM_PLUGINS=other,hybridkv"),
        ("HYBRIDKV_METRICS_DIR", "/dev/null/new", "plugin", "name another folder, or unset it"),
    ],
)
def test_a_problem_is_named_with_its_remedy(name: str, value: str, subject: str, remedy: str) -> None:
    done = hybridkv("doctor", "--json", **{name: value})
    assert done.returncode == exit_codes.PROBLEM
    (problem,) = problems(done)
    assert (problem.subject, problem.remedy) == (subject, remedy)
    assert value in problem.found


def test_what_looks_like_markup_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = doctor.Finding("vllm", "problem", "[/x] :smile:", "pip install 'hybridkv-vllm[gpu]'")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: finding,))
    assert main(["doctor"]) == exit_codes.PROBLEM
    shown = capsys.readouterr().out
    assert finding.found in shown
    assert finding.remedy in shown


def test_a_check_that_breaks_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def _torch() -> doctor.Finding:
        raise OSError("libcudart.so is missing")

    monkeypatch.setattr(doctor, "CHECKS", (_torch,))
    assert main(["doctor", "--json"]) == exit_codes.PROBLEM
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["subject"], finding["status"]) == ("torch", "problem")
    assert finding["found"] == "OSError: libcudart.so is missing"
    assert finding["remedy"]


def test_tiny_model_refuses_a_foreign_folder(tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("mine")
    done = hybridkv("tiny-model", "--out", tmp_path)
    assert done.returncode == exit_codes.USAGE
    assert done.stderr.startswith(f"hybridkv: {tmp_path} is not empty")
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert precious.read_text() == "mine"


def test_tiny_model_says_where_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tiny"
    assert main(["tiny-model", "--out", str(folder)]) == exit_codes.OK
    assert capsys.readouterr().out.strip().endswith(str(folder))
    assert (folder / "config.json").is_file()
    # Its own may be replaced.
    assert main(["tiny-model", "--out", str(folder), "--seed", "1", "--json"]) == exit_codes.OK
    assert json.loads(capsys.readouterr().out) == {"model": str(folder), "seed": 1}


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cure"])
    assert caught.value.code == exit_codes.USAGE
    assert "doctor" in capsys.readouterr().err


COMMANDS: dict[str, argparse.ArgumentParser] = next(
    dict(action.choices)
    for action in build_parser()._actions
    if isinstance(action, argparse._SubParsersAction)
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_teaches_by_examples_that_work(name: str) -> None:
    command = COMMANDS[name]
    assert "--json" in command._option_string_actions
    examples = [
        line[line.index("hybridkv ") :].partition("  ")[0]
        for line in (command.epilog or "").splitlines()
        if f"hybridkv {name} " in line
    ]
    assert examples
    for example in examples:
        assert build_parser().parse_args(shlex.split(example)[1:]).command == name


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == exit_codes.OK
    assert capsys.readouterr().out.strip() == __version__


def test_the_command_needs_no_torch_to_say_what_is_missing(tmp_path: Path) -> None:
    """As right after `pip install hybridkv-vllm` without an extra."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    for arguments, code in ((["--version"], exit_codes.OK), (["plan", "--help"], exit_codes.OK)):
        assert hybridkv(*arguments, PYTHONPATH=str(tmp_path)).returncode == code
    done = hybridkv("doctor", "--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == exit_codes.PROBLEM, done.stderr
    torch = next(finding for finding in json.loads(done.stdout) if finding["subject"] == "torch")
    assert (torch["status"], torch["found"]) == ("problem", "not installed")
    assert "pip install 'hybridkv-vllm[gpu]'" in torch["remedy"]


def test_what_fails_or_is_stopped_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["tiny-model", "--out", str(tmp_path / "file" / "tiny")]) == exit_codes.PROBLEM
    assert "cannot be written" in capsys.readouterr().err
    assert main(["tiny-model", "--out", str(tmp_path), "--seed", str(2**63)]) == exit_codes.USAGE
    assert "seed must fit into 64 bits" in capsys.readouterr().err

    def stop(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_tiny_model", stop)
    assert main(["tiny-model", "--out", str(tmp_path)]) == exit_codes.PROBLEM
    assert capsys.readouterr().err == "hybridkv: stopped\n"
