"""The command `hybridkv`."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from hybridkv_quality import calibrate, inspection
from hybridkv_quality import command as evaluation
from hybridkv_serving import command as bench

from hybridkv_vllm import __version__, exit_codes, shapes
from hybridkv_vllm.plan import Tier
from hybridkv_vllm.stops import orderly_stops
from hybridkv_vllm.terminal import standard_output

# Beyond any machine, and within what the estimate counts with.
MOST_TOKENS = 2**30
MOST_HOST_GIB = 1e9
# How a write to an open file fails.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _doctor(args: argparse.Namespace) -> int:
    from hybridkv_vllm.doctor import examine, findings_table

    findings = examine()
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        standard_output().print(findings_table(findings))
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
    """A number of tokens; `32k` is 32,768."""
    try:
        tokens = int(text[:-1]) * 1024 if text.lower().endswith("k") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number, such as 32768 or 32k") from None
    if tokens > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at most {MOST_TOKENS}")
    return tokens


def _plan(args: argparse.Namespace) -> int:
    from hybridkv_vllm import sizing

    try:
        folder = Path(args.model)
        if args.model not in shapes.MODELS and not os.path.isdir(folder):
            known = ", ".join(shapes.MODELS)
            raise ValueError(f"--model {args.model} is no local folder, and none of {known}")
        if args.gpu not in shapes.GPUS:
            raise ValueError(f"--gpu {args.gpu} is none of {', '.join(shapes.GPUS)}")
        if args.host_pool_gib is not None and not 0 < args.host_pool_gib <= MOST_HOST_GIB:
            raise ValueError(
                f"--host-pool-gib must be a number above 0 and at most {MOST_HOST_GIB:g}, "
                f"got {args.host_pool_gib}"
            )
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
    console = standard_output()
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
    plan.add_argument(
        "--answer", type=_tokens, default=usual.answer, help="tokens of its answer (default: %(default)s)"
    )
    for name, default, what in (
        ("budget", usual.budget, "share of a prompt's KV cache that stays on the GPU"),
        ("dynamic", usual.dynamic, "share of heads that are dynamic"),
        ("missed", usual.missed, "share of a step's chunks to be fetched"),
        ("gpu-memory-utilization", usual.utilization, "share of the GPU's memory for vLLM"),
    ):
        plan.add_argument(
            f"--{name}", type=float, default=default, metavar="SHARE", help=f"{what} (default: %(default)s)"
        )
    shown = "(default: %(default)s)"
    plan.add_argument("--dynamic-tier", choices=get_args(Tier), default=usual.tier, help=shown)
    # Not of `LandmarkKind`: this command starts without torch, to say what is missing.
    plan.add_argument(
        "--landmark", choices=("sketch", "sketch2", "mean", "minmax"), default=usual.landmark, help=shown
    )
    plan.add_argument("--tensor-parallel-size", type=int, default=usual.ranks, metavar="N", help=shown)
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


def _drop_output() -> None:
    """What standard output still holds goes nowhere: Python would fail on it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns one of `exit_codes`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is shown escaped, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with orderly_stops():
            try:
                args = build_parser().parse_args(argv)
                return int(args.run(args))
            finally:
                # Here, where it may fail; not `sys.stdout.flush()`: there may be no standard output.
                print(end="", flush=True)
    except KeyboardInterrupt:
        print("hybridkv: stopped", file=sys.stderr)
    except BrokenPipeError:
        # Who read it has read enough.
        _drop_output()
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        _drop_output()
        print(f"hybridkv: the output cannot be written: {error.strerror}; free some space", file=sys.stderr)
    return exit_codes.PROBLEM


if __name__ == "__main__":
    sys.exit(main())
