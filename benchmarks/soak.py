"""Keeps a server busy for minutes and says whether it bears it: no error, no growth of memory, nothing kept.

    python benchmarks/soak.py --stock --out benchmarks/results/soak-stock.json     # stock vLLM, to compare
    python benchmarks/soak.py --out benchmarks/results/soak.json

Clients stream answers about pictures of several lengths; some go away in the middle, some ask for everything
to be kept, some for nothing to be compressed. After a warm-up, in which caches fill, and after the load the
server is left alone: what it has more of then has been kept. Of that, what stock vLLM keeps for each answer
under the same load is its own.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from hybridkv_quality.environment import Environment, environment
from hybridkv_quality.model_path import model_folder
from hybridkv_serving.kinds import KINDS
from hybridkv_serving.trace import make_trace
from openai import AsyncOpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field
from rich.console import Console

from hybridkv_vllm.server import Server, ServerFailed, serve

NAME = "model"
STOCK_RESULT = Path(__file__).parent / "results" / "soak-stock.json"
LENGTHS = (256, 768, 1024, 1536)
GOES_AWAY, KEEPS_ALL, UNCOMPRESSED = 0.1, 0.05, 0.05
METRICS_SECONDS, REST_SECONDS, EMPTY_SECONDS = 1.0, 5.0, 60.0
# On a CPU every tensor is malloc's, and glibc keeps what tensors of many sizes leave behind: memory grows for
# long without a leak. With fixed thresholds it goes back when a tensor does.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
# Small enough to be full now and then: what has been used once counts as this process' from then on.
HOST_POOL_GIB = 0.0625
# Figures that are 0 once nobody asks any more.
EMPTY = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "hybridkv_blocks_arena",
    "hybridkv_blocks_replaced",
    "hybridkv_host_bytes",
)
# Memory may differ by this share without growing.
MOST_GROWTH, MOST_METRICS_SECONDS = 0.03, 0.1


class Soak(BaseModel):
    """What became of the server."""

    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    environment: Environment
    server: str = Field(description="`stock` or `hybridkv`.")
    clients: int
    warm_up: float = Field(description="Seconds of load before anything counts.")
    seconds: float = Field(description="Seconds of load after that.")
    answers: int = 0
    gone_away: int = 0
    errors: list[str] = []
    preemptions: int = 0
    compressed: int = 0
    memory_after_warm_up: dict[str, float] = Field(
        default={}, description="MiB that each process has for itself, at rest."
    )
    memory_at_end: dict[str, float] = Field(default={}, description="The same after the load.")
    metrics_p99: float = Field(default=0, description="Seconds that GET /metrics took during the load.")
    left_over: dict[str, float] = Field(default={}, description="What was not empty at the end.")

    @property
    def growth(self) -> float:
        """MiB that all processes together have more than after the warm-up."""
        return sum(self.memory_at_end.values()) - sum(self.memory_after_warm_up.values())

    def problems(self, stock: Soak | None = None) -> list[str]:
        """Why the server did not bear it; empty if it did.

        Args:
            stock: what became of stock vLLM; without it none of the growth is vLLM's.
        """
        found = [] if self.answers else ["no answer at all"]
        if self.errors:
            found.append(f"{len(self.errors)} errors, the first: {self.errors[0]}")
        before = sum(self.memory_after_warm_up.values())
        of_stock = 0.0
        if stock is not None and stock.answers:
            of_stock = max(0.0, stock.growth) * self.answers / stock.answers
        if self.growth > before * MOST_GROWTH + of_stock:
            after = before + self.growth
            found.append(f"memory grew from {before:.0f} to {after:.0f} MiB, {of_stock:.0f} as stock's does")
        if self.metrics_p99 > MOST_METRICS_SECONDS:
            found.append(f"/metrics took {self.metrics_p99:.3f} s (99th percentile)")
        if self.left_over:
            found.append(f"not empty at the end: {self.left_over}")
        return found


async def _client(soak: Soak, api: AsyncOpenAI, number: int, end: float, tokens: int) -> None:
    """One client: question after question until the end."""
    chance = random.Random(number)
    while time.monotonic() < end:
        kind, length = chance.choice(KINDS), chance.choice(LENGTHS)
        (conversation,) = await asyncio.to_thread(
            lambda kind=kind, length=length: list(make_trace(kind, 1, length, chance.randrange(2**32)))
        )
        draw = chance.random()
        extra: dict[str, Any] = {"ignore_eos": True}
        if draw < UNCOMPRESSED:
            extra["vllm_xargs"] = {"hybridkv_enabled": False}
        elif draw < UNCOMPRESSED + KEEPS_ALL:
            extra["vllm_xargs"] = {"hybridkv_budget": 1.0}
        goes_away = chance.random() < GOES_AWAY
        left = chance.randrange(1, tokens)
        try:
            stream = await api.chat.completions.create(
                model=NAME,
                messages=[conversation.turns[0].message()],  # type: ignore[list-item]
                max_tokens=tokens,
                stream=True,
                extra_body=extra,
            )
            async for _ in stream:
                left -= 1
                if goes_away and left <= 0:
                    await stream.close()
                    break
        except (OpenAIError, httpx.HTTPError) as error:
            soak.errors.append(f"{type(error).__name__}: {error}")
            continue
        soak.gone_away += goes_away
        soak.answers += not goes_away


def _watch(url: str, seconds: float) -> list[float]:
    """Seconds of `/metrics`, asked for again and again until the end.

    In a process of its own: the clients' would count its own delays as the server's.
    """
    waits: list[float] = []
    end = time.monotonic() + seconds
    with httpx.Client(timeout=60) as http:
        while time.monotonic() < end:
            began = time.monotonic()
            http.get(f"{url}/metrics").raise_for_status()
            waits.append(time.monotonic() - began)
            time.sleep(METRICS_SECONDS)
    return waits


async def _load(soak: Soak, server: Server, seconds: float, tokens: int) -> list[float]:
    """Keeps all clients asking; what `_watch` says of it."""
    end = time.monotonic() + seconds
    # A connection used again may be one that the server is closing.
    http = httpx.AsyncClient(
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0), timeout=600
    )
    api = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
            watch = asyncio.get_running_loop().run_in_executor(own, _watch, server.url, seconds)
            await asyncio.gather(*(_client(soak, api, number, end, tokens) for number in range(soak.clients)))
            return await watch
    finally:
        await api.close()


def _figures(server: Server) -> dict[str, float]:
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def _settle(soak: Soak, server: Server) -> dict[str, float]:
    """Waits until nothing is left, or notes what is; MiB that each process then has for itself."""
    deadline = time.monotonic() + EMPTY_SECONDS
    while True:
        figures = _figures(server)
        left = {name: figures[name] for name in EMPTY if figures.get(name)}
        if not left or time.monotonic() > deadline:
            break
        time.sleep(1)
    soak.left_over |= left
    soak.preemptions = int(figures["vllm:num_preemptions_total"])
    soak.compressed = int(figures.get("hybridkv_requests_compressed_total", 0))
    time.sleep(REST_SECONDS)
    return {
        f"{process.name()} {process.pid}": round(process.memory_full_info().uss / 2**20, 1)
        for process in psutil.Process().children(recursive=True)
    }


def main() -> int:
    """Runs the load and reports; 1 where the server did not bear it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(model_folder()), help="folder or name")
    parser.add_argument("--stock", action="store_true", help="stock vLLM, without the plugin")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--warm-up", type=float, default=120, metavar="SECONDS", help="of load, first")
    parser.add_argument("--seconds", type=float, default=300, help="of load after the warm-up")
    parser.add_argument("--answer-tokens", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=1024, help="of the KV cache, so that it is short")
    parser.add_argument("--log", type=Path, help="file for the server's output")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument(
        "--against", type=Path, default=STOCK_RESULT, help="JSON file of stock vLLM under the same load"
    )
    args = parser.parse_args()
    given = {
        "served-model-name": NAME,
        # In bf16 oneDNN keeps machine code for each shape of a product: prompts of any length have new ones.
        "dtype": "float32",
        "max-model-len": 4096,
        "max-num-seqs": args.clients,
        "max-num-batched-tokens": 2048,
        "num-gpu-blocks-override": args.blocks,
        "limit-mm-per-prompt": '{"image": 64}',
        # vLLM keeps the last pictures, 4 GiB of them: that growth is its own, and wanted.
        "mm-processor-cache-gb": 0,
    }
    if args.stock:
        # vLLM's CPU attention wants blocks of 32.
        given |= {"block-size": 32, "num-gpu-blocks-override": args.blocks // 2}
    else:
        given |= {"attention-backend": "hybridkv", "additional-config.hybridkv.host_pool_gib": HOST_POOL_GIB}
    arguments = [part for option, value in given.items() for part in (f"--{option}", str(value))]
    log = args.log or Path(tempfile.mkdtemp(prefix="hybridkv-soak-")) / "server.log"
    soak = Soak(
        environment=environment(),
        server="stock" if args.stock else "hybridkv",
        clients=args.clients,
        warm_up=args.warm_up,
        seconds=args.seconds,
    )
    try:
        variables = MALLOC | ({"VLLM_PLUGINS": ""} if args.stock else {})
        with serve(args.model, arguments, log, environment=variables, timeout=900) as server:
            asyncio.run(_load(soak, server, soak.warm_up, args.answer_tokens))
            soak.memory_after_warm_up = _settle(soak, server)
            waits = asyncio.run(_load(soak, server, soak.seconds, args.answer_tokens))
            soak.memory_at_end = _settle(soak, server)
            soak.metrics_p99 = float(np.percentile(waits, 99))
    except (ServerFailed, httpx.HTTPError) as error:
        print(f"soak.py: {error}", file=sys.stderr)
        return 1
    Console().print(soak.model_dump(exclude={"environment"}))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(soak.model_dump_json(indent=1) + "\n")
    stock = None
    if not args.stock and args.against.exists():
        stock = Soak.model_validate_json(args.against.read_text())
    problems = soak.problems(stock)
    for problem in problems:
        print(f"soak.py: {problem}; log: {log}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
