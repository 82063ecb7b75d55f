"""`hybridkv calibrate` on the shipped model: what it writes, a server takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hybridkv_quality import calibrate
from hybridkv_quality.model_path import model_folder

from hybridkv_vllm.cli import main
from hybridkv_vllm.profile import HeadProfile, read_profile
from hybridkv_vllm.terminal import standard_output


def test_the_head_that_looks_up_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "heads.json"
    arguments = ["--tasks", "chain,video", "--tokens", "400", "--contexts", "1", "--out", str(file)]
    assert main(["calibrate", *arguments]) == 0
    assert f"hybridkv.profile {file}" in capsys.readouterr().out.replace("\n", "")
    profile = read_profile(file, 4, 2)
    assert profile.tasks == ["chain", "video"]
    assert profile.prompts == 2
    looks_up = profile.moving[2][0]  # The head that training showed where to look.
    assert looks_up > 0.2
    assert looks_up > 2 * min(share for layer in profile.moving for share in layer)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "nothing"], "unknown tasks nothing"),
        (["--share", "1.5"], "--share must be between 0 and 1"),
        (["--tokens", "5"], "--tasks, --tokens, --contexts: a scene has at least 48 tokens"),
        ([""], "the model's name is empty; give it, or leave it out"),
        (["/nowhere"], "/nowhere"),
    ],
)
def test_wrong_arguments_write_nothing(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "heads.json"
    assert main(["calibrate", *arguments, "--out", str(file)]) == 2
    assert says in capsys.readouterr().err
    assert not file.exists()


def test_a_file_that_cannot_be_written_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = HeadProfile(model="m", tasks=["chain"], tokens=1, prompts=1, share=0.1, moving=[[0.0]])
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: profile)
    # What was no hindrance before the run.
    monkeypatch.setattr(calibrate, "check_writable", lambda _: None)
    (tmp_path / "file").touch()
    assert main(["calibrate", "--out", str(tmp_path / "file" / "heads.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("", "is a folder; name a file in it"),
        ("file/heads.json", "cannot be written ([Errno 20]"),
        ("/proc/new/heads.json", "cannot be written ([Errno 2]"),
    ],
)
def test_a_file_that_cannot_be_written_is_found_before_the_model_runs(
    out: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    assert main(["calibrate", "--out", str(tmp_path / out)]) == 2
    assert says in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_damaged_weights_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    given = ["--tasks", "chain", "--tokens", "400", "--contexts", "1", "--out", str(tmp_path / "heads.json")]
    assert main(["calibrate", str(model), *given]) == 2
    assert f"hybridkv: {model}: its weights are damaged" in capsys.readouterr().err


def test_a_model_in_brackets_is_shown_as_it_is() -> None:
    profile = HeadProfile(model="[red]m", tasks=["chain"], tokens=1, prompts=1, share=0.1, moving=[[0.0]])
    console = standard_output()
    with console.capture() as captured:
        console.print(calibrate._table(profile))
    assert "([red]m," in " ".join(captured.get().split())
