"""Stock vLLM against hybridkv in one process each: a small run of it all, and what it says on the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from hybridkv_serving.figures import Report
from scripts import load

engines = load("engines")
performance = load("performance")
SMALL = "--prompt-tokens 1024 --clients 1,2 --steps 4 --spare-tokens 64 --requests 8 --prompts-in-memory 3"
OPTIONS = "--budget 0.25 --host-pool-gib 0.25"


@pytest.mark.slow
@pytest.mark.alone
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["engines.py", *SMALL.split(), *OPTIONS.split(), "--dynamic-tiers", "host"]
    machine = tmp_path / "results" / "small"
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(machine)])
    assert engines.main() == 0
    report = Report.model_validate_json((machine / "engines_recalling_batch_full" / "serve.json").read_text())
    decoding = {(f.server, f.scenario, f.clients): f.decoding_at_once for f in report.figures}
    assert decoding["stock", "batch", 2] == decoding["hybridkv", "batch", 2] == 2
    # Three prompts' memory: as many decode in stock, and more where a quarter stays.
    assert decoding["stock", "full", 8] == 3
    assert decoding["hybridkv", "full", 8] > 4
    assert all(f.answers >= f.decoding_at_once for f in report.figures)
    assert 0 < float(report.settings["missed, batch"]) < 1
    # Who gets in may wait long for it, and stock's others wait for ever: no ratio of that.
    assert {c.what for c in report.comparisons if c.scenario == "full"} == {
        "tokens_per_second",
        "decoding_at_once",
    }
    assert {c.what for c in report.comparisons if c.scenario == "batch"} > {"ms_per_token", "first_token_p50"}

    performance.write_page(tmp_path / "results", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "in one process each, on prompts of 1024 random tokens." in page
    assert "Share of the heads that recall: 0.5; of the chosen chunks, missed, batch: 0." in page


def test_a_failed_engine_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["engines.py", "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(RuntimeError, match="engine stock, batch: exit code 1"):
        engines._run_child("stock", "batch", engines.Console(quiet=True))
