"""The command `hybridkv`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridkv_quality import calibrate
from hybridkv_quality import command as evaluation
from rich.console import Console

from hybridkv_vllm import __version__

EXIT_OK, EXIT_PROBLEM, EXIT_USAGE = 0, 1, 2


def _doctor(args: argparse.Namespace) -> int:
    from hybridkv_vllm.doctor import examine, findings_table

    findings = examine()
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        Console().print(findings_table(findings))
    return EXIT_PROBLEM if any(finding.status == "problem" for finding in findings) else EXIT_OK


def _tiny_model(args: argparse.Namespace) -> int:
    from hybridkv_vllm.tiny_model import write_tiny_model

    try:
        folder = write_tiny_model(args.out, seed=args.seed, force=args.force)
    except FileExistsError as error:
        print(f"hybridkv: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(folder)
    return EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="hybridkv",
        description="HybridKV for vLLM. Serve with: vllm serve MODEL --attention-backend hybridkv",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser(
        "doctor",
        help="say what this environment has, and what to do about each problem",
        description="Looks at vLLM, torch, Triton, the device and the plugin. Exit code 1 if something "
        "would keep a server from starting.",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)

    tiny = commands.add_parser(
        "tiny-model",
        help="write a small Qwen2.5-VL with random weights, to try and test with",
        description="Writes config, tokenizer, processors, chat template and weights. vLLM and "
        "Transformers both load the folder; the same seed gives the same bytes.",
    )
    tiny.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    tiny.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    tiny.add_argument("--force", action="store_true", help="overwrite a folder that is not empty")
    tiny.set_defaults(run=_tiny_model)

    quality = commands.add_parser("eval", help="measure what policies and budgets cost in answers and memory")
    evaluation.add_arguments(quality)
    quality.set_defaults(run=evaluation.run)

    calibration = commands.add_parser(
        "calibrate", help="find out which KV heads of a model must not be pruned, for the option `profile`"
    )
    calibrate.add_arguments(calibration)
    calibration.set_defaults(run=calibrate.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (0 fine, 1 a problem was found, 2 wrong usage)."""
    args = build_parser().parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
