"""Qwen2.5-VL's forward pass, arranged for training: one scene is read once and asked many questions.

The weights are those of Transformers' model; `tests/quality/test_training.py` holds both passes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from hybridkv_vllm import tiny_model
from hybridkv_vllm.tiny_model import MERGE, PATCH, TEMPORAL_PATCH

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, FEED_FORWARD = 256, 4, 4, 2, 64, 384
# The layer of which, at the beginning, one head is shown which domino to look at and one what to count.
POINTING_LAYER, LOOKUP_HEAD, TALLY_HEAD = 2, 0, 2
# A head that counts gives the first token so much weight and each thing counted 1: its output tells how many.
TALLY_SINK = 2
VISION_HIDDEN, VISION_HEADS = 128, 2
# Faster and more frequencies for time than the real model's: a shallow network finds neighbours by them.
ROPE_THETA = 10_000.0
MROPE_SECTION = (16, 8, 8)
# CLIP's, the image processor's default.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The real architecture, small. Windows of one visual token: the tower reads each cell by itself."""
    return tiny_model.build_config(
        tokenizer,
        text={
            "hidden_size": HIDDEN,
            "intermediate_size": FEED_FORWARD,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_SIZE,
        },
        vision={
            "depth": 1,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": VISION_HEADS,
            "window_size": PATCH * MERGE,
            "fullatt_block_indexes": [],
        },
        rope_theta=ROPE_THETA,
        mrope_section=MROPE_SECTION,
    )


@torch.no_grad()
def build_model(config: Qwen2_5_VLConfig) -> Qwen2_5_VLForConditionalGeneration:
    """Fresh weights from torch's current seed, scaled for a shallow network."""
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            into_residual = name.endswith(("o_proj", "down_proj", "attn.proj"))
            std = module.weight[0].numel() ** -0.5 * ((2 * LAYERS) ** -0.5 if into_residual else 1.0)
            module.weight.normal_(std=std)
            if module.bias is not None:
                # Random positional tastes, from which heads for neighbours grow.
                module.bias.normal_(std=1.0 if name.endswith(("q_proj", "k_proj")) else 0.0)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_()
    # Words are said in the terms in which they are read, so that copying is easily learnt.
    model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight * (0.25 * HIDDEN**-0.5))
    return model


def to_patches(cells: Tensor) -> Tensor:
    """`[N, 28, 28, 3]` uint8 cells as the image processor's patches, `[N, 4, 3 * 2 * 14 * 14]` fp32."""
    mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    pixels = (cells.float() / 255 - mean) / std
    patches = pixels.unflatten(1, (MERGE, PATCH)).unflatten(3, (MERGE, PATCH)).permute(0, 1, 3, 5, 2, 4)
    return patches.flatten(1, 2).unsqueeze(3).expand(-1, -1, -1, TEMPORAL_PATCH, -1, -1).flatten(2)


def see(model: Qwen2_5_VLForConditionalGeneration, patches: Tensor) -> Tensor:
    """The vision tower on single cells: `[N, 4, P]` patches to `[N, HIDDEN]`."""
    tower = model.model.visual
    hidden = patches @ tower.patch_embed.proj.weight.flatten(1).T
    cos, sin = _patch_rotation(VISION_HIDDEN // VISION_HEADS)
    for block in tower.blocks:
        qkv = block.attn.qkv(block.norm1(hidden)).unflatten(-1, (3, VISION_HEADS, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(query, cos, sin), _rotate(key, cos, sin), value)
        hidden = hidden + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    merger = tower.merger
    return merger.mlp(merger.ln_q(hidden).flatten(1))


def _patch_rotation(size: int) -> tuple[Tensor, Tensor]:
    """cos, sin `[4, size]` of the four patches of a cell: rows take the first half of the frequencies."""
    frequencies = 10000.0 ** -(torch.arange(0, size // 2, 2) / (size // 2))
    row, column = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    angle = torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=-1)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def text_rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin `[N, HEAD_SIZE]` of M-RoPE positions `[3, N]` (time, row, column)."""
    frequencies = ROPE_THETA ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(MROPE_SECTION))
    angle = positions.float()[axis].T * frequencies
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def _pointing(query: Tensor, key: Tensor, mask: Tensor, lookups: Tensor) -> Tensor:
    """Log-probabilities `[M]` of the tokens to look up, for one head's `[B, N, D]` queries."""
    scores = (query @ key.transpose(1, 2) * HEAD_SIZE**-0.5).float().masked_fill(~mask, -torch.inf)
    asked = lookups >= 0
    return scores[asked].log_softmax(-1).gather(-1, lookups[asked].unsqueeze(-1)).squeeze(-1)


def _tallying(query: Tensor, key: Tensor, mask: Tensor, tallies: Sequence[Tally]) -> Tensor:
    """Log-probabilities `[M]` of the first token and of the tokens to count, weighted as they should be."""
    found = []
    for row, place, counted in tallies:
        scores = (
            (key[row] @ query[row, place] * HEAD_SIZE**-0.5).float().masked_fill(~mask[place], -torch.inf)
        )
        chances = scores.log_softmax(-1)
        told = TALLY_SINK * chances[0] + chances[counted].sum()
        found.append(told / (TALLY_SINK + len(counted)))
    return torch.stack(found)


class Tally(NamedTuple):
    """Where a number is said: scene, place among its Q * N asked tokens, and the scene's tokens to count."""

    row: int
    place: int
    counted: list[int]


@dataclass(frozen=True)
class Batch:
    """B scenes of T tokens, each with Q questions (with their answers) of N tokens.

    Attributes:
        context: `[B, T, HIDDEN]` fp32 embeddings of the scene's tokens.
        context_positions: `[3, T]` M-RoPE positions, alike for all.
        questions: `[B, Q, N]` token ids; each question follows the scene and sees no other question.
        targets: `[B, Q, N]` the next token where it is part of an answer, else -100.
        tasks: `[B][Q]` the questions' tasks.
        lookups: `[B, Q, N]` the scene's token that holds what comes next, where that is a domino, else -1.
        tallies: the places where a number is said.
    """

    context: Tensor
    context_positions: Tensor
    questions: Tensor
    targets: Tensor
    tasks: list[list[str]]
    lookups: Tensor | None = None
    tallies: Sequence[Tally] = ()


@dataclass
class Found:
    """Log-probabilities with which the shown heads attend to a batch's lookups `[M]` and tallies `[M]`."""

    lookups: Tensor | None = None
    tallies: Tensor | None = None


def answer_logits(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, found: Found | None = None
) -> Tensor:
    """Logits of the places of `batch.targets` that are not -100, in their order: `[M, vocabulary]`.

    Args:
        found: takes what the shown heads did.
    """
    language = model.model.language_model
    _, per_scene, width = batch.questions.shape
    scene = batch.context.shape[1]
    asked = per_scene * width
    embedded = language.embed_tokens(batch.questions.flatten(1))
    hidden = torch.cat([batch.context, embedded], dim=1)
    following = batch.context_positions.max() + 1 + torch.arange(width).repeat(per_scene)
    cos, sin = text_rotation(torch.cat([batch.context_positions, following.expand(3, -1)], dim=1))
    mask = torch.ones(asked, scene + asked, dtype=torch.bool)
    block = torch.ones(width, width, dtype=torch.bool).tril()
    mask[:, scene:] = torch.block_diag(*[block] * per_scene)
    for number, layer in enumerate(language.layers):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query = attention.q_proj(normed).unflatten(-1, (HEADS, HEAD_SIZE)).transpose(1, 2)
        key = attention.k_proj(normed).unflatten(-1, (KV_HEADS, HEAD_SIZE)).transpose(1, 2)
        value = attention.v_proj(normed).unflatten(-1, (KV_HEADS, HEAD_SIZE)).transpose(1, 2)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        group = HEADS // KV_HEADS
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        if found is not None and number == POINTING_LAYER:
            if batch.lookups is not None:
                asking, asked_of = query[:, LOOKUP_HEAD, scene:], key[:, LOOKUP_HEAD]
                found.lookups = _pointing(asking, asked_of, mask, batch.lookups.flatten(1))
            if batch.tallies:
                asking, asked_of = query[:, TALLY_HEAD, scene:], key[:, TALLY_HEAD]
                found.tallies = _tallying(asking, asked_of, mask, batch.tallies)
        mixed = F.scaled_dot_product_attention(query[:, :, scene:], key, value, attn_mask=mask)
        if number < len(language.layers) - 1:
            own = F.scaled_dot_product_attention(
                query[:, :, :scene], key[:, :, :scene], value[:, :, :scene], is_causal=True
            )
            mixed = torch.cat([own, mixed], dim=2)
        else:
            hidden = hidden[:, scene:]  # Nothing reads the scene after the last layer's keys.
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    wanted = language.norm(hidden)[batch.targets.flatten(1) != -100]
    return model.lm_head(wanted)


def whole_answers(batch: Batch, logits: Tensor) -> Tensor:
    """`[B, Q]` bool: whether every word of a question's answers is the likeliest, by `answer_logits`."""
    asked = batch.targets != -100
    hit = torch.ones(batch.targets.shape, dtype=torch.bool)
    hit[asked] = logits.argmax(-1) == batch.targets[asked]
    return hit.all(-1)
