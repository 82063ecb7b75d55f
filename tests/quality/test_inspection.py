"""`hybridkv inspect` says what is wrong with its arguments before it asks a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridkv_vllm.cli import main

NOBODY = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--budget", "0.2"], "--budget is of a question: add --ask or --picture"),
        (["--picture", "none.png"], "--picture none.png: [Errno 2]"),
        (["--picture", __file__], "cannot identify image file"),
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
