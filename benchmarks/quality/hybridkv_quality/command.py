"""The arguments of `hybridkv eval`, what they mean, and what is said of the result."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from hybridkv_quality.model_path import model_folder
from hybridkv_quality.settings import EvalError, UsageError, checked_options
from hybridkv_vllm import exit_codes
from hybridkv_vllm.terminal import standard_output

DESCRIPTION = """\
Measures what compression costs: asks a model the questions of a suite under several policies and budgets,
scores the answers, and notes the memory that each prompt really held while its answer was written.

By default the suite's own small model runs in this machine, one child process a policy. With --url it asks a
server, which has one policy: start one server a policy and repeat the command with the same --out.

Answers are written as they come: the same command again goes on where a run stopped. A folder holds one
configuration; another model, option or length needs another --out.
"""
EPILOG = """\
examples:
  hybridkv eval --out /tmp/quality --contexts 4 --budgets 0.1,0.5,1.0
  hybridkv eval --out /tmp/mean --policies hybridkv --option landmark=mean
  hybridkv eval --out /tmp/mile --url http://localhost:8000/v1 --samples MileBench --format milebench

results: DIR/results.json, DIR/records.jsonl (one answer a line), DIR/plots/*.png; a table on stdout
exit code: 0 done, 1 an engine or a server failed (run again to go on), 2 wrong arguments
"""
POLICIES = "hybridkv,snapkv"
BUDGETS = "0.05,0.1,0.2,0.5,1.0"
# vLLM's; another would be refused by the engine, when the folder is this configuration's already.
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
# Import name and what brings it.
NEEDED = {"matplotlib": "plots", "PIL": "pictures"}
NEEDED_FOR_URL = {"openai": "--url", "httpx": "--url"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `hybridkv eval`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the run; made if missing"
    )
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--tasks", type=_names, metavar="A,B", help="tasks to ask (default: all)")
    asked.add_argument(
        "--tokens",
        type=int,
        default=2048,
        help="about the length of the suite's prompts, from 88, and to 12,000 for all tasks (default: 2048)",
    )
    asked.add_argument(
        "--contexts", type=int, default=20, help="prompts of each kind in the suite (default: 20)"
    )
    asked.add_argument("--seed", type=int, default=0, help="of the suite and the bootstrap (default: 0)")
    asked.add_argument(
        "--samples", type=Path, metavar="FOLDER", help="questions of a data set, not the suite's"
    )
    asked.add_argument(
        "--format",
        choices=("milebench", "lmms-eval", "jsonl"),
        help="layout of --samples (docs/eval.md describes each)",
    )
    compared = parser.add_argument_group("what is compared")
    compared.add_argument(
        "--policies",
        type=_names,
        metavar="A,B",
        help=f"policies of the engine (default: {POLICIES}); a server has its own",
    )
    compared.add_argument(
        "--budgets",
        type=_budgets,
        default=_budgets(BUDGETS),
        metavar="X,Y",
        help=f"shares of a prompt's KV cache (default: {BUDGETS}); 1.0 is the full cache, asked once",
    )
    compared.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of HybridKV for every policy, as in --additional-config.hybridkv.NAME VALUE; repeatable",
    )
    engine = parser.add_argument_group("the engine in this machine")
    engine.add_argument("--model", help="model's folder or name on a hub (default: the suite's small model)")
    engine.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of weights and KV cache (default: auto)"
    )
    engine.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest prompt and answer (default: model's)"
    )
    engine.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="torch threads on a CPU (default: 1, best for the suite's small model and for a busy machine)",
    )
    server = parser.add_argument_group("a server instead")
    server.add_argument(
        "--url",
        help="OpenAI-compatible server, such as http://localhost:8000/v1; its API key, if it has one, in "
        "OPENAI_API_KEY",
    )
    server.add_argument(
        "--served-model", metavar="NAME", help="model to ask for (default: the only one it has)"
    )
    server.add_argument(
        "--kv-bytes-per-token",
        type=int,
        metavar="N",
        help="of the served model's uncompressed KV cache, to report bytes (Qwen2.5-VL-7B in 16 bits: 57344)",
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests under way at once (default: 16)"
    )
    parser.add_argument("--json", action="store_true", help="print results.json instead of a table")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    try:
        _check(args)
        results = _evaluate(args)
    except UsageError as error:
        print(f"hybridkv eval: {error}", file=sys.stderr)
        return exit_codes.USAGE
    except EvalError as error:
        print(f"hybridkv eval: {error}", file=sys.stderr)
        return exit_codes.PROBLEM
    except KeyboardInterrupt:
        print("hybridkv eval: stopped; run the same command to go on", file=sys.stderr)
        return exit_codes.PROBLEM
    if args.json:
        print(results.model_dump_json(indent=2, ensure_ascii=True))
        return exit_codes.OK
    from hybridkv_quality.report import remarks, summary_table, task_tables

    console = standard_output()
    for table in (summary_table(results), *task_tables(results)):
        console.print(table)
    for remark in remarks(results):
        console.print(remark, highlight=False)
    console.print(f"results, records and plots: {args.out}", highlight=False)
    return exit_codes.OK


def _check(args: argparse.Namespace) -> None:
    """Refuses what fits nothing.

    Raises:
        UsageError: with what to do.
    """
    needed = {**NEEDED, **(NEEDED_FOR_URL if args.url else {})}
    missing = [
        f"{name} (for {why})" for name, why in needed.items() if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}; pip install 'hybridkv-vllm[eval]'")
    for name in ("tokens", "contexts", "concurrency", "threads", "max_model_len", "kv_bytes_per_token"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("url", "model", "served_model"):
        # A script's variable without a value: the small model here would answer for what was meant.
        if getattr(args, name) == "":
            raise UsageError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")
    if (args.samples is None) != (args.format is None):
        raise UsageError("--samples and --format go together: a folder, and the layout it has")
    if args.url:
        for name, why in (
            ("policies", "a server has one policy: start one server a policy, and use the same --out"),
            ("option", "give options to the server: --additional-config.hybridkv.NAME VALUE"),
            ("model", "a server has its model: name it with --served-model"),
        ):
            if getattr(args, name):
                raise UsageError(f"--{name} does not go with --url; {why}")
    elif args.served_model or args.kv_bytes_per_token:
        raise UsageError("--served-model and --kv-bytes-per-token go with --url")


def _evaluate(args: argparse.Namespace) -> Any:
    from hybridkv_quality.settings import EngineSettings, FolderSource, SuiteSource

    source: SuiteSource | FolderSource
    if args.samples is not None:
        source = FolderSource(kind=args.format, folder=args.samples, tasks=args.tasks)
    else:
        source = SuiteSource(tasks=args.tasks, tokens=args.tokens, contexts=args.contexts, seed=args.seed)
    if args.url:
        from hybridkv_quality.evaluate_server import evaluate_server
        from hybridkv_quality.server_target import ServerSettings

        server = ServerSettings(
            url=args.url,
            model=args.served_model,
            concurrency=args.concurrency,
            kv_bytes_per_token=args.kv_bytes_per_token,
            seed=args.seed,
        )
        return evaluate_server(args.out, source, server, args.budgets)
    from hybridkv_quality.evaluate_engine import evaluate_engine

    engine = EngineSettings(
        model=args.model or str(model_folder()),
        dtype=args.dtype,
        options=_options(args.option),
        max_model_len=args.max_model_len,
        concurrency=args.concurrency,
        threads=args.threads,
        seed=args.seed,
    )
    return evaluate_engine(args.out, source, engine, args.policies or _names(POLICIES), args.budgets)


def _options(given: list[tuple[str, str]]) -> dict[str, Any]:
    """Options by name, in their own types: 1 and 1.0 are the same value.

    Raises:
        UsageError: an option that has an argument of its own, is given twice or unknown, or a bad value.
    """
    own = {"policy": "--policies", "budget": "--budgets"}
    options: dict[str, Any] = {}
    for name, value in given:
        if name in own:
            raise UsageError(f"--option {name}: use {own[name]}")
        if name in options:
            raise UsageError(f"--option {name} is given twice")
        options[name] = value
    return checked_options(options)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("needs at least one name")
    return names


def _budgets(text: str) -> tuple[float, ...]:
    try:
        budgets = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas, such as {BUDGETS}") from None
    if not budgets or not all(0 < budget <= 1 for budget in budgets):
        raise argparse.ArgumentTypeError(f"{text!r}: each must be above 0 and at most 1")
    return budgets


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE, such as theta=0.8")
    return name, value
