"""The command `hybridkv`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridkv_quality import calibrate, inspection
from hybridkv_quality import command as evaluation
from hybridkv_serving import command as bench
from rich.console import Console

from hybridkv_vllm import __version__, exit_codes, shapes


def _doctor(args: argparse.Namespace) -> int:
    from hybridkv_vllm.doctor import examine, findings_table

    findings = examine()
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        Console().print(findings_table(findings))
    return exit_codes.PROBLEM if any(finding.status == "problem" for finding in findings) else exit_codes.OK


def _tiny_model(args: argparse.Namespace) -> int:
    from hybridkv_vllm.tiny_model import write_tiny_model

    try:
        folder = write_tiny_model(args.out, seed=args.seed, force=args.force)
    except (FileExistsError, ValueError) as error:
        print(f"hybridkv: {error}", file=sys.stderr)
        return exit_codes.USAGE
    except OSError as error:
        print(f"hybridkv: {args.out} cannot be written: {error}", file=sys.stderr)
        return exit_codes.PROBLEM
    print(json.dumps({"model": str(folder), "seed": args.seed}, indent=2) if args.json else folder)
    return exit_codes.OK


def _tokens(text: str) -> int:
    """A number of tokens; `32k` is 32,768.

    Raises:
        ValueError: no number.
    """
    return int(text[:-1]) * 1024 if text.lower().endswith("k") else int(text)


def _plan(args: argparse.Namespace) -> int:
    from hybridkv_vllm import sizing

    try:
        folder = Path(args.model)
        if args.model not in shapes.MODELS and not folder.is_dir():
            known = ", ".join(shapes.MODELS)
            raise ValueError(f"--model {args.model} is no local folder, and none of {known}")
        if args.gpu not in shapes.GPUS:
            raise ValueError(f"--gpu {args.gpu} is none of {', '.join(shapes.GPUS)}")
        if args.host_pool_gib is not None and not 0 < args.host_pool_gib < math.inf:
            raise ValueError(f"--host-pool-gib must be a number above 0, got {args.host_pool_gib}")
        shape = shapes.MODELS.get(args.model) or shapes.read_shape(folder)
        workload = shapes.Workload(
            context=args.context,
            answer=args.answer,
            budget=args.budget,
            dynamic=args.dynamic,
            missed=args.missed,
            tier=args.dynamic_tier,
            landmark=args.landmark,
            ranks=args.tensor_parallel_size,
            utilization=args.gpu_memory_utilization,
            batch=args.batch,
            host_memory=None if args.host_pool_gib is None else int(args.host_pool_gib * shapes.GIB),
        )
        estimate = sizing.estimate(shape, shapes.GPUS[args.gpu], workload)
    except ValueError as error:
        print(f"hybridkv: {error}", file=sys.stderr)
        return exit_codes.USAGE
    if args.json:
        print(json.dumps({**estimate.as_json(), "assumptions": sizing.ASSUMPTIONS}, indent=2))
        return exit_codes.OK
    console = Console()
    console.print(sizing.table(estimate))
    console.print("Assumed: " + "; ".join(sizing.ASSUMPTIONS) + ".", soft_wrap=False)
    return exit_codes.OK


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    usual = shapes.Workload
    plan = commands.add_parser(
        "plan",
        help="say what a model takes on a GPU with and without compression, from its config alone",
        description="KV memory, requests at once, host memory and a lower limit of the time per token, "
        "stock vLLM against HybridKV. Needs no GPU and no weights.",
        epilog="example: hybridkv plan --model Qwen/Qwen2.5-VL-7B-Instruct --gpu h200 --context 32k",
    )
    plan.add_argument(
        "--model", required=True, help=f"folder with a config.json, or one of {', '.join(shapes.MODELS)}"
    )
    plan.add_argument("--gpu", required=True, help=f"one of {', '.join(shapes.GPUS)}")
    plan.add_argument("--context", required=True, type=_tokens, help="prompt tokens of a request, as 32k")
    plan.add_argument("--answer", type=_tokens, default=usual.answer, help="tokens of its answer")
    plan.add_argument("--budget", type=float, default=usual.budget)
    plan.add_argument("--dynamic", type=float, default=usual.dynamic, help="share of heads that are dynamic")
    plan.add_argument(
        "--missed", type=float, default=usual.missed, help="share of a step's chunks to be fetched"
    )
    plan.add_argument("--dynamic-tier", choices=("host", "gpu", "off"), default=usual.tier)
    plan.add_argument("--landmark", choices=("sketch2", "sketch", "mean", "minmax"), default=usual.landmark)
    plan.add_argument("--tensor-parallel-size", type=int, default=usual.ranks, metavar="N")
    plan.add_argument("--gpu-memory-utilization", type=float, default=usual.utilization, metavar="SHARE")
    plan.add_argument(
        "--batch", type=int, help="requests decoding at once, for the times (default: all that fit)"
    )
    plan.add_argument("--host-pool-gib", type=float, help="host memory a rank (default: what is needed)")
    plan.add_argument("--json", action="store_true", help="print the numbers as JSON")
    plan.set_defaults(run=_plan)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="hybridkv",
        description="HybridKV for vLLM. Serve with: vllm serve MODEL --attention-backend hybridkv",
        epilog="exit codes: 0 done; 1 a problem was found, or it failed; 2 wrong arguments",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser(
        "doctor",
        help="say what this environment has, and what to do about each problem",
        description="Looks at vLLM, torch, Triton, the device and the plugin. Exit code 1 if something "
        "would keep a server from starting.",
        epilog="example: hybridkv doctor --json",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)

    tiny = commands.add_parser(
        "tiny-model",
        help="write a small Qwen2.5-VL with random weights, to try and test with",
        description="Writes config, tokenizer, processors, chat template and weights. vLLM and "
        "Transformers both load the folder; the same seed gives the same bytes.",
        epilog="example: hybridkv tiny-model --out /tmp/tiny",
    )
    tiny.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    tiny.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    tiny.add_argument("--force", action="store_true", help="overwrite a folder that is not empty")
    tiny.add_argument("--json", action="store_true", help="print the folder and the seed as JSON")
    tiny.set_defaults(run=_tiny_model)

    _add_plan(commands)

    quality = commands.add_parser("eval", help="measure what policies and budgets cost in answers and memory")
    evaluation.add_arguments(quality)
    quality.set_defaults(run=evaluation.run)

    comparison = commands.add_parser(
        "bench", help="measure a model's speed and requests at once, stock vLLM against HybridKV"
    )
    bench.add_arguments(comparison)
    comparison.set_defaults(run=bench.run)

    calibration = commands.add_parser(
        "calibrate", help="find out which KV heads of a model must not be pruned, for the option `profile`"
    )
    calibrate.add_arguments(calibration)
    calibration.set_defaults(run=calibrate.run)

    inspect = commands.add_parser("inspect", help="draw what became of each KV head of a prompt on a server")
    inspection.add_arguments(inspect)
    inspect.set_defaults(run=inspection.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns one of `exit_codes`."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("hybridkv: stopped", file=sys.stderr)
        return exit_codes.PROBLEM


if __name__ == "__main__":
    sys.exit(main())
