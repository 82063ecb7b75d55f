"""The page about performance: what it says of goals, and where it says that we lose."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from hybridkv_quality.environment import environment
from hybridkv_serving.figures import Figures, Report, compare
from scripts import load
from speed.layer import Case
from speed.results import Record, Results, find_ratios

performance = load("performance")
REPOSITORY = Path(__file__).resolve().parents[2]


def figures(server: str, ms: float, at_once: int) -> Figures:
    return Figures(
        server=server, scenario="batch", clients=32, answers=32, failed=0, prompt_tokens=32768,
        tokens_per_second=100, decoding_at_once=at_once, ms_per_token=ms, first_token_p50=1,
        first_token_p99=2, goodput=1,
    )  # fmt: skip


def write_results(folder: Path, device: str) -> None:
    case = asdict(Case(32, 32768, 0.1))

    def record(op: str, backend: str, ms: float) -> Record:
        return Record(op=op, backend=backend, case=case, num_bytes=10**9, ms=ms, error=0.0, right=True)

    results = Results(
        environment=environment(device),
        copy_bandwidth=1e12,
        pinned_bandwidth=1e10,
        records=[
            record("decode", "triton", 1.0),
            record("decode", "triton", 1.0).model_copy(update={"case": case | {"budget": 0.5}}),
            record("dense", "triton", 12.0),
            record("dense", "fa3", 8.0),
            record("dense", "flashinfer", 20.0),
        ],
    )
    results.ratios = list(find_ratios(results))
    folder.mkdir(parents=True)
    (folder / "kernels.json").write_text(results.model_dump_json())
    settings = {"budget": "0.1", "dynamic_tier": "off", "prompts_in_memory": "32", "prompt_tokens": "32768"}
    both = [figures("stock", 30, 32), figures("hybridkv", 12, 16)]
    report = Report(
        environment=environment(device), settings=settings, figures=both, comparisons=list(compare(both))
    )
    (folder / "notes.md").write_text("**What bounds it**: the link.\n")
    (folder / "pruned").mkdir()
    (folder / "pruned" / "serve.json").write_text(report.model_dump_json())


def goal_rows(page: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {row[0]: [cell.strip() for cell in row[1:]] for row in rows if len(row) in (3, 4)}


def test_goals_are_held_against_the_card_they_are_for(tmp_path: Path) -> None:
    write_results(tmp_path / "results" / "h200", "NVIDIA H200")
    performance.write_page(tmp_path / "results", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    rows = goal_rows(page)
    # Full bandwidth; 8 ms against 12; 8 against 1; 30 ms against 12, of 3.
    bandwidth = "decode kernel, about a gigabyte a launch, bytes over time, against a copy on the device"
    assert rows[bandwidth] == ["at least 0.85", "1.00", "yes"]
    assert rows["the same on uncompressed rows, against FlashAttention 3, at every size measured"] == [
        "at least 0.95",
        "0.67",
        "no",
    ]
    layer = "a layer at 10%, 32 x 32k, against FlashAttention 3 on all: pruned heads only"
    assert rows[layer] == ["at least 7", "8.00", "yes"]
    assert rows["time a token, 32 x 32k, all heads pruned"] == ["at least 3", "2.50", "no"]
    assert rows["time a token, 32 x 32k, recall from the host"][:2] == ["at least 2.3", "not measured"]
    assert "## NVIDIA H200\n\n**What bounds it**: the link.\n\n### Kernels" in page
    # Where stock has room for everybody nothing is said of concurrency.
    assert rows["requests of 32k that decode at once"][:2] == ["at least 7", "not measured"]
    assert "Where another library is faster: dense: speed against fa3 on all" in page
    assert "dense: speed against flashinfer on all" in page
    assert "Where stock is ahead: decoding_at_once in batch, 32 clients (0.50)" in page
    for plot in ("kernels.png", "pruned/serve.png"):
        assert f"(performance/h200/{plot})" in page
        assert (tmp_path / "performance" / "h200" / plot).stat().st_size > 5000


def test_another_machines_results_reach_no_goal(tmp_path: Path) -> None:
    write_results(tmp_path / "results" / "a100", "NVIDIA A100")
    performance.write_page(tmp_path / "results", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "No H200 has run this yet" in page
    assert {row[1] for row in goal_rows(page).values() if row[0].startswith("at ")} == {"not measured"}
    assert "## NVIDIA A100" in page


def test_without_results_it_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run benchmarks/kernels\.py"):
        performance.write_page(tmp_path, tmp_path / "performance.md")


def test_the_committed_page_is_the_committed_results(tmp_path: Path) -> None:
    performance.write_page(performance.FOLDER, tmp_path / "performance.md")
    committed = REPOSITORY / "docs" / "performance.md"
    assert (tmp_path / "performance.md").read_text() == committed.read_text()
