"""What `hybridkv plan` is asked about: models, cards and workloads, by their numbers; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from hybridkv_vllm.checkpoint import Weights, read_weights
from hybridkv_vllm.plan import PAGE_TOKENS, Tier

if TYPE_CHECKING:
    from hybridkv_kernels.recall.layout import LandmarkKind

_Item = TypeVar("_Item")

GB, MIB, GIB = 10**9, 2**20, 2**30
# What a config.json calls a layer whose KV cache holds every token. The last two name its feed-forward part.
FULL_ATTENTION = {"full_attention", "attention", "sparse", "dense"}
# What it calls the number of a layer's experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Experts:
    """A feed-forward part of which a token takes a few experts.

    Attributes:
        per_token: so many of them does a token take.
        size: of an expert, as `feed_forward` of a layer without.
        shared: of what every token takes besides.
        dense_layers: layers with a plain feed-forward part instead.
    """

    number: int
    per_token: int
    size: int
    shared: int = 0
    dense_layers: int = 0

    def taken(self, rows: int) -> float:
        """How many different ones `rows` tokens take, if each takes any of them alike."""
        return self.number * (1 - (1 - self.per_token / self.number) ** rows)


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated feed-forward part.

    Attributes:
        feed_forward: its inner size, in layers without experts.
        tied: whether the output layer is the input embedding.
        vision: parameters outside of the decoder, vision tower and merger; 0 where they are not known.
        itemsize: bytes of an element of the KV cache, and of a weight that is not quantised.
        weights: of a local checkpoint; None: as many as the numbers above make.
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
    experts: Experts | None = None
    weights: Weights | None = None

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights."""
        return self.weights.total if self.weights else self.parameters * self.itemsize

    def step_bytes(self, rows: int) -> float:
        """Bytes of weights that a decode step of `rows` tokens reads."""
        if self.weights is None:
            return self.step_parameters(rows) * self.itemsize
        taken = self.experts.taken(rows) / self.experts.number if self.experts else 1.0
        output = self.weights.embedding if self.tied else 0
        return self.weights.decoder + output + taken * self.weights.experts

    def step_parameters(self, rows: int) -> float:
        """Parameters that a decode step of `rows` tokens reads: no tower, no separate input embedding."""
        return self._decoder(self.experts.taken(rows) if self.experts else 0)

    @property
    def parameters(self) -> int:
        """All of them, but for norms and biases."""
        decoder = int(self._decoder(self.experts.number if self.experts else 0))
        return decoder + self.vision + (0 if self.tied else self.hidden * self.vocabulary)

    def _decoder(self, taken: float) -> float:
        """Parameters of all layers and of the output layer, with so many experts a layer."""
        attention = self.head_size * (2 * self.query_heads + 2 * self.kv_heads)
        feed_forward: float = self.layers * 3 * self.feed_forward
        if self.experts:
            routed = 3 * (taken * self.experts.size + self.experts.shared) + self.experts.number
            dense = self.experts.dense_layers
            feed_forward = dense * 3 * self.feed_forward + (self.layers - dense) * routed
        return self.hidden * (self.layers * attention + feed_forward + self.vocabulary)

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


# As published, and adding up to what the checkpoints have (a test); vision parameters rounded to 10 million.
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
            ModelShape("Qwen/Qwen3-VL-4B-Instruct", 36, 2560, 32, 8, 128, 9728, 151936, True, 410_000_000),
            ModelShape("Qwen/Qwen3-VL-8B-Instruct", 36, 4096, 32, 8, 128, 12288, 151936, False, 580_000_000),
            ModelShape("Qwen/Qwen3-VL-32B-Instruct", 64, 5120, 64, 8, 128, 25600, 151936, False, 600_000_000),
            ModelShape(
                "Qwen/Qwen3-VL-30B-A3B-Instruct",
                *(48, 2048, 32, 4, 128, 6144, 151936, False, 540_000_000),
                experts=Experts(128, 8, 768),
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


def read_shape(folder: Path) -> ModelShape:
    """The shape of a local model, from its config.json; its weights by their files, where these are there.

    Raises:
        ValueError: no config, one without the numbers that are needed, or one of a model that cannot be
            served or whose weights cannot be counted.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json is no JSON object")
    nested = next((name for name in ("text_config", "llm_config") if config.get(name)), None)
    text = config if nested is None else config[nested]
    if not isinstance(text, dict):
        raise ValueError(f"{folder}/config.json: {nested} must be a JSON object, got {text!r}")
    weights = read_weights(folder, ModelShape.itemsize)
    try:
        if problem := _problem(config, text, weights):
            raise ValueError(problem)
        heads, hidden = _size(text, "num_attention_heads"), _size(text, "hidden_size")
        return ModelShape(
            name=str(folder),
            layers=_size(text, "num_hidden_layers"),
            hidden=hidden,
            query_heads=heads,
            kv_heads=_size(text, "num_key_value_heads", heads),
            head_size=_size(text, "head_dim", hidden // heads),
            feed_forward=_size(text, "intermediate_size"),
            vocabulary=_size(text, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            experts=_experts(text),
            weights=weights,
        )
    except KeyError as error:
        raise ValueError(f"{folder}/config.json says nothing of {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None


def _size(text: Mapping[str, Any], name: str, otherwise: int | None = None) -> int:
    """A number of the configuration, or `otherwise` where it is absent, null or 0."""
    size = text[name] if otherwise is None else text.get(name) or otherwise
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a whole number above 0, got {size!r}")
    return size


def _count(text: Mapping[str, Any], name: str) -> int:
    """A number of the configuration, or 0 where it is absent, null or 0."""
    return _size(text, name) if text.get(name) else 0


def _listed(text: Mapping[str, Any], name: str, kind: type[_Item]) -> list[_Item]:
    """A list of the configuration, empty where it is absent or null."""
    items = text.get(name) or []
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        raise ValueError(f"{name} must be a list of {kind.__name__}, got {items!r}")
    return items


def _problem(config: Mapping[str, Any], text: Mapping[str, Any], weights: Weights | None) -> str | None:
    """Why the numbers would be wrong: what the server refuses, and weights of another size."""
    kinds = set(_listed(text, "layer_types", str)) - FULL_ATTENTION
    if text.get("kv_lora_rank"):
        return "the model uses multi-head latent attention (MLA), which HybridKV does not serve"
    if kinds or (text.get("sliding_window") and text.get("use_sliding_window", True)):
        found = ", ".join(sorted(kinds)) or "sliding windows"
        return f"the model has other layers than full attention ({found}), which HybridKV does not serve"
    if weights is None and ("quantization_config" in config or "quantization_config" in text):
        return "the model is quantised, and its weights are not in the folder, whose sizes have to be known"
    if any(isinstance(text.get(name), list) for name in EXPERTS):
        return "the model has experts of several kinds, which are not counted"
    return None


def _experts(text: Mapping[str, Any]) -> Experts | None:
    """The experts of a configuration, by the names that published models have for them."""
    number = next(filter(None, (_count(text, name) for name in EXPERTS)), 0)
    if not number:
        return None
    size = _size(text, "moe_intermediate_size", text["intermediate_size"])
    shared = _count(text, "shared_expert_intermediate_size") or size * _count(text, "n_shared_experts")
    layers, every = text["num_hidden_layers"], _count(text, "decoder_sparse_step") or 1
    first, named = _count(text, "first_k_dense_replace"), _listed(text, "mlp_only_layers", int)
    dense = [layer for layer in range(layers) if layer < first or layer in named or (layer + 1) % every]
    return Experts(number, _size(text, "num_experts_per_tok"), size, shared, len(dense))
