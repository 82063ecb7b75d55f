"""`hybridkv calibrate`: watches a model's KV heads once, on the suite's prompts, and writes their profile."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from hybridkv_quality.model_path import model_folder
from hybridkv_quality.output_file import check_writable
from hybridkv_vllm import exit_codes
from hybridkv_vllm.profile import HeadProfile
from hybridkv_vllm.terminal import standard_output

DESCRIPTION = """\
Finds out, once for a model, which KV heads look elsewhere at each step of an answer: those that must not be
pruned by what the prompt's end looks at. A prompt alone does not always tell.

The model runs in Transformers, on a GPU where there is one, over the suite's pictures and right answers. The
file goes to the server: --additional-config.hybridkv.profile FILE. It takes the classifier's place.
"""
EPILOG = """\
examples:
  hybridkv calibrate Qwen/Qwen2.5-VL-7B-Instruct --out qwen.json
  hybridkv calibrate --out small.json --tokens 1024      (the suite's own small model)

exit code: 0 done, 1 writing the file failed or the run was stopped, 2 wrong arguments, a model that cannot
be loaded or a file that cannot be written, found before the model runs
"""
# Tasks whose later steps look elsewhere than the question does, and one that recites text.
TASKS = "chain,multi_recall,order,text_needle,video"
# Of the prompts here, so that what is calibrated is not what is measured (`hybridkv eval` has 0).
SEED = 1_000_003


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `hybridkv calibrate`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", help="folder or name on a hub (default: the suite's small model)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--tasks", default=TASKS, metavar="A,B", help=f"of the suite (default: {TASKS})")
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt, about (default: 2048)")
    parser.add_argument("--contexts", type=int, default=4, help="prompts of each kind (default: 4)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the prompts (default: {SEED})")
    parser.add_argument(
        "--share", type=float, default=0.1, help="of a prompt that a pruned head would keep (default: 0.1)"
    )
    parser.add_argument("--json", action="store_true", help="print the file's contents instead of a table")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    try:
        # A script's variable without a value: the profile would be of the small model.
        if args.model == "":
            raise ValueError("the model's name is empty; give it, or leave it out")
        check_writable(args.out)
        profile = calibrate(
            args.model or str(model_folder()),
            [task.strip() for task in args.tasks.split(",")],
            tokens=args.tokens,
            contexts=args.contexts,
            seed=args.seed,
            share=args.share,
        )
    except (ValueError, OSError) as error:
        print(f"hybridkv: {error}", file=sys.stderr)
        return exit_codes.USAGE
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(profile.model_dump_json(indent=1) + "\n")
    except OSError as error:
        print(f"hybridkv: {args.out} cannot be written: {error}", file=sys.stderr)
        return exit_codes.PROBLEM
    if args.json:
        print(profile.model_dump_json(indent=1, ensure_ascii=True))
    else:
        standard_output().print(_table(profile))
        print(f"serve with --additional-config.hybridkv.profile {args.out}")
    return exit_codes.OK


def calibrate(
    model: str, tasks: Sequence[str], *, tokens: int, contexts: int, seed: int, share: float
) -> HeadProfile:
    """Watches a model's heads; see `HeadProfile`.

    Raises:
        ValueError: an unknown task, prompts too short, or a share that is none.
        OSError: the model is not to be had.
    """
    if not 0 < share < 1:
        raise ValueError(f"--share must be between 0 and 1, got {share}")
    from hybridkv_quality.tasks import suite_samples

    try:
        samples = list(suite_samples(tasks, tokens=tokens, contexts=contexts, seed=seed))
    except ValueError as error:
        raise ValueError(f"--tasks, --tokens, --contexts: {error}") from None
    # Seconds to import, which a wrong argument should not have to wait for.
    import torch

    from hybridkv_quality.heads import HeadBehaviour, mean_behaviour, watch_heads

    loaded, processor = load_model(model)
    seen: dict[str, list[HeadBehaviour]] = defaultdict(list)
    for sample in track(samples, "watching heads", console=Console(stderr=True), transient=True):
        seen[sample.task].append(watch_heads(loaded, processor, sample, share))
    of_tasks = [mean_behaviour(behaviours).moving for behaviours in seen.values()]
    moving = torch.stack(of_tasks).mean(0).clamp(0, 1)
    return HeadProfile(
        model=model,
        tasks=sorted(seen),
        tokens=tokens,
        prompts=len(samples),
        share=share,
        moving=[[round(head, 4) for head in layer] for layer in moving.tolist()],
    )


def load_model(model: str) -> tuple[Any, Any]:
    """A model that can be watched, in the precision it has on a GPU, else in fp32; and its processor.

    Raises:
        OSError: it is not to be had, or damaged.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    on_gpu = torch.cuda.is_available()
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(
            model, dtype="auto" if on_gpu else torch.float32, attn_implementation="sdpa"
        )
    except SafetensorError as error:
        raise OSError(f"{model}: its weights are damaged ({error}); fetch them again") from None
    return loaded.to("cuda" if on_gpu else "cpu").eval(), AutoProcessor.from_pretrained(model)


def _table(profile: HeadProfile) -> Table:
    """Layers by KV heads, what moves in per cent."""
    table = Table(title=f"attention that moves, % ({profile.model}, {profile.prompts} prompts)")
    table.add_column("layer", justify="right")
    for head in range(profile.shape[1]):
        table.add_column(f"KV head {head}", justify="right")
    for number, layer in enumerate(profile.moving):
        table.add_row(str(number), *(f"{100 * share:.0f}" for share in layer))
    return table
