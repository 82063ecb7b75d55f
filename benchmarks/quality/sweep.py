"""Runs every evaluation that docs/quality.md is made of; a run that was stopped goes on where it was.

python benchmarks/quality/sweep.py [--work DIR] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality"
# What `hybridkv calibrate` says of the small model's heads.
PROFILE = RESULTS / "profile.json"
RIVALS = "hybridkv-paper,snapkv,adakv,pyramidkv,lookm,sparsemm,streamingllm,quest"
# Tasks whose later steps need other tokens than the question does, and one of each other kind of scene.
TELLING = "chain,multi_recall,second_question,picture_needle,video"


@dataclass(frozen=True)
class Run:
    """One call of `hybridkv eval`."""

    name: str
    policies: str = "hybridkv"
    budgets: str = "0.05,0.1"
    tasks: str | None = TELLING
    tokens: int = 2048
    contexts: int = 10
    options: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, work: Path) -> list[str]:
        """The command's arguments."""
        given = ["--out", str(work / self.name), "--policies", self.policies, "--budgets", self.budgets]
        given += ["--tokens", str(self.tokens), "--contexts", str(self.contexts)]
        if self.tasks is not None:
            given += ["--tasks", self.tasks]
        for name, value in self.options.items():
            given += ["--option", f"{name}={value}"]
        return given


def runs() -> Iterator[Run]:
    """All runs, the most important first. CI repeats `slice`."""
    yield Run("slice", budgets="0.1,1.0", tasks=None, tokens=1024, contexts=4)
    yield Run("main", f"hybridkv,{RIVALS}", "0.05,0.1,0.2,0.5,1.0", tasks=None, contexts=20)
    for tokens, contexts in ((512, 20), (4096, 8), (8192, 5)):
        yield Run(
            f"tokens-{tokens}",
            "hybridkv,hybridkv-paper,snapkv,quest",
            "0.05,0.1,1.0",
            tokens=tokens,
            contexts=contexts,
        )
    for name, options in ablations():
        yield Run(f"ablation-{name}", options=options)


def ablations() -> Iterator[tuple[str, dict[str, str]]]:
    """One departure from the defaults each: the paper's ablations, then sweeps."""
    yield "default", {}
    yield "all-static", {"dynamic_tier": "off"}
    yield "all-dynamic", {"classifier": "sparsity", "theta": "1.0"}
    yield "no-type-level", {"dynamic_share": "1.0"}
    yield "no-head-level", {"static_weight": "even"}
    yield "weight-sparse", {"static_weight": "sparse"}
    for classifier in ("sparsity", "top_mass", "union"):
        yield f"classifier-{classifier}", {"classifier": classifier}
    for theta in ("0.5", "0.7", "0.97"):
        yield f"theta-{theta}", {"theta": theta}
    for share in ("0.0", "0.2", "0.7"):
        yield f"r-{share}", {"dynamic_share": share}
    for landmark in ("sketch", "mean", "minmax"):
        yield f"landmark-{landmark}", {"landmark": landmark}
    for interval in ("2", "4"):
        yield f"interval-{interval}", {"recall_interval": interval}
    yield "profile", {"profile": str(PROFILE)}


def main() -> int:
    """Runs what is asked for; the exit code of the first run that failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/hybridkv-quality"), help="folder of all runs")
    parser.add_argument("--only", nargs="*", help="names of runs")
    args = parser.parse_args()
    chosen = [run for run in runs() if args.only is None or run.name in args.only]
    if args.only is not None and len(chosen) != len(args.only):
        parser.error(f"unknown run; known: {', '.join(run.name for run in runs())}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = str(Path(sys.executable).with_name("hybridkv"))
    if any("profile" in run.options for run in chosen):
        code = subprocess.run([command, "calibrate", "--out", str(PROFILE)], check=False).returncode
        if code:
            return code
    for run in chosen:
        print(f"== {run.name}", flush=True)
        code = subprocess.run([command, "eval", *run.arguments(args.work)], check=False).returncode
        if code:
            return code
        shutil.copy(args.work / run.name / "results.json", RESULTS / f"{run.name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
