"""Stock vLLM against hybridkv in one process each: a small run of it all, and what it says on the page."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

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


def run_main(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["engines.py", *arguments, "--out", str(out)])
    code: int = engines.main()
    return code


def test_a_failed_engine_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["engines.py", "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(RuntimeError, match="engine stock, batch: exit code 1"):
        engines._run_child("stock", "batch", engines.Console(quiet=True), 600)
    with pytest.raises(RuntimeError, match=r"engine stock, batch: not done after 0\.01 s"):
        engines._run_child("stock", "batch", engines.Console(quiet=True), 0.01)


def measured(engine: str, scenario: str, missed: float | None = None) -> engines.Measured:
    figures = engines.Figures(
        server=engine if engine == "stock" else "hybridkv", scenario=scenario, clients=1, answers=1, failed=0,
        prompt_tokens=1, tokens_per_second=1, decoding_at_once=1, ms_per_token=1, first_token_p50=1,
        first_token_p99=1, goodput=0,
    )  # fmt: skip
    return engines.Measured(figures=[figures], missed=missed)


@pytest.mark.parametrize(
    ("stopped_at", "left"),
    [
        (("off", "batch"), (2, 2)),
        (("off", "full"), (3, 2)),
        (("host", "batch"), (4, 2)),
        (("host", "full"), (4, 3)),
    ],
)
def test_what_is_measured_outlives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: tuple[str, str], left: tuple[int, int]
) -> None:
    def run(engine: str, scenario: str, *_: object) -> engines.Measured:
        if (engine, scenario) == stopped_at:
            raise KeyboardInterrupt
        return measured(engine, scenario, missed=0.03 if engine == "host" else None)

    monkeypatch.setattr(engines, "_run_child", run)
    monkeypatch.setattr(engines, "plot", lambda report, folder: None)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, tmp_path)
    reports = [
        Report.model_validate_json((tmp_path / f"engines_{heads}_batch_full" / "serve.json").read_text())
        for heads in ("pruned", "recalling")
    ]
    for report, count in zip(reports, left, strict=True):
        assert [f.server for f in report.figures] == (["stock"] * 2 + ["hybridkv"] * 2)[:count]
        assert {c.scenario for c in report.comparisons} == set(("batch", "full")[: count - 2])
    assert [report.settings.get("missed, batch") for report in reports] == [
        None,
        "0.030" if left[1] > 2 else None,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dynamic-tiers", "of,host"], "--dynamic-tiers: unknown: of (known: off, gpu, host)"),
        (["--scenarios", "batch,ful"], "--scenarios: unknown: ful (known: batch, full)"),
        (["--clients", "1,x"], "--clients: '1,x': write whole numbers"),
    ],
)
def test_a_typo_ends_it_before_an_engine_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(engines, "_run_child", lambda *_: pytest.fail("an engine started"))
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, tmp_path, *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


class Engine:
    """Decodes as many rows as there is room for; `preempts` one at its last steps."""

    def __init__(self, room: int, preempts: bool) -> None:
        self.llm_engine = self
        self._ids: list[str] = []
        self._room, self._preempts = room, preempts
        self._steps = 0

    def add_request(self, request_id: str, *_: object) -> None:
        self._ids.append(request_id)

    def abort_request(self, ids: list[str]) -> None:
        self._ids = []
        self._steps = 0

    def step(self) -> list[SimpleNamespace]:
        self._steps += 1
        gone = 1 if self._preempts and self._steps > engines.WARM_UP_STEPS + 3 else 0
        return [SimpleNamespace(request_id=name) for name in self._ids[: self._room - gone]]


@pytest.mark.parametrize(
    ("scenario", "room", "preempts", "failed", "timed"),
    [
        ("batch", 2, False, 0, True),
        ("batch", 1, False, 1, False),
        ("batch", 2, True, 0, False),
        ("full", 1, False, 0, False),
    ],
)
def test_a_step_of_fewer_rows_is_not_one_of_an_equal_batch(
    monkeypatch: pytest.MonkeyPatch, scenario: str, room: int, preempts: bool, failed: int, timed: bool
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    monkeypatch.setattr(engines, "start", lambda args: Engine(room, preempts))
    monkeypatch.setattr(engines, "_chunks", lambda llm: ())
    monkeypatch.setattr(engines, "_text_config", lambda model: {"vocab_size": 1000})
    args = SimpleNamespace(
        model="", prompt_tokens=16, spare_tokens=8, requests=2, scenario=scenario, clients=[2], steps=4,
        engine="stock",
    )  # fmt: skip
    (figures,) = engines.measure(args).figures
    assert (figures.clients, figures.answers, figures.failed) == (2, room, failed)
    assert (figures.ms_per_token is not None) == timed
