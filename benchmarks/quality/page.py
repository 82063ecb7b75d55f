"""Writes docs/quality.md from the committed results: `python benchmarks/quality/page.py`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridkv_quality.intervals import Estimate
from hybridkv_quality.plots import accuracy_by_hop, accuracy_by_memory, accuracy_by_task
from hybridkv_quality.report import ConditionResult, Results
from hybridkv_quality.settings import FULL
from hybridkv_quality.tasks import suite_samples
from sweep import PROFILE, RESULTS

from hybridkv_vllm.profile import HeadProfile

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quality.md"
OURS = "hybridkv"
# The paper's mean loss over its eight image tasks at 10% (66.68 of 67.53).
PAPERS_LOSS = 0.0126
MIB = 2**20
# Attention that a pruned head would lose, of a step's, from which it must not be pruned.
MUST_RECALL = 0.05
# Figures of text and plots in per cent, with one decimal.
Rows = Sequence[Sequence[str]]


def read_results(folder: Path) -> dict[str, Results]:
    """All results of evaluations by name."""
    others = ("heads", "curve", "model", PROFILE.stem)
    files = sorted(file for file in folder.glob("*.json") if file.stem not in others)
    return {file.stem: Results.model_validate_json(file.read_text()) for file in files}


def write_page(folder: Path, page: Path) -> None:
    """Writes the page and its plots (`quality/*.png` beside it).

    Raises:
        FileNotFoundError: the main results are missing.
    """
    results = read_results(folder)
    if "main" not in results:
        raise FileNotFoundError(f"{folder}/main.json is missing: run benchmarks/quality/sweep.py")
    plots = page.parent / page.stem
    shutil.rmtree(plots, ignore_errors=True)
    plots.mkdir(parents=True)
    main = results["main"]
    accuracy_by_memory(main, plots / "accuracy_by_memory.png")
    at_tenth = [c for c in main.conditions if c.policy == FULL or c.budget == 0.1]
    accuracy_by_task(at_tenth, main.tasks(), 0.1, plots / "tasks_at_0.1.png")
    accuracy_by_hop(main, "chain", plots / "chain_by_word.png")
    parts = [*_head(main), *_main(main), *_tasks(main), *_lengths(results), *_ablations(results)]
    heads = folder / "heads.json"
    if heads.exists():
        profile = folder / PROFILE.name
        calibrated = HeadProfile.model_validate_json(profile.read_bytes()) if profile.exists() else None
        parts += _heads(json.loads(heads.read_text()), calibrated)
    parts += _model(folder / "model.json", folder / "curve.json")
    page.write_text("\n".join(parts).rstrip() + "\n")


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _table(header: Sequence[str], rows: Rows) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _full(results: Results) -> ConditionResult:
    return next(c for c in results.conditions if c.policy == FULL)


def _find(results: Results, policy: str, budget: float) -> ConditionResult | None:
    return next((c for c in results.conditions if c.policy == policy and c.budget == budget), None)


def _budgets(results: Results) -> list[float]:
    return sorted({c.budget for c in results.conditions if c.policy != FULL and c.budget is not None})


def _head(main: Results) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in main.environment.versions.items())
    yield "# Quality: what compression costs"
    yield ""
    yield "Written by `python benchmarks/quality/page.py` from `benchmarks/results/quality`; do not edit."
    yield "`python benchmarks/quality/sweep.py` makes those files, on vLLM's own engine, with real pictures."
    yield ""
    yield (
        f"Measured {main.created_at:%Y-%m-%d} on {main.environment.device}, {versions}, commit "
        f"{(main.environment.commit or 'unknown')[:10]}, seed {main.seed}, "
        f"{main.configuration['samples']['tokens']} prompt tokens. Intervals are 95%: Wilson's for a task, "
        "bootstrap over contexts for means. Decoding is greedy; an answer is right if every word of it is."
    )
    yield ""
    yield "The model is the small Qwen2.5-VL that ships with this package. It says how methods differ on"
    yield "attention that means something; it does not say what a large model loses: see [eval.md](eval.md)."
    yield ""
    yield "## How to read it"
    yield ""
    yield "- The facts are single visual tokens among clutter, and most answers need another one with each"
    yield "  word. That is the hardest case for what decides once (pruning) and for what averages over 16"
    yield "  tokens (`mean`, which `hybridkv-paper` uses for want of the paper's code, and `quest`'s bounds)."
    yield "- So a `recall_interval` above 1 fails here: what the next word needs is not fetched."
    yield "- By default a server leaves prompts of fewer than 1,024 tokens uncompressed; 512 is here"
    yield "  to show why."
    yield ""
    yield "## Tasks"
    yield ""
    rows = [[s.task, f"`{str(s.messages[-1].parts[-1]).strip()}`", f"`{s.answer}`"] for s in _examples()]
    yield from _table(["task", "question, behind the pictures", "answer"], rows)
    yield "A domino has a name (colour and letter) and points to another. `chain` follows eight pointers, so"
    yield "later steps cannot be foreseen from the prompt; `video` does so through near-duplicate frames."
    yield "`second_question` asks after a first one was answered, with the pictures in the prefix cache."
    yield ""


def _examples() -> Iterator[Any]:
    seen = set()
    for sample in suite_samples(tokens=512, contexts=1):
        if sample.task not in seen:
            seen.add(sample.task)
            yield sample


def _main(main: Results) -> Iterator[str]:
    full = _full(main)
    yield "## Methods"
    yield ""
    yield "![accuracy against memory](quality/accuracy_by_memory.png)"
    yield ""
    yield (
        "Mean over tasks, in %. KV held is what the block pool held while the answer was decoded, as a share "
        "of the uncompressed prompt: arena, landmarks and the prompt's last partial block."
    )
    yield ""
    rows = []
    for condition in main.conditions:
        memory = condition.memory
        loss = 1 - condition.mean.value / full.mean.value
        rows.append(
            [
                condition.policy,
                "" if condition.budget is None else f"{condition.budget:.0%}",
                str(condition.n),
                _percent(condition.mean),
                f"{100 * loss:.1f}",
                "?" if memory.held_share is None else f"{memory.held_share:.1%}",
                "?" if memory.held_bytes is None else f"{memory.held_bytes / MIB:.2f}",
                "?" if memory.host_bytes is None else f"{memory.host_bytes / MIB:.2f}",
            ]
        )
    header = ["policy", "budget", "answers", "mean", "relative loss", "KV held", "GPU MiB", "host MiB"]
    yield from _table(header, rows)
    yield from _verdicts(main, full)


def _verdicts(main: Results, full: ConditionResult) -> Iterator[str]:
    """Says in words, from the numbers, where ours is ahead and where it is not."""
    ours = _find(main, OURS, 0.1)
    if ours is not None:
        loss = 1 - ours.mean.value / full.mean.value
        relation = "within" if loss <= PAPERS_LOSS else "more than"
        yield (
            f"At 10% `{OURS}` loses {100 * loss:.1f}% of the full cache's mean, {relation} the "
            f"{100 * PAPERS_LOSS:.1f}% that the paper reports for its own tasks."
        )
        yield ""
    for budget in _budgets(main):
        best = _find(main, OURS, budget)
        rivals = [c for c in main.conditions if c.budget == budget and c.policy not in (OURS, FULL)]
        if best is None or not rivals:
            continue
        rival = max(rivals, key=lambda c: c.mean.value)
        ahead = 100 * (best.mean.value - rival.mean.value)
        word = "ahead of" if ahead > 0 else "level with" if ahead == 0 else "behind"
        yield (
            f"- {budget:.0%}: {100 * best.mean.value:.1f}, {word} the best rival, `{rival.policy}` "
            f"({100 * rival.mean.value:.1f})."
        )
    yield ""
    lost = [
        f"`{c.policy}` on {task} at {c.budget:.0%} ({100 * result.accuracy.value:.0f} against "
        f"{100 * ours_at.tasks[task].accuracy.value:.0f})"
        for c in main.conditions
        if c.policy not in (OURS, FULL) and c.budget is not None
        for ours_at in [_find(main, OURS, c.budget)]
        if ours_at is not None
        for task, result in c.tasks.items()
        if result.accuracy.value > ours_at.tasks[task].accuracy.value
    ]
    yield "Where a rival is ahead: " + ("; ".join(lost) + "." if lost else "nowhere in this table.")
    yield ""


def _tasks(main: Results) -> Iterator[str]:
    yield "## Tasks at small budgets"
    yield ""
    yield "![tasks at 10%](quality/tasks_at_0.1.png)"
    yield ""
    for budget in _budgets(main)[:2]:
        conditions = [c for c in main.conditions if c.policy == FULL or c.budget == budget]
        rows = [
            [task, str(_full(main).tasks[task].n), *(_percent(c.tasks[task].accuracy) for c in conditions)]
            for task in main.tasks()
        ]
        yield from _table(["task", "n", *(f"{c.policy}" for c in conditions)], rows)
    yield "![chain by word](quality/chain_by_word.png)"
    yield ""


def _lengths(results: Mapping[str, Results]) -> Iterator[str]:
    named = {name.removeprefix("tokens-"): r for name, r in results.items() if name.startswith("tokens-")}
    if not named:
        return
    yield "## Lengths"
    yield ""
    yield "Mean over the tasks " + ", ".join(next(iter(named.values())).tasks()) + "."
    yield ""
    rows = []
    for tokens, result in sorted(named.items(), key=lambda item: int(item[0])):
        for condition in result.conditions:
            share = condition.memory.held_share
            rows.append(
                [
                    tokens,
                    condition.policy,
                    "" if condition.budget is None else f"{condition.budget:.0%}",
                    str(condition.n),
                    _percent(condition.mean),
                    "?" if share is None else f"{share:.1%}",
                ]
            )
    yield from _table(["tokens", "policy", "budget", "answers", "mean", "KV held"], rows)


def _ablations(results: Mapping[str, Results]) -> Iterator[str]:
    named = {name.removeprefix("ablation-"): r for name, r in results.items() if name.startswith("ablation-")}
    if "default" not in named:
        return
    default = named.pop("default")
    budgets = _budgets(default)
    yield "## Ablations and sweeps"
    yield ""
    yield (
        "One option changed each, policy `hybridkv`, mean over the tasks " + ", ".join(default.tasks()) + "."
    )
    yield "The chunk is the page of 16 tokens and is not swept. `dynamic_share` (r) and the type level change"
    yield "nothing where landmarks and the least number of chunks are more than that share anyway."
    yield ""
    rows = []
    for name, result in [("default", default), *named.items()]:
        row = [name]
        for budget in budgets:
            condition = _find(result, OURS, budget)
            row.append("-" if condition is None else _percent(condition.mean))
        chain = _find(result, OURS, budgets[-1])
        row.append("-" if chain is None else _percent(chain.tasks["chain"].accuracy))
        rows.append(row)
    header = ["change", *(f"mean at {budget:.0%}" for budget in budgets), f"chain at {budgets[-1]:.0%}"]
    yield from _table(header, rows)


def _heads(report: Mapping[str, Any], profile: HeadProfile | None) -> Iterator[str]:
    yield "## What heads really did"
    yield ""
    yield (
        f"Attention of the model in Transformers, {report['tokens']} tokens, {report['contexts']} prompts a "
        "task. For each KV head: the attention of a decode step that is lost if the head keeps the "
        f"{report['share']:.0%} of tokens that the prompt's last queries looked at, less what is lost if "
        "each step chooses as many for itself. A head must not be pruned where that is over "
        f"{MUST_RECALL:.0%}. A classifier is wrong in two ways: it calls such a head static (the answer "
        "suffers), or another head dynamic (memory does)."
    )
    yield ""
    names = list(next(iter(report["tasks"].values()))["figures"])
    calibrated: dict[str, Any] = {}
    if profile is not None:
        layers, heads = profile.shape
        calibrated[PROFILE.stem] = profile.figures(range(layers), range(heads))
    theta = 0.9
    rows = []
    for name in [*names, *calibrated]:
        missed = wasted = moving = still = 0
        for task in report["tasks"].values():
            judged = calibrated[name] if name in calibrated else task["figures"][name]
            for pruned, best, figure in zip(
                _flat(task["pruned"]), _flat(task["best"]), _flat(judged), strict=True
            ):
                must = pruned - best > MUST_RECALL
                moving += must
                still += not must
                missed += must and figure >= theta
                wasted += not must and figure < theta
        rows.append([f"`{name}`", f"{missed} of {moving}", f"{wasted} of {still}"])
    yield from _table(["classifier (theta 0.9)", "moving heads called static", "others called dynamic"], rows)
    rows = [
        [
            task,
            f"{max(p - b for p, b in zip(_flat(seen['pruned']), _flat(seen['best']), strict=True)):.2f}",
            f"{min(_flat(seen['overlap'])):.2f}",
        ]
        for task, seen in report["tasks"].items()
    ]
    yield from _table(["task", "attention lost by the most moving head", "least overlap of steps"], rows)


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def _model(accuracy: Path, curve: Path) -> Iterator[str]:
    if not accuracy.exists() or not curve.exists():
        return
    report = json.loads(accuracy.read_text())
    points = [point for point in json.loads(curve.read_text()) if "step" in point]
    lengths = list(next(iter(report["accuracy"].values())))
    yield "## The model itself"
    yield ""
    yield (
        f"Trained by `benchmarks/quality/training/train.py`, {points[-1]['step']} steps on a CPU, curve in "
        "`benchmarks/results/quality/curve.json`. With its full cache, in % of "
        f"{report['answers']} fresh questions a task and length (seed {report['seed']}, "
        "`benchmarks/quality/training/accuracy.py`):"
    )
    yield ""
    rows = [
        [task, *(_percent(Estimate.model_validate(by_length[tokens])) for tokens in lengths)]
        for task, by_length in report["accuracy"].items()
    ]
    yield from _table(["task", *(f"{int(tokens):,} tokens" for tokens in lengths)], rows)


def main() -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    write_page(args.results, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
