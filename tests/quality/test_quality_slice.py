"""Guards quality: a small part of the suite on the real engine, against the committed figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hybridkv_quality.intervals import wilson
from hybridkv_quality.report import ConditionResult, Results
from hybridkv_quality.settings import FULL

from hybridkv_vllm.profile import HeadProfile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))

import sweep  # noqa: E402
from page import read_results, write_page  # noqa: E402
from sweep import RESULTS  # noqa: E402

BUDGET = 0.1


def condition(results: Results, policy: str) -> ConditionResult:
    """The full cache, or a policy at 10%."""
    return next(
        c for c in results.conditions if c.policy == policy and (policy == FULL or c.budget == BUDGET)
    )


@pytest.mark.slow
def test_accuracy_is_the_committed_one(tmp_path: Path) -> None:
    (run,) = (run for run in sweep.runs() if run.name == "slice")
    command = Path(sys.executable).with_name("hybridkv")
    subprocess.run([command, "eval", *run.arguments(tmp_path)], check=True, timeout=600)
    now = Results.model_validate_json((tmp_path / "slice" / "results.json").read_text())
    committed = read_results(RESULTS)["slice"]
    for policy in (FULL, "hybridkv"):
        before, after = condition(committed, policy), condition(now, policy)
        assert after.n == before.n
        # Where every answer is right the bootstrap has nothing to vary.
        low = min(before.mean.low, wilson(before.mean.value * before.n, before.n).low)
        assert low <= after.mean.value <= before.mean.high, policy
        assert after.memory.held_share == pytest.approx(before.memory.held_share, rel=1e-6)
    assert condition(now, "hybridkv").memory.held_share < 2 * BUDGET


def test_a_page_says_what_the_results_say(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"main\.json is missing: run benchmarks/quality/sweep\.py"):
        write_page(tmp_path, tmp_path / "quality.md")
    for name in ("main", "tokens-1024", "ablation-default"):
        shutil.copy(RESULTS / "slice.json", tmp_path / f"{name}.json")
    shutil.copy(RESULTS / "curve.json", tmp_path)
    write_page(tmp_path, tmp_path / "quality.md")
    page = (tmp_path / "quality.md").read_text()
    results = read_results(RESULTS)["slice"]
    for policy in (FULL, "hybridkv"):
        found = condition(results, policy)
        share = f"{found.memory.held_share:.1%}"
        assert f"| {found.n} | {100 * found.mean.value:.1f} [" in page
        assert f" | {share} |" in page
    loss = 1 - condition(results, "hybridkv").mean.value / condition(results, FULL).mean.value
    assert f"At 10% `hybridkv` loses {100 * loss:.1f}% of the full cache's mean" in page
    assert {file.stem for file in (tmp_path / "quality").iterdir()} == {
        "accuracy_by_memory",
        "tasks_at_0.1",
        "chain_by_word",
    }


def test_the_page_counts_where_classifiers_are_wrong(tmp_path: Path) -> None:
    """Of two heads the first moves: `text_mass` is wrong about both, the profile about none."""
    chain = {"pruned": [[0.5, 0.0]], "best": [[0.1, 0.0]], "overlap": [[0.2, 0.9]]}
    task = {**chain, "figures": {"text_mass": [[0.95, 0.5]]}}
    report = {"share": 0.1, "tokens": 512, "contexts": 1, "tasks": {"chain": task}}
    (tmp_path / "heads.json").write_text(json.dumps(report))
    profile = HeadProfile(
        model="small", tasks=["chain"], tokens=512, prompts=1, share=0.1, moving=[[0.4, 0.0]]
    )
    (tmp_path / "profile.json").write_text(profile.model_dump_json())
    shutil.copy(RESULTS / "slice.json", tmp_path / "main.json")
    write_page(tmp_path, tmp_path / "quality.md")
    page = (tmp_path / "quality.md").read_text()
    assert "| `text_mass` | 1 of 1 | 1 of 1 |" in page
    assert "| `profile` | 0 of 1 | 0 of 1 |" in page
    assert "| chain | 0.40 | 0.20 |" in page
