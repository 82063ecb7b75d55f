"""Finds out how the model rotates its keys: sketches are taken around a centre that turns along."""

from __future__ import annotations

import torch
from hybridkv_kernels.recall.landmarks import Rope
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from hybridkv_vllm.attention.impl import HybridKVImpl

# vLLM configures loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")


def find_rope(model: nn.Module, num_axes: int) -> Rope | None:
    """The rope that every attention layer of `model` uses (vLLM's classes as of 0.32.0).

    Args:
        num_axes: axes of the model's positions: 1, or as many as its M-RoPE has.

    Returns:
        None where there is none, layers differ, or it is of a kind that we do not know: sketches are then
        taken around the mean of the keys as they are, which is less exact where keys have large biases.
    """
    modules = dict(model.named_modules())
    ropes = {
        id(rope): rope
        for name, module in modules.items()
        if isinstance(module, Attention) and isinstance(module.impl, HybridKVImpl)
        for rope in (getattr(modules[name.rpartition(".")[0]], "rotary_emb", None),)
    }
    rope = rope_of(next(iter(ropes.values())), num_axes) if len(ropes) == 1 else None
    if rope is None:
        logger.info_once(
            "hybridkv: the model's rotary embedding is not known; sketches are not centred by it"
        )
    return rope


def rope_of(module: object, num_axes: int) -> Rope | None:
    """One rotary embedding of vLLM's as a `Rope`; None for what is none, or of a kind not known."""
    if not isinstance(module, RotaryEmbeddingBase):
        return None
    axis = _axes(module, num_axes)
    if axis is None:
        return None
    table = module.cos_sin_cache
    return Rope(table.contiguous(), axis.to(table.device, torch.int32), num_axes, module.is_neox_style)


def _axes(rope: RotaryEmbeddingBase, num_axes: int) -> torch.Tensor | None:
    """The position axis of each frequency `[R/2]`; None where it cannot be told."""
    half = rope.rotary_dim // 2
    if rope.cos_sin_cache.dim() != 2 or rope.cos_sin_cache.shape[1] != rope.rotary_dim:
        return None
    if num_axes == 1:
        return torch.zeros(half)
    if not isinstance(rope, MRotaryEmbedding) or len(rope.mrope_section or ()) != num_axes:
        return None
    sections = torch.tensor(rope.mrope_section)
    if not rope.mrope_interleaved:
        return torch.arange(num_axes).repeat_interleave(sections)
    # Time, height and width in turn; what is left when height and width are used up is time's.
    frequency = torch.arange(half)
    axis = frequency % num_axes
    return torch.where(frequency < sections[axis] * num_axes, axis, 0)
