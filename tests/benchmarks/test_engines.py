"""Stock vLLM against hybridkv in one process each: a small run of it all, and what it says on the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hybridkv_serving.figures import Report
from scripts import load

engines = load("engines")
performance = load("performance")
SMALL = "--prompt-tokens 1024 --clients 1,2 --steps 4 --spare-tokens 64 --requests 8 --prompts-in-memory 3"
OPTIONS = "--budget 0.25 --host-pool-gib 0.25"


@pytest.mark.slow
@pytest.mark.server
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


class Attention(torch.nn.Module):
    """Two query heads and one KV head of size 8, as vLLM's Qwen2 has them."""

    q_size, head_dim, rotary_emb = 16, 8, None

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = torch.nn.Linear(5, 32)
        torch.nn.init.ones_(self.qkv_proj.weight)
        torch.nn.init.ones_(self.qkv_proj.bias)


def test_the_pairs_that_turn_fastest_are_zeroed_in_queries_alone() -> None:
    model = torch.nn.Sequential(Attention(), torch.nn.Linear(5, 5))
    untouched = model[1].weight.clone()
    engines.still_queries(model, pairs=2)
    # Of a head's eight dimensions, i and i + 4 are a pair.
    still = [0, 1, 4, 5, 8, 9, 12, 13]
    expected = torch.tensor([0.0 if row in still else 1.0 for row in range(32)])
    assert torch.equal(model[0].qkv_proj.bias, expected)
    assert torch.equal(model[0].qkv_proj.weight, expected[:, None].expand(32, 5))
    assert torch.equal(model[1].weight, untouched)
    with pytest.raises(ValueError, match="--still 0"):
        engines.still_queries(model[1], pairs=2)


def test_a_failed_engine_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["engines.py", "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(RuntimeError, match="engine stock, batch: exit code 1"):
        engines._run_child("stock", "batch", engines.Console(quiet=True))
