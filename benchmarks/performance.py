"""Writes docs/performance.md from the committed results: `python benchmarks/performance.py`.

Every folder in benchmarks/results/performance is one machine: `kernels.json` of benchmarks/kernels.py,
`NAME/serve.json` of benchmarks/serve.py or engines.py, and `notes.md`, what there is to say of them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridkv_quality.environment import Environment
from hybridkv_serving.figures import COLUMNS as COLUMNS_OF_SERVERS
from hybridkv_serving.figures import Report
from hybridkv_serving.figures import plot as plot_servers
from hybridkv_serving.kinds import KINDS
from speed.results import COLUMNS, Ratio, Results, not_measured, plot, size

FOLDER = Path(__file__).resolve().parent / "results" / "performance"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
# The card that the goals are for.
CARD = "H200"
LONG = {"batch": 32, "prompt": 32768, "budget": 0.1}


@dataclass(frozen=True)
class Machine:
    """What was measured on one machine."""

    name: str
    kernels: Results | None
    servers: Mapping[str, Report]
    notes: str = ""

    @property
    def device(self) -> str:
        """As the results call it."""
        if self.kernels is not None:
            return self.kernels.environment.device
        return next(iter(self.servers.values())).environment.device


@dataclass(frozen=True)
class Goal:
    """A ratio that has to be reached.

    Attributes:
        text: what it says.
        what: the ratio's name.
        bound: value that is just enough.
        sizes: of the case that it is for; of servers, settings and what the comparison says.
        at_most: whether smaller is better.
        server: whether it is of benchmarks/serve.py or engines.py.
        least_bytes: that a launch has to read to count.
        missed: share of the chosen chunks, in whole percent, that steps had to fetch at least to count.
    """

    text: str
    what: str
    bound: float
    sizes: Mapping[str, Any] = field(default_factory=dict)
    at_most: bool = False
    server: bool = False
    least_bytes: int = 0
    missed: float = 0.0

    def found(self, machine: Machine) -> list[float]:
        """What this machine's results say of it."""
        if self.server:
            return [
                comparison.value
                for report in machine.servers.values()
                for comparison in report.comparisons
                if comparison.what == self.what
                and _fits(self.sizes, report.settings | comparison.model_dump())
                and round(_missed(report, comparison.scenario), 2) >= self.missed
            ]
        if machine.kernels is None:
            return []
        return [
            ratio.value
            for ratio in machine.kernels.ratios
            if ratio.what == self.what
            and _fits(self.sizes, ratio.case)
            and _bytes_read(machine.kernels, ratio) >= self.least_bytes
        ]

    def reached(self, value: float) -> bool:
        """Whether a value is good enough."""
        return value <= self.bound if self.at_most else value >= self.bound


def _fits(sizes: Mapping[str, Any], case: Mapping[str, Any]) -> bool:
    """Whether a case has these values; of a tuple, one of them."""
    choices = {name: value if isinstance(value, tuple) else (value,) for name, value in sizes.items()}
    return all(str(case.get(name)) in map(str, values) for name, values in choices.items())


def _missed(report: Report, scenario: str) -> float:
    """Share of the chosen chunks that a scenario's steps had to fetch; 0 where nobody counted."""
    return float(report.settings.get(f"missed, {scenario}", 0))


def _bytes_read(results: Results, ratio: Ratio) -> int:
    """Of the launch that a ratio's name begins with."""
    of_case = (record for record in results.records if record.case == ratio.case)
    return max((r.num_bytes for r in of_case if ratio.what.startswith(f"{r.op}:")), default=0)


GOALS = (
    Goal(
        "decode kernel, at least a gigabyte a launch, bytes over time, against a copy on the device",
        "decode: bytes over time / bandwidth of a copy",
        0.85,
        least_bytes=10**9,
    ),
    Goal(
        "the same on uncompressed rows, against FlashAttention 3, at every size measured",
        "dense: speed against fa3 on all",
        0.95,
    ),
    Goal(
        "a layer at 10%, 32 x 32k, against FlashAttention 3 on all: pruned heads only",
        "decode: speed against fa3 on all",
        7,
        LONG | {"dynamic": 0.0},
    ),
    Goal(
        "half of the heads recalling from the GPU",
        "step: speed against fa3 on all",
        6,
        LONG | {"dynamic": 0.5, "tier": "gpu"},
    ),
    Goal(
        "half of the heads recalling from the host, 3% missed",
        "step: speed against fa3 on all",
        4,
        LONG | {"dynamic": 0.5, "tier": "host", "missed": 0.03},
    ),
    Goal("recall's share of such a step", "step: share of recall, interval 1", 0.45, LONG, at_most=True),
    Goal("the same, interval 4", "step: share of recall, interval 4", 0.20, LONG, at_most=True),
    Goal(
        "fetching from the host, against a pinned copy",
        "gather: bytes over time / bandwidth of a copy",
        0.85,
        {"tier": "host"},
    ),
    Goal(
        "what ends a prefill of 32k, against that prefill",
        "prefill_end: share of that prefill",
        0.05,
        {"prompt": 32768},
        at_most=True,
    ),
    Goal(
        "time a token, 32 x 32k, all heads pruned",
        "ms_per_token",
        3,
        {"clients": 32, "prompt_tokens": 32768, "dynamic_tier": "off"},
        server=True,
    ),
    Goal(
        "time a token, 32 x 32k, recall from the host, at least 3% missed",
        "ms_per_token",
        2.3,
        {"clients": 32, "prompt_tokens": 32768, "dynamic_tier": "host"},
        server=True,
        missed=0.03,
    ),
    Goal(
        "requests of 32k that decode at once",
        "decoding_at_once",
        7,
        {"prompt_tokens": 32768, "scenario": "full"},
        server=True,
    ),
    Goal(
        "decode tokens/s once admitted, stock short of KV memory",
        "tokens_per_second",
        4,
        {"prompt_tokens": 32768, "scenario": "full"},
        server=True,
    ),
    Goal(
        "tokens/s of the whole run, stock short of KV memory",
        "tokens_per_second",
        4,
        {"prompt_tokens": 32768, "scenario": KINDS},
        server=True,
    ),
    Goal(
        "time a token, 1 x 32k",
        "ms_per_token",
        0.97,
        {"clients": 1, "prompt_tokens": 32768},
        server=True,
    ),
)


def read_machines(folder: Path) -> list[Machine]:
    """All machines with results, by name."""
    machines = []
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        kernels = place / "kernels.json"
        machine = Machine(
            place.name,
            Results.model_validate_json(kernels.read_text()) if kernels.exists() else None,
            {
                path.parent.name: Report.model_validate_json(path.read_text())
                for path in sorted(place.glob("*/serve.json"))
            },
            notes.read_text().strip() if (notes := place / "notes.md").exists() else "",
        )
        if machine.kernels is not None or machine.servers:
            machines.append(machine)
    return machines


def write_page(folder: Path, page: Path) -> None:
    """Writes the page and its plots (`performance/*.png` beside it).

    Raises:
        FileNotFoundError: there are no results.
    """
    machines = read_machines(folder)
    if not machines:
        raise FileNotFoundError(f"{folder} has no results: run benchmarks/kernels.py and benchmarks/serve.py")
    plots = page.parent / page.stem
    shutil.rmtree(plots, ignore_errors=True)
    parts = [*_head(), *_goals(machines)]
    for machine in machines:
        parts += _machine(machine, plots / machine.name)
    page.write_text("\n".join(parts).rstrip() + "\n")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _head() -> Iterator[str]:
    yield "# Performance: what compression saves, and what it costs"
    yield ""
    yield "Written by `python benchmarks/performance.py` from `benchmarks/results/performance`; do not edit."
    yield "Those files are made by `benchmarks/kernels.py`, `serve.py` and `engines.py`, on a GPU through"
    yield "`tools/gpu_check.sh`. A ratio compares two figures of one run on one machine; a result unlike the"
    yield "torch reference's gets none, nor does a run that left a turn unanswered. Kernels are replayed as a"
    yield "CUDA graph, over more data than the cache holds; a record marked `cached` had less and is held"
    yield "against no copy. The end of a prefill is launched from Python, as it is in a server."
    yield ""


def _goals(machines: Sequence[Machine]) -> Iterator[str]:
    cards = [machine for machine in machines if CARD in machine.device]
    yield f"## Goals on an {CARD}"
    yield ""
    if not cards:
        yield f"**No {CARD} has run this yet**, so none of the goals is reached or missed."
        yield ""
    rows = []
    for goal in GOALS:
        values = [value for machine in cards for value in goal.found(machine)]
        worst = (max if goal.at_most else min)(values, default=None)
        said = "not measured" if worst is None else f"{worst:.2f}"
        verdict = "" if worst is None else "yes" if goal.reached(worst) else "no"
        rows.append([goal.text, f"{'at most' if goal.at_most else 'at least'} {goal.bound:g}", said, verdict])
    yield from _table(["what", "goal", "worst measured", "reached"], rows)
    yield "Of the two rows of tokens/s, *once admitted* is the scenario `full` of `engines.py`: decode steps"
    yield "alone, timed when everybody who gets in has, so without prefill, and nobody comes or goes. *Of the"
    yield "whole run* are `images`, `video` and `chat` of `serve.py`, over HTTP, with four times as many"
    yield "clients as stock has memory for: prefill, waiting, and conversations that begin and end included."
    yield ""


def _machine(machine: Machine, plots: Path) -> Iterator[str]:
    yield f"## {machine.device}"
    yield ""
    if machine.notes:
        yield machine.notes
        yield ""
    if machine.kernels is not None:
        yield from _kernels(machine.kernels, machine.name, plots)
    for name, report in machine.servers.items():
        yield from _servers(report, machine.name, name, plots)


def _commit(environment: Environment) -> str:
    return (environment.commit or "unknown")[:10]


def _kernels(results: Results, machine: str, plots: Path) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results.environment.versions.items())
    timed = any(record.ms is not None for record in results.records)
    yield "### Kernels"
    yield ""
    yield f"{results.created_at:%Y-%m-%d}, {versions}, commit {_commit(results.environment)}."
    if timed:
        plots.mkdir(parents=True, exist_ok=True)
        plot(results, plots)
        if (plots / "kernels.png").exists():
            yield f"![bandwidth](performance/{machine}/kernels.png)"
    else:
        yield "Run under Triton's interpreter: it says what is right and what is read, and nothing of time."
    yield ""
    yield from _table(COLUMNS, [record.cells() for record in results.records if record.missing is None])
    missing = not_measured(results)
    yield from (f"- {line}" for line in missing)
    if missing:
        yield ""
    yield from _table(
        ["ratio", "size", "value"], [[r.what, size(r.case), f"{r.value:.2f}"] for r in results.ratios]
    )
    if timed:
        against = [r for r in results.ratios if " speed against " in r.what]
        said = _where_lost([(f"{r.what}, {size(r.case)}", r.value) for r in against])
        yield f"Where another library is faster: {said}."
        yield ""


def _where_lost(ratios: Sequence[tuple[str, float]]) -> str:
    """Names those below 1."""
    if not ratios:
        return "nothing to compare"
    lost = [f"{name} ({value:.2f})" for name, value in ratios if value < 1]
    return "; ".join(lost) or "nowhere in this table"


def _servers(report: Report, machine: str, name: str, plots: Path) -> Iterator[str]:
    settings = report.settings
    yield f"### Servers: {name}"
    yield ""
    told = (
        f"{report.created_at:%Y-%m-%d}, commit {_commit(report.environment)}. Stock vLLM and "
        f"hybridkv (budget {settings['budget']}, tier {settings['dynamic_tier']})"
    )
    if "prompts" in settings:
        yield f"{told} in one process each, on prompts of {settings['prompt_tokens']} {settings['prompts']}."
        if settings["dynamic_tier"] != "off":
            missed = "; ".join(f"{name}: {value}" for name, value in settings.items() if "missed" in name)
            missed = missed or "missed: not measured"
            yield f"Share of the heads that recall: {settings['recalling']}; of the chosen chunks, {missed}."
    else:
        yield (
            f"{told} in KV memory for {settings['prompts_in_memory']} conversations of "
            f"{settings['prompt_tokens']} visual tokens."
        )
    if "CPU" in report.environment.device:
        yield "Here hybridkv runs its torch references: how many decode at once counts, times do not."
    yield ""
    place = plots / name
    place.mkdir(parents=True, exist_ok=True)
    plot_servers(report, place)
    if (place / "serve.png").exists():
        yield f"![servers](performance/{machine}/{name}/serve.png)"
        yield ""
    yield from _table(COLUMNS_OF_SERVERS, [figures.cells() for figures in report.figures])
    compared = [(f"{c.what} in {c.scenario}, {c.clients} clients", c.value) for c in report.comparisons]
    yield f"Where stock is ahead: {_where_lost(compared)}."
    yield ""


def main() -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    write_page(args.results, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
