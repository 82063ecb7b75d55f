"""`hybridkv inspect` says what is wrong with its arguments before it asks a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from hybridkv_quality import inspection
from hybridkv_quality.plots import draw_heads
from PIL import Image
from quality_cases import heads_example, save_picture

from hybridkv_vllm.cli import main
from hybridkv_vllm.config import ServerOptions

NOBODY = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--budget", "0.2"], "--budget is of a question: add --ask or --picture"),
        (["--picture", "none.png"], "--picture none.png: [Errno 2]"),
        (["--picture", __file__], "cannot identify image file"),
        (["--ask", "What?", "--budget", "nan"], "--budget must be above 0 and at most 1, got nan"),
        (["--ask", "What?", "--budget", "7"], "--budget must be above 0 and at most 1, got 7"),
        (["--out", "/tmp"], "--out /tmp is a folder; name a file in it"),
        (["--out", "/proc/new/heads.png"], "--out /proc/new/heads.png cannot be written ([Errno 2]"),
        (["--out", "heads.txt"], "--out heads.txt: .txt is none of "),
        (["--out", "n" * 300], "cannot be written ([Errno 36]"),
        (["--url", "http://[::1"], "--url http://[::1 is no URL (Invalid port: ':1'); correct it"),
        (["--ask", "What?"], f"--url {NOBODY}: no server answers"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "heads.png"
    assert main(["inspect", "--url", NOBODY, "--out", str(out), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hybridkv inspect: ")
    assert complaint in said
    assert not out.exists()


def test_a_picture_too_large_to_decode_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save_picture(tmp_path / "p.png")
    given = ["inspect", "--url", NOBODY, "--out", str(tmp_path / "heads.png")]
    assert main([*given, "--picture", str(tmp_path / "p.png")]) == 2
    assert f"--picture {tmp_path / 'p.png'}: Image size" in capsys.readouterr().err


def test_folders_that_are_missing_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = heads_example("chain", 0.5).heads, ServerOptions()
    monkeypatch.setattr(inspection, "_inspect", lambda _: found)
    out = tmp_path / "new" / "maps" / "heads.png"
    assert main(["inspect", "--url", NOBODY, "--out", str(out)]) == 0
    assert out.is_file()


def test_a_map_without_a_suffix_is_a_png_of_just_that_name(tmp_path: Path) -> None:
    draw_heads(heads_example("chain", 0.5).heads, "text_mass", 0.9, "title", tmp_path / "heads")
    assert [file.name for file in tmp_path.iterdir()] == ["heads"]
    assert (tmp_path / "heads").read_bytes().startswith(b"\x89PNG")
