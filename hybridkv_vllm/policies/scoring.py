"""Figures that policies derive from the observation window's attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridkv_vllm.policies.data import PromptScores

POOL_WIDTH = 7


def pooled_mass(scores: PromptScores) -> Tensor:
    """Scores the compressible tokens: the largest attention mass of a token and its neighbours, 7 in all.

    The observation window is pooled apart from the tokens before it. Every query attends strongly to its own
    neighbourhood, and that must not lift whatever happens to stand before the window. Pooling follows SnapKV
    (Li et al. 2024); max and width 7 are our reading of HybridKV.

    Returns:
        `[L, H, T']` fp32.
    """
    parts = (scores.mass[..., : scores.past], scores.mass[..., scores.past :])
    pooled = [F.max_pool1d(part, POOL_WIDTH, 1, POOL_WIDTH // 2) for part in parts if part.numel()]
    return torch.cat(pooled, dim=-1)[..., : scores.compressible]


def visual_mass(scores: PromptScores) -> Tensor:
    """Attention mass that the window puts on visual tokens; `[L, H]` fp64 in [0, 1], up to rounding."""
    # In fp64, because the order of adding must not show: a layer is judged alone or with others.
    return (scores.mass * scores.is_visual).sum(-1, dtype=torch.float64)


def sparsity(scores: PromptScores) -> Tensor:
    """Sparsity S of each KV head: the share of causal (query, key) pairs that do not matter.

    `S = 1 - sum_i nnz_i / sum_i (i + 1)` over the observation window's queries i, where nnz_i counts the keys
    whose probability is at least 0.01 of the query's largest, averaged over the query group. With queries
    `T - W .. T - 1` the denominator is `W * T - W * (W - 1) / 2`. The form is VL-Cache's (Tu et al. 2024);
    that HybridKV means this by text-centric sparsity is our reading.

    Returns:
        `[L, H]` fp32 in [0, 1].
    """
    queries = min(scores.window, scores.tokens)
    pairs = queries * scores.tokens - queries * (queries - 1) // 2
    # Counts go past what fp32 adds exactly.
    nnz = scores.votes.sum(-1, dtype=torch.float64) / scores.group
    return torch.nan_to_num(1 - nnz / pairs).clamp(0, 1).float()
