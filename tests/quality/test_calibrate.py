"""`hybridkv calibrate` on the shipped model: what it writes, a server takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hybridkv_quality import calibrate

from hybridkv_vllm.cli import main
from hybridkv_vllm.profile import HeadProfile, read_profile


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
        (["--tokens", "5"], "at least 48 tokens"),
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
    (tmp_path / "file").touch()
    assert main(["calibrate", "--out", str(tmp_path / "file" / "heads.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err
