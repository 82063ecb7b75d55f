"""Stock vLLM against hybridkv in one process each, on prompts of random tokens: where a GPU's minutes count.

`serve.py` measures servers and pictures; here nothing but the engine takes time. `batch` times a decode step
at equal batch; `full` fills a small KV cache with as many requests as it lets decode at once, and times their
decode steps: no prefill, and nobody comes or goes (`serve.py` times that). Which heads recall is given as a
profile, since random weights say nothing of it. What was measured is written after each scenario.

    python benchmarks/engines.py --model MODEL --load-format dummy --out benchmarks/results/performance/CARD
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv_quality.environment import environment
from hybridkv_quality.model_path import model_folder
from hybridkv_serving.arguments import names_of, whole_numbers
from hybridkv_serving.figures import COUNTS, OURS, STOCK, Figures, Report, compare, plot, write
from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.profile import HeadProfile

if TYPE_CHECKING:
    from torch import nn
    from vllm import LLM

BATCH, FULL = "batch", "full"
# What heads do, by tier, in the names of folders.
HEADS = {"off": "pruned", "gpu": "recalling_gpu", "host": "recalling"}
WARM_UP_STEPS = 8
# Steps without a new first token after which no more requests get in.
PATIENCE = 24
# Figures that profiles give to heads that recall and to others, and what lies between.
MOVING, STILL, THETA = 0.9, 0.0, 0.5


class Measured(BaseModel):
    """What one engine gave."""

    figures: list[Figures]
    missed: float | None = Field(
        description="Share of the chosen chunks fetched while steps were timed; null without recall."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(model_folder()))
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument(
        "--dynamic-tiers", type=names_of(tuple(HEADS)), default="off,host", help=f"of {','.join(HEADS)}"
    )
    parser.add_argument("--recalling", type=float, default=0.5, help="share of the heads that recall")
    parser.add_argument(
        "--still",
        type=int,
        default=12,
        help="pairs of a query's dimensions to zero, those that turn fastest: random weights give them "
        "as much as others, and steps choose other chunks than a model's would (12 of 64: 3%% of them)",
    )
    parser.add_argument("--host-pool-gib", type=float, default=40)
    parser.add_argument("--scenarios", type=names_of((BATCH, FULL)), default=f"{BATCH},{FULL}")
    parser.add_argument("--clients", type=whole_numbers, default="1,32", help="of `batch`")
    parser.add_argument("--requests", type=int, default=64, help="of `full`")
    parser.add_argument("--prompts-in-memory", type=int, default=8, help="of `full`, that stock has room for")
    parser.add_argument("--prompt-tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed")
    parser.add_argument("--spare-tokens", type=int, default=1024, help="most tokens of an answer")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a scenario of an engine")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--scenario", help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(args: argparse.Namespace) -> LLM:
    """The engine of one scenario: stock vLLM, or hybridkv with the tier `args.engine`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM

    on_gpu = torch.cuda.is_available()
    # vLLM's CPU attention wants blocks of 32.
    block = PAGE_TOKENS if on_gpu or args.engine != STOCK else 2 * PAGE_TOKENS
    longest = args.prompt_tokens + args.spare_tokens
    settings: dict[str, Any] = {
        "load_format": args.load_format,
        "max_model_len": longest,
        "max_num_seqs": max(args.clients) if args.scenario == BATCH else args.requests,
        "max_num_batched_tokens": min(8192, max(2048, args.prompt_tokens)),
        "block_size": block,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "seed": 0,
    }
    prompts = max(args.clients) if args.scenario == BATCH else args.prompts_in_memory
    if args.scenario == FULL or not on_gpu:
        settings["num_gpu_blocks_override"] = 1 + prompts * -(-longest // block)
    if args.engine != STOCK:
        settings["attention_backend"] = "hybridkv"
        settings["additional_config"] = {"hybridkv": _options(args)}
    llm = LLM(args.model, **settings)
    llm.apply_model(partial(still_queries, pairs=args.still))
    return llm


def still_queries(model: nn.Module, pairs: int) -> None:
    """Zeroes the weights that give each query's first `pairs` pairs of dimensions, in all layers.

    Raises:
        ValueError: the model's layers are not built like Qwen2's.
    """
    layers = [m for m in model.modules() if hasattr(m, "qkv_proj") and hasattr(m, "rotary_emb")]
    if pairs and not layers:
        raise ValueError("no layer has `qkv_proj` and `rotary_emb`; leave its queries as they are: --still 0")
    for module in layers:
        projection = module.qkv_proj
        for weight in (projection.weight, projection.bias):
            if weight is not None:
                halves = weight.data[: module.q_size].unflatten(0, (-1, 2, module.head_dim // 2))
                halves[:, :, :pairs] = 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = {"budget": args.budget, "dynamic_tier": args.engine}
    if args.engine == "off":
        return options
    if args.engine == "host":
        options["host_pool_gib"] = args.host_pool_gib
    text = _text_config(args.model)
    layers, heads = text["num_hidden_layers"], text["num_key_value_heads"]
    # Which heads differs from layer to layer.
    moving = [
        [MOVING if (head + layer) % heads < args.recalling * heads else STILL for head in range(heads)]
        for layer in range(layers)
    ]
    profile = HeadProfile(
        model=args.model,
        tasks=["none"],
        tokens=args.prompt_tokens,
        prompts=1,
        share=args.budget,
        moving=moving,
    )
    path = args.figures.with_name("profile.json")
    path.write_text(profile.model_dump_json())
    return options | {"profile": str(path), "theta": THETA}


def _text_config(model: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text())
    text: dict[str, Any] = config.get("text_config", config)
    return text


class Stepper:
    """Steps an engine by hand, and notes when each request's tokens came."""

    def __init__(self, llm: LLM, vocabulary: int, prompt_tokens: int, spare_tokens: int) -> None:
        self._engine = llm.llm_engine
        self._vocabulary = vocabulary
        self._prompt_tokens = prompt_tokens
        self._spare_tokens = spare_tokens
        self._added = 0
        self.first_token: dict[str, float] = {}
        self.tokens = 0
        self.began = 0.0

    def add(self, count: int) -> list[str]:
        """Sends requests of tokens that no other request has; their ids."""
        import numpy as np
        from vllm import SamplingParams

        dice = np.random.default_rng(self._added)
        ids = [str(self._added + number) for number in range(count)]
        self._added += count
        self.first_token = {}
        self.began = time.monotonic()
        for request_id in ids:
            # Those that stand for pictures are at either end.
            tokens = dice.integers(self._vocabulary // 4, self._vocabulary // 2, self._prompt_tokens).tolist()
            self._engine.add_request(
                request_id,
                {"prompt_token_ids": tokens},
                SamplingParams(
                    max_tokens=self._spare_tokens,
                    ignore_eos=True,
                    temperature=0,
                    detokenize=False,
                    # Random weights would ask for something else at every step; a model seldom does.
                    logit_bias={self._vocabulary // 3: 100},
                ),
            )
        return ids

    def step(self, count: int = 1) -> None:
        """Runs engine steps."""
        for _ in range(count):
            for output in self._engine.step():
                now = time.monotonic() - self.began
                self.first_token.setdefault(output.request_id, now)
                self.tokens = self.tokens + 1

    def admit(self, ids: Sequence[str]) -> int:
        """Steps until all decode, or no more get in; how many do."""
        idle = 0
        while len(self.first_token) < len(ids) and idle < PATIENCE:
            known = len(self.first_token)
            self.step()
            # A long prompt's prefill takes steps of its own.
            idle = 0 if len(self.first_token) > known or not known else idle + 1
        return len(self.first_token)

    def stop(self, ids: Sequence[str]) -> None:
        """Aborts requests, and lets the workers hear of it."""
        self._engine.abort_request(list(ids))
        self.step(3)


def _chunks(llm: LLM) -> Sequence[int]:
    """Chosen chunks that were there, and that were fetched, so far; empty without recall."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from hybridkv_vllm.attention.impl import HybridKVImpl

    layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention)
    impl = next(iter(layers.values())).impl
    if not isinstance(impl, HybridKVImpl) or impl.tables.recall is None:
        return ()
    hit, fetched = impl.tables.recall.work.counters.sum(0).tolist()
    return hit, fetched


def measure(args: argparse.Namespace) -> Measured:
    """One scenario on one engine."""
    import numpy as np

    vocabulary = _text_config(args.model)["vocab_size"]
    llm = start(args)
    stepper = Stepper(llm, vocabulary, args.prompt_tokens, args.spare_tokens)
    wanted = args.clients if args.scenario == BATCH else [args.requests]
    stepper.stop(_warm_up(stepper))
    found, chunks = [], [0, 0]
    for clients in wanted:
        ids = stepper.add(clients)
        decoding = stepper.admit(ids)
        stepper.step(WARM_UP_STEPS)
        chunks_before = _chunks(llm)
        before, begin = stepper.tokens, time.monotonic()
        stepper.step(args.steps)
        seconds, tokens = time.monotonic() - begin, stepper.tokens - before
        grown = [now - then for now, then in zip(_chunks(llm), chunks_before, strict=True)]
        chunks = [one + more for one, more in zip(chunks, grown, strict=True)] if grown else chunks
        waits = list(stepper.first_token.values())
        # Of `full` nobody is expected to get in after those who fill the memory.
        failed = clients - decoding if args.scenario == BATCH else 0
        equal = args.scenario == BATCH and tokens == clients * args.steps
        found.append(
            Figures(
                server=STOCK if args.engine == STOCK else OURS,
                scenario=args.scenario,
                clients=clients,
                answers=decoding,
                failed=failed,
                prompt_tokens=args.prompt_tokens,
                tokens_per_second=tokens / seconds,
                decoding_at_once=round(tokens / args.steps),
                ms_per_token=1e3 * seconds / args.steps if equal else None,
                first_token_p50=float(np.percentile(waits, 50)),
                first_token_p99=float(np.percentile(waits, 99)),
                goodput=0,
            )
        )
        stepper.stop(ids)
    return Measured(figures=found, missed=chunks[1] / sum(chunks) if sum(chunks) else None)


def _warm_up(stepper: Stepper) -> list[str]:
    ids = stepper.add(1)
    stepper.admit(ids)
    stepper.step(WARM_UP_STEPS)
    return ids


def _run_child(engine: str, scenario: str, console: Console, timeout: float) -> Measured:
    """Measures in a process of its own, so that the next engine finds the GPU free.

    Raises:
        RuntimeError: it failed, and what it said is on stderr; or it took longer than `timeout` seconds.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # By a file: vLLM logs to stdout as well.
        figures = Path(folder) / "figures.json"
        own = ["--engine", engine, "--scenario", scenario, "--figures", str(figures)]
        command = [sys.executable, __file__, *sys.argv[1:], *own]
        try:
            done = subprocess.run(command, check=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"engine {engine}, {scenario}: not done after {timeout:g} s") from None
        if done.returncode != 0 or not figures.exists():
            raise RuntimeError(f"engine {engine}, {scenario}: exit code {done.returncode}")
        console.print(f"{engine}, {scenario}: {time.monotonic() - began:.0f} s", highlight=False)
        return Measured.model_validate_json(figures.read_bytes())


def main() -> int:
    """Measures and writes; 1 where an engine failed."""
    args = _arguments()
    if args.engine is not None:
        args.figures.write_text(measure(args).model_dump_json())
        return 0
    console = Console()
    settings = {
        name: str(value)
        for name, value in (vars(args) | {"prompts": "random tokens"}).items()
        if name not in ("out", "model", "engine", "scenario", "figures", "dynamic_tiers", "timeout")
    }
    measured_with = environment()
    reports = {
        tier: Report(environment=measured_with, settings=settings | {"dynamic_tier": tier})
        for tier in args.dynamic_tiers
    }
    failed = False
    for engine in (STOCK, *args.dynamic_tiers):
        for scenario in args.scenarios:
            try:
                measured = _run_child(engine, scenario, console, args.timeout)
            except RuntimeError as error:
                print(f"engines.py: {error}", file=sys.stderr)
                failed = True
                continue
            # After each: a lent machine's time may end before the last. Stock's belongs to all.
            for tier in args.dynamic_tiers if engine == STOCK else [engine]:
                _add(reports[tier], scenario, measured)
                folder = args.out / "_".join(("engines", HEADS[tier], *args.scenarios))
                write(reports[tier], folder)
                plot(reports[tier], folder)
        if engine != STOCK:
            _print(reports[engine], engine, console)
    return int(failed)


def _add(report: Report, scenario: str, measured: Measured) -> None:
    report.figures += measured.figures
    if measured.missed is not None:
        report.settings[f"missed, {scenario}"] = f"{measured.missed:.3f}"
    # Those who are let in at once wait longer for their first token; stock's others never get one.
    report.comparisons = [
        comparison
        for comparison in compare(report.figures)
        if comparison.scenario == BATCH or comparison.what in COUNTS
    ]


def _print(report: Report, engine: str, console: Console) -> None:
    table = Table("tier", "scenario", "clients", "what", "above 1 is better")
    for c in report.comparisons:
        table.add_row(engine, c.scenario, str(c.clients), c.what, f"{c.value:.2f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
