"""How many requests decode at once in the same KV memory: stock vLLM against HybridKV, at several budgets.

Counts at the engine itself, so the result does not depend on the machine's speed. Runs on a CPU with the
small model and on a GPU with any model:

    .venv/bin/python benchmarks/concurrency.py --prompt-tokens 512 --prompts-in-memory 5
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import matplotlib
import torch
import vllm
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import hybridkv_vllm
from hybridkv_vllm.tiny_model import write_tiny_model

RESULTS = Path(__file__).parent / "results"
STOCK = "stock"


@contextmanager
def engine(model: str, budget: float | None, args: argparse.Namespace) -> Iterator[LLM]:
    """An engine with room for `--prompts-in-memory` uncompressed requests; stock vLLM without a budget."""
    tokens = args.prompts_in_memory * (args.prompt_tokens + 32)
    # vLLM's CPU attention wants blocks of 32; the memory is the same.
    block_size = 32 if budget is None and not torch.cuda.is_available() else 16
    ours: dict[str, Any] = {}
    if budget is not None:
        ours = {
            "attention_backend": "hybridkv",
            "additional_config": {"hybridkv": {"budget": budget, "min_prompt_tokens": 16}},
        }
    llm = LLM(
        model,
        max_model_len=args.prompt_tokens + args.answer_tokens + 32,
        max_num_seqs=args.requests,
        max_num_batched_tokens=max(2048, args.requests + 64),
        block_size=block_size,
        num_gpu_blocks_override=tokens // block_size,
        enable_prefix_caching=False,
        **ours,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def decoding_at_once(llm: LLM, args: argparse.Namespace) -> int:
    """Most requests that generated a token in one step.

    Raises:
        RuntimeError: not every request finished; then a count would mean nothing.
    """
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(max_tokens=args.answer_tokens, temperature=0, ignore_eos=True, detokenize=False)
    for number in range(args.requests):
        tokens = torch.randint(0, 900, (args.prompt_tokens,), generator=generator).tolist()
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": tokens}, params)
    most = finished = 0
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        most = max(most, sum(bool(output.outputs[0].token_ids) for output in outputs))
        finished += sum(output.finished for output in outputs)
    if finished != args.requests:
        raise RuntimeError(f"{args.requests - finished} of {args.requests} requests did not finish")
    return most


def environment() -> dict[str, str]:
    """What the numbers were measured with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {
        "device": device,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "hybridkv": hybridkv_vllm.__version__,
        "python": platform.python_version(),
    }


def plot(rows: dict[str, int], file: Path) -> None:
    """Bars of concurrency by budget."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    bars = axes.bar(list(rows), list(rows.values()), color=["#888888"] + ["#2a6f97"] * (len(rows) - 1))
    axes.bar_label(bars)
    axes.set_ylabel("requests decoding at once")
    axes.set_xlabel("budget")
    axes.set_title("Same KV memory")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measures, prints a table and writes JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="folder or name; a small one with random weights by default")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--prompts-in-memory", type=int, default=5)
    parser.add_argument("--requests", type=int, default=24)
    args = parser.parse_args()
    model = args.model or str(write_tiny_model(Path(tempfile.mkdtemp()) / "tiny"))
    rows: dict[str, int] = {}
    for budget in track([None, *args.budgets], description="measuring"):
        with engine(model, budget, args) as llm:
            rows[STOCK if budget is None else f"{budget:g}"] = decoding_at_once(llm, args)
    table = Table("budget", "decoding at once", "against stock")
    for name, count in rows.items():
        table.add_row(name, str(count), f"{count / rows[STOCK]:.2f}x")
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key != "model"}
    report = {"environment": environment(), "settings": settings, "decoding_at_once": rows}
    (RESULTS / "concurrency.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(rows, RESULTS / "concurrency.png")


if __name__ == "__main__":
    main()
