"""The arguments of `hybridkv bench`: stock vLLM against hybridkv, everything else alike."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from hybridkv_quality.model_path import model_folder
from rich.console import Console
from rich.table import Table

from hybridkv_serving.arguments import names_of, whole_numbers
from hybridkv_serving.kinds import KINDS, Kind
from hybridkv_vllm import exit_codes
from hybridkv_vllm.plan import Tier
from hybridkv_vllm.terminal import standard_output

if TYPE_CHECKING:
    from hybridkv_serving.figures import Figures, Report
    from hybridkv_vllm.server import Server

DESCRIPTION = """\
Starts stock vLLM, then hybridkv, with the same model and KV memory, plays the same conversations about
pictures over HTTP, and says what each answered, how fast, and how many at once.

`batch` asks for as many answers as --clients at once, and says how long a token takes while all decode;
`images`, `video` and `chat` send --requests conversations with more clients than stock's memory has room for.
Weights may be random (--load-format dummy): only shapes matter here. What follows -- goes to both servers.
"""
EPILOG = """\
examples:
  hybridkv bench --out /tmp/bench                    (the small model, on whatever is there)
  hybridkv bench --model MODEL --load-format dummy --prompt-tokens 32768 --clients 1,32 --prompts-in-memory 32
  hybridkv bench --model MODEL -- --tensor-parallel-size 2

results: DIR/serve.json, serve.csv, serve.png, a log of each server; two tables on stdout
exit code: 0 done, 1 a server failed or a turn was not answered, 2 wrong arguments
"""
NAME = "model"
BATCH = "batch"
SCENARIOS = (BATCH, *KINDS)
# Of a conversation beside its pictures and answers: questions and the chat template.
OTHER_TOKENS = 128
# Tokens that mark a picture's start and end.
MARKS = 2
PRESSURE = 4
# Of no interest to who reads the result.
NOT_SETTINGS = ("out", "model", "json", "command", "run")
NEEDED = ("matplotlib", "PIL", "openai", "httpx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `hybridkv bench`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", default=str(model_folder()), help="folder or name (default: the small model)"
    )
    parser.add_argument("--load-format", default="auto", help="`dummy` for random weights")
    shown = "(default: %(default)s)"
    parser.add_argument("--budget", type=float, default=0.1, help=f"of hybridkv {shown}")
    parser.add_argument("--dynamic-tier", choices=get_args(Tier), default="host", help=f"of hybridkv {shown}")
    parser.add_argument(
        "--scenarios",
        type=names_of(SCENARIOS),
        default=list(SCENARIOS),
        metavar="A,B",
        help=f"of {','.join(SCENARIOS)}",
    )
    parser.add_argument(
        "--clients", type=whole_numbers, default=[2], metavar="N,M", help="of `batch` (default: 2)"
    )
    parser.add_argument(
        "--requests", type=int, default=12, help=f"conversations under pressure, of each kind {shown}"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=1536, help=f"visual tokens of a conversation, about {shown}"
    )
    parser.add_argument("--answer-tokens", type=int, default=48, help=shown)
    parser.add_argument(
        "--prompts-in-memory",
        type=int,
        default=3,
        help=f"conversations that both servers' KV cache holds {shown}",
    )
    parser.add_argument("--good-first-token", type=float, default=10.0, help=f"seconds, for goodput {shown}")
    parser.add_argument("--good-each-token", type=float, default=0.1, help=f"seconds, for goodput {shown}")
    parser.add_argument("--seed", type=int, default=0, help=f"of the pictures {shown}")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for results and logs (default: a new one)"
    )
    parser.add_argument("--json", action="store_true", help="print serve.json instead of tables")
    parser.add_argument("server", nargs="*", metavar="-- ARGUMENT", help="of `vllm serve`, for both servers")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if problem := _problem(args):
        print(f"hybridkv bench: {problem}", file=sys.stderr)
        return exit_codes.USAGE
    from hybridkv_quality.settings import UsageError, make_folder

    from hybridkv_serving.figures import plot, write
    from hybridkv_vllm.server import ServerFailed

    out = args.out or Path(tempfile.mkdtemp(prefix="hybridkv-bench-"))
    try:
        make_folder(out)
    except UsageError as error:
        print(f"hybridkv bench: {error}", file=sys.stderr)
        return exit_codes.USAGE
    try:
        for report in _reports(args, out):
            # After each: a lent machine's time may end before the scenarios do.
            write(report, out)
        plot(report, out)
    except (OSError, RuntimeError, ServerFailed) as error:
        print(f"hybridkv bench: {error}", file=sys.stderr)
        return exit_codes.PROBLEM
    if args.json:
        print(report.model_dump_json(indent=1, ensure_ascii=True))
    else:
        shown = standard_output()
        _print(report, shown)
        shown.print(f"results: {out}", highlight=False)
    return exit_codes.PROBLEM if any(figures.failed for figures in report.figures) else exit_codes.OK


def _problem(args: argparse.Namespace) -> str | None:
    """What fits nothing, and what to do; None if all does."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return f"{', '.join(missing)} missing: pip install 'hybridkv-vllm[eval]'"
    for name in ("requests", "prompt_tokens", "answer_tokens", "prompts_in_memory"):
        if getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
    if min(args.clients) < 1:
        return f"--clients must be at least 1, got {min(args.clients)}"
    if not 0 < args.budget <= 1:
        return f"--budget must be above 0 and at most 1, got {args.budget}"
    if max(args.clients) > args.prompts_in_memory and BATCH in args.scenarios:
        return (
            "--clients asks for more at once than --prompts-in-memory: stock vLLM could not decode them; "
            "raise --prompts-in-memory, or leave batch out of --scenarios"
        )
    return None


def _reports(args: argparse.Namespace, out: Path) -> Iterator[Report]:
    """The report as it grows, after each scenario of each server.

    Raises:
        ServerFailed: a server did not start or ended.
        RuntimeError: it answered nothing.
    """
    from hybridkv_quality.environment import environment

    from hybridkv_serving.figures import OURS, STOCK, Report, compare
    from hybridkv_vllm.server import serve

    settings = {name: str(value) for name, value in vars(args).items() if name not in NOT_SETTINGS}
    report = Report(environment=environment(), settings=settings)
    for name in (STOCK, OURS):
        with serve(args.model, _server_arguments(name, args), out / f"{name}.log", timeout=900) as server:
            for figures in _measure(name, server, args):
                report.figures.append(figures)
                report.comparisons = list(compare(report.figures))
                yield report


def _server_arguments(name: str, args: argparse.Namespace) -> list[str]:
    """The same memory for both; vLLM's CPU attention wants blocks of 32."""
    import torch

    from hybridkv_serving.figures import OURS, STOCK
    from hybridkv_serving.trace import pictures_of

    pictures = pictures_of(args.prompt_tokens)
    block = 32 if name == STOCK and not torch.cuda.is_available() else 16
    longest = args.prompt_tokens + MARKS * pictures + 2 * args.answer_tokens + OTHER_TOKENS
    blocks = args.prompts_in_memory * -(-longest // 32) * 32 // block
    given = {
        "served-model-name": NAME,
        "load-format": args.load_format,
        # Compressing needs room for one arena beside a longest prompt.
        "max-model-len": longest,
        "max-num-seqs": max(*args.clients, PRESSURE * args.prompts_in_memory),
        "max-num-batched-tokens": max(2048, min(8192, args.prompt_tokens)),
        "num-gpu-blocks-override": blocks,
        "block-size": block,
        "limit-mm-per-prompt": json.dumps({"image": pictures}),
    }
    if name == OURS:
        given |= {
            "attention-backend": "hybridkv",
            "additional-config.hybridkv.budget": args.budget,
            "additional-config.hybridkv.dynamic_tier": args.dynamic_tier,
        }
    return [part for option, value in given.items() for part in (f"--{option}", str(value))] + args.server


def _measure(name: str, server: Server, args: argparse.Namespace) -> Iterator[Figures]:
    """All scenarios on one server, after a conversation that warms it up."""
    from hybridkv_serving.clients import play
    from hybridkv_serving.figures import figures_of
    from hybridkv_serving.trace import make_trace

    def run(scenario: str, kind: Kind, count: int, clients: int) -> Figures:
        # Of its own: a picture or prompt that the server knows from an earlier run costs it nothing.
        seed = f"{args.seed} {scenario} {clients}"
        trace = list(make_trace(kind, count, args.prompt_tokens, seed))
        played = asyncio.run(play(server.url, NAME, trace, clients=clients, answer_tokens=args.answer_tokens))
        return figures_of(name, scenario, clients, played, args.good_first_token, args.good_each_token)

    run("warm-up", "images", 1, 1)
    if BATCH in args.scenarios:
        for clients in args.clients:
            yield run(BATCH, "images", clients, clients)
    for kind in KINDS:
        if kind in args.scenarios:
            yield run(kind, kind, args.requests, PRESSURE * args.prompts_in_memory)


def _print(report: Report, console: Console) -> None:
    from hybridkv_serving.figures import COLUMNS

    table = Table(*COLUMNS, title=report.environment.device)
    for figures in report.figures:
        table.add_row(*figures.cells())
    console.print(table)
    ratios = Table("hybridkv against stock", "scenario", "clients", "above 1 is better")
    for c in report.comparisons:
        ratios.add_row(c.what, c.scenario, str(c.clients), f"{c.value:.2f}")
    console.print(ratios)
