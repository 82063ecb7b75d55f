"""What serving takes, stock and compressed: memory, requests at once, time per token; from shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from hybridkv_kernels.recall.layout import LandmarkKind, LandmarkLayout
from rich.table import Table

from hybridkv_vllm.plan import PAGE_TOKENS, Tier, ceil_pages, make_plan
from hybridkv_vllm.policies import PolicyOptions, recall_limits
from hybridkv_vllm.policies.budget import allocate_pages

GB, MIB, GIB = 10**9, 2**20, 2**30
# Tokens of the question behind the pictures, all of which every head keeps.
QUESTION = 32
# M-RoPE's.
POSITION_AXES = 3
# Any value will do: it is the same for all heads, so static ones share evenly.
EVEN_SPARSITY = 0.9


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated feed-forward part.

    Attributes:
        tied: whether the output layer is the input embedding.
        vision: parameters outside of the decoder, vision tower and merger; 0 where they are not known.
        itemsize: bytes of a weight and of an element of the KV cache.
    """

    name: str
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    tied: bool = False
    vision: int = 0
    itemsize: int = 2

    @property
    def step_parameters(self) -> int:
        """Parameters that every decode step reads: all but the tower and a separate input embedding."""
        projections = self.head_size * (2 * self.query_heads + 2 * self.kv_heads) + 3 * self.feed_forward
        return self.hidden * (self.layers * projections + self.vocabulary)

    @property
    def parameters(self) -> int:
        """All of them, but for norms and biases."""
        return self.step_parameters + self.vision + (0 if self.tied else self.hidden * self.vocabulary)

    def page_bytes(self) -> int:
        """Bytes of 16 tokens of one KV head of one layer."""
        return PAGE_TOKENS * 2 * self.head_size * self.itemsize


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        memory: bytes.
        bandwidth: bytes a second that a good kernel reads, 0.9 of the data sheet's.
        link: bytes a second from pinned host memory.
    """

    name: str
    memory: int
    bandwidth: float
    link: float


# From the models' own config.json; vision parameters rounded to 10 million.
MODELS: Mapping[str, ModelShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            ModelShape("Qwen/Qwen2.5-VL-3B-Instruct", 36, 2048, 16, 2, 128, 11008, 151936, True, 670_000_000),
            ModelShape(
                "Qwen/Qwen2.5-VL-7B-Instruct", 28, 3584, 28, 4, 128, 18944, 152064, False, 680_000_000
            ),
            ModelShape(
                "Qwen/Qwen2.5-VL-32B-Instruct", 64, 5120, 40, 8, 128, 27648, 152064, False, 690_000_000
            ),
            ModelShape(
                "Qwen/Qwen2.5-VL-72B-Instruct", 80, 8192, 64, 8, 128, 29568, 152064, False, 700_000_000
            ),
        )
    }
)
# GiB that the driver reports, rounded down; the data sheet's GB/s; GB/s from pinned memory over PCIe 5 or 4.
_SHEETS = {
    "a100-40": (39, 1555, 25),
    "a100": (79, 2039, 25),
    "l40s": (44, 864, 25),
    "h100": (79, 3350, 55),
    "h200": (139, 4800, 55),
    "b200": (178, 8000, 55),
}
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        name: Gpu(name, memory * GIB, 0.9 * bandwidth * GB, link * GB)
        for name, (memory, bandwidth, link) in _SHEETS.items()
    }
)


@dataclass(frozen=True)
class Workload:
    """What is asked of the server, and with which options.

    Attributes:
        context: prompt tokens of a request.
        answer: tokens that it generates.
        budget: share of a prompt's KV cache that stays on the GPU.
        dynamic: share of the KV heads that are dynamic.
        missed: share of a step's chosen chunks that have to be fetched.
        tier: where dynamic heads keep their chunks.
        landmark: their kind.
        ranks: tensor-parallel size.
        utilization: share of the card's memory for vLLM.
        reserved: bytes for activations and CUDA graphs.
        batch: requests decoding at once, for the times; None: as many as fit.
        host_memory: bytes of a rank's host pool; None: as much as is needed.

    Raises:
        ValueError: a number out of range; the message names it.
    """

    context: int
    answer: int = 256
    budget: float = 0.1
    dynamic: float = 1.0
    missed: float = 0.03
    tier: Tier = "host"
    landmark: LandmarkKind = "sketch2"
    ranks: int = 1
    utilization: float = 0.92
    reserved: int = 2 * GIB
    batch: int | None = None
    host_memory: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("context", PAGE_TOKENS), ("answer", 1), ("ranks", 1), ("reserved", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        for name in ("budget", "utilization"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("dynamic", "missed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


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
    "of a local model the vision tower is not counted: its config does not tell its size",
    "chunks that have to be fetched cross the link after all else: nothing is overlapped",
    f"pictures, then a question of {QUESTION} tokens; all KV heads equally sparse",
    "bytes and requests follow from the engine's own rules for blocks, arenas and landmarks",
)


def read_shape(folder: Path) -> ModelShape:
    """The shape of a local model, from its config.json alone.

    Raises:
        ValueError: no config, or one without the numbers that are needed.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from None
    text = config.get("text_config", config)
    itemsize = 4 if "float32" in (text.get("dtype"), text.get("torch_dtype"), config.get("dtype")) else 2
    try:
        heads = text["num_attention_heads"]
        return ModelShape(
            name=str(folder),
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            query_heads=heads,
            kv_heads=text.get("num_key_value_heads", heads),
            head_size=text.get("head_dim") or text["hidden_size"] // heads,
            feed_forward=text["intermediate_size"],
            vocabulary=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            itemsize=itemsize,
        )
    except KeyError as error:
        raise ValueError(f"{folder}/config.json says nothing of {error}") from None


def estimate(shape: ModelShape, gpu: Gpu, workload: Workload) -> Estimate:
    """What a model takes on a card.

    Raises:
        ValueError: the weights do not fit, or a number that the engine could not work with either.
    """
    kv_heads = max(1, shape.kv_heads // workload.ranks)
    heads = shape.layers * kv_heads
    block_bytes = heads * shape.page_bytes()
    weights = shape.parameters * shape.itemsize // workload.ranks
    kv_memory = int(workload.utilization * gpu.memory) - weights - workload.reserved
    if kv_memory < block_bytes:
        raise ValueError(
            f"{shape.name} does not fit: its weights take {weights / GIB:.1f} GiB of the "
            f"{gpu.memory / GIB:.1f} GiB of {gpu.name}; use more ranks"
        )
    memory = kv_memory // block_bytes
    step_weights = shape.step_parameters * shape.itemsize / workload.ranks
    halfway = workload.context + workload.answer // 2

    def serving(held: int, needed: int, host_bytes: int, read_pages: float, fetched_bytes: float) -> Serving:
        """Of requests that hold `held` blocks each while they decode, beside `needed` for one prefill."""
        fit = max(0, (memory - needed) // held)
        if host_bytes and workload.host_memory is not None:
            fit = min(fit, workload.host_memory // host_bytes)
        batch = fit if workload.batch is None else min(workload.batch, fit)

        def step(rows: int) -> float:
            read = step_weights + rows * read_pages * shape.page_bytes()
            return read / gpu.bandwidth + rows * fetched_bytes / gpu.link

        return Serving(held * block_bytes, fit, host_bytes, batch, step(max(1, batch)), step(1))

    stock = serving(ceil_pages(workload.context + workload.answer), 0, 0, heads * halfway / PAGE_TOKENS, 0.0)
    span = (0, max(0, workload.context - QUESTION))
    plan = make_plan(workload.context, (span,) if span[1] else (), workload.budget, QUESTION, workload.tier)
    tail = workload.context % PAGE_TOKENS
    recalling, hot = _recall(shape, heads, plan.arena_size, workload)
    held = plan.arena_size + ceil_pages(tail + workload.answer)
    if recalling and workload.tier == "gpu":
        held += plan.num_full_blocks
    full_bytes = plan.num_full_blocks * shape.page_bytes()
    ours = serving(
        held,
        plan.num_full_blocks,
        recalling * full_bytes if workload.tier == "host" else 0,
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


def _recall(shape: ModelShape, heads: int, arena_size: int, workload: Workload) -> tuple[int, int]:
    """How many heads recall, and the chunks that they have on the GPU together."""
    chunks = workload.context // PAGE_TOKENS
    if workload.tier == "off" or arena_size >= chunks:
        return 0, 0
    layout = LandmarkLayout(workload.landmark, shape.head_size, shape.itemsize, POSITION_AXES)
    positions = layout.position_pages(chunks) if layout.sketch_bits else 0
    pages = arena_size * heads - positions
    window = max(0, QUESTION - workload.context % PAGE_TOKENS)
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
