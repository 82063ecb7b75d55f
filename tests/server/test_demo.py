"""`make demo`, the first thing that a newcomer sees, with the model that ships."""

from __future__ import annotations

import pytest

from hybridkv_vllm import demo


@pytest.mark.slow
@pytest.mark.server
def test_the_demo_answers_right_and_shows_what_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    printed = capsys.readouterr().out
    assert "right, word for word" in printed
    assert "blocks given back" in printed
