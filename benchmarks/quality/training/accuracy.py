"""Writes how often the small model is right with its full cache, for docs/quality.md.

python benchmarks/quality/training/accuracy.py [--model FOLDER] [--tokens 1024,2048] [--answers 400]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from batches import Batches, Drawings
from hybridkv_quality.environment import environment
from hybridkv_quality.intervals import wilson
from hybridkv_quality.model_path import model_folder
from hybridkv_quality.questions import TASKS
from hybridkv_quality.scenes import shape_for
from network import answer_logits, whole_answers
from rich.progress import track
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

OUT = Path(__file__).resolve().parents[2] / "results" / "quality" / "model.json"
# All that benchmarks/quality/sweep.py asks at.
LENGTHS = (512, 1024, 2048, 4096, 8192)
ANSWERS, QUESTIONS = 400, 20
# Not the training's own scenes, whose seeds are numbers of steps.
SEED = 1_000_003


@torch.no_grad()
def count_right(
    model: Qwen2_5_VLForConditionalGeneration,
    batches: Batches,
    task: str,
    tokens: int,
    answers: int,
    seed: int,
) -> int:
    """How many of `answers` fresh questions of a task are answered right, every word of them.

    Args:
        answers: a multiple of `QUESTIONS`, which are asked about each scene.
    """
    rng = np.random.default_rng((seed, tokens, list(TASKS).index(task)))
    right = 0
    for _ in range(answers // QUESTIONS):
        batch = batches.draw(shape_for(TASKS[task].kind, tokens, rng), 1, QUESTIONS, {task: 1.0})
        right += int(whole_answers(batch, answer_logits(model, batch)).sum())
    return right


def main() -> None:
    """Asks every task at every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=model_folder())
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=LENGTHS)
    parser.add_argument("--answers", type=int, default=ANSWERS, help="a task and length")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.answers < 1 or args.answers % QUESTIONS:
        parser.error(f"--answers must be a multiple of {QUESTIONS}, not {args.answers}")
    torch.set_num_threads(args.threads)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    drawings = Drawings.draw(np.random.default_rng(args.seed))
    batches = Batches(model, AutoTokenizer.from_pretrained(args.model), drawings, args.seed)
    accuracy: dict[str, dict[str, dict[str, float]]] = {task: {} for task in TASKS}
    for tokens, task in track([(tokens, task) for tokens in args.tokens for task in TASKS]):
        right = count_right(model, batches, task, tokens, args.answers, args.seed)
        accuracy[task][str(tokens)] = wilson(right, args.answers).model_dump()
        print(f"{tokens} {task} {right / args.answers:.3f}", flush=True)
    report = {
        "environment": environment().model_dump(),
        "seed": args.seed,
        "answers": args.answers,
        "accuracy": accuracy,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
