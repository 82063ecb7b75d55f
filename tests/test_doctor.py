"""The command `hybridkv`: what the doctor finds in this environment, and when it says no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridkv_vllm import doctor
from hybridkv_vllm.cli import EXIT_OK, EXIT_PROBLEM, EXIT_USAGE, main

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
    """Runs the installed command in a new process, with these variables; VLLM_PLUGINS only if given."""
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
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
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    for subject in SUBJECTS:
        assert subject in done.stdout
    assert "--attention-backend hybridkv -> hybridkv_vllm.attention.backend.HybridKVBackend" in done.stdout
    assert "VLLM_PLUGINS=hybridkv,hybridkv_api" in done.stdout


def test_json_is_json_and_the_routes_are_seen() -> None:
    done = hybridkv("doctor", "--json", VLLM_PLUGINS="hybridkv,hybridkv_api")
    assert done.returncode == EXIT_OK
    assert not problems(done)
    routes = json.loads(done.stdout)[-1]
    assert (routes["status"], routes["found"]) == ("ok", "GET /hybridkv/stats, GET /hybridkv/heads")


def test_the_default_of_host_memory_is_a_quarter_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridkv_vllm.worker.host_tier._node_memory", lambda: 50 * 2**30)
    finding = doctor._host_memory()
    assert finding.status == "ok"
    assert finding.found.startswith("12.5 GiB by default")


@pytest.mark.parametrize(
    ("name", "value", "subject", "remedy"),
    [
        (
            "VLLM_USE_V2_MODEL_RUNNER",
            "0",
            "model runner",
            "unset VLLM_USE_V2_MODEL_RUNNER or set it to 1",
        ),
        ("VLLM_PLUGINS", "other", "plugin", "add it: VLLM_PLUGINS=other,hybridkv"),
    ],
)
def test_a_problem_is_named_with_its_remedy(name: str, value: str, subject: str, remedy: str) -> None:
    done = hybridkv("doctor", "--json", **{name: value})
    assert done.returncode == EXIT_PROBLEM
    (problem,) = problems(done)
    assert (problem.subject, problem.remedy) == (subject, remedy)
    assert value in problem.found


def test_a_check_that_breaks_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def _torch() -> doctor.Finding:
        raise OSError("libcudart.so is missing")

    monkeypatch.setattr(doctor, "CHECKS", (_torch,))
    assert main(["doctor", "--json"]) == EXIT_PROBLEM
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["subject"], finding["status"]) == ("torch", "problem")
    assert finding["found"] == "OSError: libcudart.so is missing"
    assert finding["remedy"]


def test_tiny_model_refuses_a_foreign_folder(tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("mine")
    done = hybridkv("tiny-model", "--out", tmp_path)
    assert done.returncode == EXIT_USAGE
    assert done.stderr.startswith(f"hybridkv: {tmp_path} is not empty")
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert precious.read_text() == "mine"


def test_tiny_model_says_where_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tiny"
    assert main(["tiny-model", "--out", str(folder)]) == EXIT_OK
    assert capsys.readouterr().out.strip().endswith(str(folder))
    assert (folder / "config.json").is_file()
    assert main(["tiny-model", "--out", str(folder), "--seed", "1"]) == EXIT_OK  # Its own may be replaced.


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cure"])
    assert caught.value.code == EXIT_USAGE
    assert "doctor" in capsys.readouterr().err
