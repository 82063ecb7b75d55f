"""What serving takes, stock and compressed: memory, requests at once, time per token; from shapes alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hybridkv_kernels.recall.layout import LandmarkLayout
from hybridkv_kernels.recall.tables import STORE_BLOCK
from rich.table import Table

from hybridkv_vllm.plan import PAGE_TOKENS, PromptPlan, ceil_pages, make_plan
from hybridkv_vllm.policies import PolicyOptions, recall_limits
from hybridkv_vllm.policies.budget import allocate_pages
from hybridkv_vllm.shapes import GIB, MIB, Gpu, ModelShape, Workload

# Tokens of the question behind the pictures, all of which every head keeps.
QUESTION = 32
# Any value will do: it is the same for all heads, so static ones share evenly.
EVEN_SPARSITY = 0.9


@dataclass(frozen=True)
class Serving:
    """One way to serve, on each rank.

    Attributes:
        request_bytes: KV memory of a request that decodes, at the end of its answer.
        requests: so many fit at once.
        host_bytes: host memory of a request's dynamic heads.
        batch: requests decoding at once, for the times.
        step: seconds of a decode step of `batch` rows, halfway through their answers.
        single: seconds of a decode step of one row.
    """

    request_bytes: int
    requests: int
    host_bytes: int
    batch: int
    step: float
    single: float

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.batch / self.step if self.batch else 0.0


@dataclass(frozen=True)
class Estimate:
    """Stock vLLM against HybridKV; bytes and requests are exact, times a lower limit (see `ASSUMPTIONS`).

    Attributes:
        kv_bytes_per_token: of a rank.
        kv_memory: bytes that a rank has for KV blocks.
        heads: KV heads of a rank, over all layers.
        recalling: of them recall chunks.
    """

    model: str
    gpu: str
    kv_bytes_per_token: int
    kv_memory: int
    heads: int
    recalling: int
    stock: Serving
    hybridkv: Serving

    def as_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)


ASSUMPTIONS = (
    "a decode step reads the weights and each row's KV pages once, at 0.9 of the data sheet's bandwidth; "
    "compute, launches, sampling and communication between ranks are not counted, so real steps are longer",
    "of a layer's experts those that the rows' tokens take are read, each token taking any of them alike",
    "a local model's weights are counted in its files; without these its vision tower is not counted",
    "chunks that have to be fetched cross the link after all else: nothing is overlapped",
    "weights and KV cache in 16 bits, as vLLM loads a float32 checkpoint too; quantised weights as stored",
    "prompts are compressed, however short: a server leaves those below its min_prompt_tokens alone",
    f"pictures, then a question of {QUESTION} tokens; all KV heads equally sparse",
    "bytes and requests follow from the engine's own rules for blocks, arenas and landmarks",
)


def estimate(shape: ModelShape, gpu: Gpu, workload: Workload) -> Estimate:
    """What a model takes on a card.

    Raises:
        ValueError: the weights do not fit, heads cannot be divided among ranks, or another number that the
            engine could not work with either.
    """
    ranks = workload.ranks
    if shape.query_heads % ranks or (shape.kv_heads % ranks and ranks % shape.kv_heads):
        raise ValueError(
            f"{shape.query_heads} query heads and {shape.kv_heads} KV heads of {shape.name} cannot be "
            f"divided among {ranks} ranks"
        )
    kv_heads = max(1, shape.kv_heads // ranks)
    heads = shape.layers * kv_heads
    block_bytes = heads * shape.page_bytes()
    weights = shape.weight_bytes // ranks
    kv_memory = int(workload.utilization * gpu.memory) - weights - workload.reserved
    if kv_memory < block_bytes:
        raise ValueError(
            f"{shape.name} does not fit: its weights take {weights / GIB:.1f} GiB of the "
            f"{gpu.memory / GIB:.1f} GiB of {gpu.name}; use more ranks"
        )
    memory = kv_memory // block_bytes
    halfway = workload.context + workload.answer // 2

    def serving(held: int, needed: int, host_bytes: int, read_pages: float, fetched_bytes: float) -> Serving:
        """Of requests that hold `held` blocks each while they decode, beside `needed` for one prefill."""
        fit = max(0, (memory - needed) // held)
        if host_bytes and workload.host_memory is not None:
            fit = min(fit, workload.host_memory // host_bytes)
        batch = fit if workload.batch is None else min(workload.batch, fit)

        def step(rows: int) -> float:
            read = shape.step_bytes(rows) / ranks + rows * read_pages * shape.page_bytes()
            return read / gpu.bandwidth + rows * fetched_bytes / gpu.link

        return Serving(held * block_bytes, fit, host_bytes, batch, step(max(1, batch)), step(1))

    stock = serving(ceil_pages(workload.context + workload.answer), 0, 0, heads * halfway / PAGE_TOKENS, 0.0)
    span = (0, max(0, workload.context - QUESTION))
    plan = make_plan(workload.context, (span,) if span[1] else (), workload.budget, QUESTION, workload.tier)
    tail = workload.context % PAGE_TOKENS
    recalling, hot = _recall(shape, heads, plan, workload)
    held = plan.arena_size + ceil_pages(tail + workload.answer)
    if recalling and workload.tier == "gpu":
        held += plan.num_full_blocks
    # Dynamic heads lie side by side; where only some recall, they keep the blocks they begin and end in.
    chunks, dynamic = plan.num_full_blocks, round(workload.dynamic * heads)
    ends = STORE_BLOCK - math.gcd(chunks, STORE_BLOCK)
    host_pages = min(dynamic * chunks, recalling * (chunks + ends))
    ours = serving(
        held,
        # On the GPU's own tier a request goes on with the blocks that its prefill had.
        0 if recalling and workload.tier == "gpu" else plan.num_full_blocks,
        host_pages * shape.page_bytes() if workload.tier == "host" else 0,
        heads * (plan.arena_size + (tail + workload.answer // 2) / PAGE_TOKENS),
        workload.missed * hot * shape.page_bytes() if workload.tier == "host" else 0.0,
    )
    return Estimate(
        model=shape.name,
        gpu=gpu.name,
        kv_bytes_per_token=block_bytes // PAGE_TOKENS,
        kv_memory=kv_memory,
        heads=heads,
        recalling=recalling,
        stock=stock,
        hybridkv=ours,
    )


def table(result: Estimate) -> Table:
    """What to show on a terminal."""
    stock, ours = result.stock, result.hybridkv
    shown = Table(title=f"{result.model} on {result.gpu}, a rank")
    shown.add_column("")
    shown.add_column("stock", justify="right")
    shown.add_column("hybridkv", justify="right")
    shown.add_column("ratio", justify="right")

    def row(what: str, before: float, after: float, form: str, ratio: float) -> None:
        shown.add_row(what, format(before, form), format(after, form), f"{ratio:.2f}x" if ratio else "")

    def of(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else 0.0

    row(
        "KV memory of a request, MiB",
        stock.request_bytes / MIB,
        ours.request_bytes / MIB,
        ",.0f",
        of(stock.request_bytes, ours.request_bytes),
    )
    row("requests at once", stock.requests, ours.requests, ",", of(ours.requests, stock.requests))
    row("host memory of these, GiB", 0, ours.host_bytes * ours.requests / GIB, ",.0f", 0)
    row("requests decoding, for the times", stock.batch, ours.batch, ",", 0)
    row("time per token, ms, at least", 1e3 * stock.step, 1e3 * ours.step, ".2f", of(stock.step, ours.step))
    row("the same with one request", 1e3 * stock.single, 1e3 * ours.single, ".2f", stock.single / ours.single)
    row(
        "tokens a second, at most",
        stock.tokens_per_second,
        ours.tokens_per_second,
        ",.0f",
        of(ours.tokens_per_second, stock.tokens_per_second),
    )
    shown.caption = (
        f"{result.kv_memory / GIB:.1f} GiB for KV blocks, {result.kv_bytes_per_token:,} bytes a token; "
        f"{result.recalling} of {result.heads} KV heads recall"
    )
    return shown


def _recall(shape: ModelShape, heads: int, plan: PromptPlan, workload: Workload) -> tuple[int, int]:
    """How many heads recall, and the chunks that they have on the GPU together."""
    if not plan.recalls:
        return 0, 0
    chunks, window = plan.num_full_blocks, plan.window_in_arena
    layout = LandmarkLayout(workload.landmark, shape.head_size, shape.itemsize)
    pages = plan.arena_size * heads
    limits = recall_limits(pages, heads, chunks, layout.pages(chunks), window)
    if limits is None:
        return 0, 0
    least, most = limits
    recalling = min(round(workload.dynamic * heads), most)
    given = allocate_pages(
        torch.full((1, heads), EVEN_SPARSITY),
        torch.arange(heads)[None] < recalling,
        pages=pages,
        capacity=chunks,
        window=window,
        dynamic_share=PolicyOptions().dynamic_share,
        dynamic_least=least,
    )
    return recalling, int(given[0, :recalling].sum()) - recalling * layout.pages(chunks)
