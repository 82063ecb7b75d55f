"""Writes what each KV head of the small model looked at while decoding, for docs/quality.md.

python benchmarks/quality/watch_heads.py [--model FOLDER] [--tokens 1024] [--contexts 4]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from hybridkv_quality.calibrate import load_model
from hybridkv_quality.environment import environment
from hybridkv_quality.heads import HeadBehaviour, mean_behaviour, watch_heads
from hybridkv_quality.model_path import model_folder
from hybridkv_quality.tasks import suite_samples
from sweep import RESULTS

OUT = RESULTS / "heads.json"
SHARE = 0.1


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in layer] for layer in values.tolist()]


def _as_json(seen: HeadBehaviour) -> dict[str, Any]:
    return {
        "reach": _rounded(seen.reach),
        "pruned": _rounded(seen.pruned),
        "best": _rounded(seen.best),
        "overlap": _rounded(seen.overlap),
        "figures": {name: _rounded(figure) for name, figure in seen.figures.items()},
    }


def main() -> int:
    """Watches the heads on every task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=model_folder())
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model, processor = load_model(str(args.model))
    seen: dict[str, list[HeadBehaviour]] = defaultdict(list)
    for sample in suite_samples(tokens=args.tokens, contexts=args.contexts):
        seen[sample.task].append(watch_heads(model, processor, sample, SHARE))
    report = {
        "environment": environment().model_dump(),
        "share": SHARE,
        "tokens": args.tokens,
        "contexts": args.contexts,
        "tasks": {task: _as_json(mean_behaviour(behaviours)) for task, behaviours in seen.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
