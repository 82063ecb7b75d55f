"""Stock vLLM against hybridkv: the same model, KV memory and conversations about pictures, over HTTP.

`batch` asks for as many answers as --clients at once, and says how long a token takes while all decode;
`images`, `video` and `chat` send --requests conversations with more clients than stock's memory has room for.

    python benchmarks/serve.py --out /tmp/serve                      # the small model, on whatever is there
    python benchmarks/serve.py --model Qwen/Qwen2.5-VL-7B-Instruct --load-format dummy --clients 1,32 \\
        --prompt-tokens 32768 --prompts-in-memory 32 --out benchmarks/results/serve
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from hybridkv_quality.environment import environment
from hybridkv_quality.model_path import model_folder
from rich.console import Console
from rich.table import Table
from serving.clients import play
from serving.figures import COLUMNS, OURS, STOCK, Figures, Report, compare, figures_of, plot, write
from serving.trace import KINDS, Kind, make_trace

from hybridkv_vllm.server import Server, ServerFailed, serve

NAME = "model"
BATCH = "batch"
# Of a conversation beside its pictures and answers: questions and the chat template.
OTHER_TOKENS = 128
PRESSURE = 4


def _whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(model_folder()), help="folder or name (default: the small model)"
    )
    parser.add_argument("--load-format", default="auto", help="`dummy` for random weights")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--dynamic-tier", choices=("host", "gpu", "off"), default="host")
    parser.add_argument("--scenarios", default=f"{BATCH},{','.join(KINDS)}", help="of %(default)s")
    parser.add_argument("--clients", type=_whole_numbers, default=[2], help="of `batch` (default: 2)")
    parser.add_argument("--requests", type=int, default=12, help="conversations under pressure, of each kind")
    parser.add_argument(
        "--prompt-tokens", type=int, default=1536, help="visual tokens of a conversation, about"
    )
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument(
        "--prompts-in-memory", type=int, default=3, help="conversations that both servers' KV cache holds"
    )
    parser.add_argument("--good-first-token", type=float, default=10.0, help="seconds, for goodput")
    parser.add_argument("--good-each-token", type=float, default=0.1, help="seconds, for goodput")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for serve.json, serve.csv, serve.png and logs")
    args = parser.parse_args()
    args.scenarios = args.scenarios.split(",")
    if unknown := set(args.scenarios) - {BATCH, *KINDS}:
        parser.error(f"unknown scenario: {', '.join(sorted(unknown))} (known: {BATCH}, {', '.join(KINDS)})")
    if max(args.clients) > args.prompts_in_memory and BATCH in args.scenarios:
        parser.error(
            "--clients asks for more at once than --prompts-in-memory: stock vLLM could not decode them"
        )
    return args


def _server_arguments(name: str, args: argparse.Namespace) -> list[str]:
    """The same memory for both; vLLM's CPU attention wants blocks of 32."""
    block = 32 if name == STOCK and not torch.cuda.is_available() else 16
    longest = args.prompt_tokens + 2 * args.answer_tokens + OTHER_TOKENS
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
        "limit-mm-per-prompt": '{"image": 64}',
    }
    if name == OURS:
        given |= {
            "attention-backend": "hybridkv",
            "additional-config.hybridkv.budget": args.budget,
            "additional-config.hybridkv.dynamic_tier": args.dynamic_tier,
        }
    return [part for option, value in given.items() for part in (f"--{option}", str(value))]


def _measure(name: str, server: Server, args: argparse.Namespace) -> Iterator[Figures]:
    """All scenarios on one server, after a conversation that warms it up."""

    def run(scenario: str, kind: Kind, count: int, clients: int, seed: int) -> Figures:
        trace = list(make_trace(kind, count, args.prompt_tokens, seed))
        played = asyncio.run(play(server.url, NAME, trace, clients=clients, answer_tokens=args.answer_tokens))
        return figures_of(name, scenario, clients, played, args.good_first_token, args.good_each_token)

    run("warm-up", "images", 1, 1, args.seed - 1)
    if BATCH in args.scenarios:
        for clients in args.clients:
            yield run(BATCH, "images", clients, clients, args.seed)
    for kind in KINDS:
        if kind in args.scenarios:
            yield run(kind, kind, args.requests, PRESSURE * args.prompts_in_memory, args.seed)


def _print(report: Report, console: Console) -> None:
    table = Table(*COLUMNS, title=report.environment.device)
    for figures in report.figures:
        table.add_row(*figures.cells())
    console.print(table)
    ratios = Table("hybridkv against stock", "scenario", "clients", "above 1 is better")
    for c in report.comparisons:
        ratios.add_row(c.what, c.scenario, str(c.clients), f"{c.value:.2f}")
    console.print(ratios)


def main() -> int:
    """Measures and reports; 1 where a server fails or a turn was not answered."""
    args = _arguments()
    out = args.out or Path(tempfile.mkdtemp(prefix="hybridkv-serve-"))
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("out", "model")}
    report = Report(environment=environment(), settings=settings)
    try:
        for name in (STOCK, OURS):
            with serve(args.model, _server_arguments(name, args), out / f"{name}.log", timeout=900) as server:
                for figures in _measure(name, server, args):
                    report.figures.append(figures)
                    report.comparisons = list(compare(report.figures))
                    # After each: a lent machine's time may end before the scenarios do.
                    write(report, out)
    except (ServerFailed, RuntimeError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    _print(report, console)
    plot(report, out)
    console.print(f"results: {out}")
    return int(any(figures.failed for figures in report.figures))


if __name__ == "__main__":
    sys.exit(main())
