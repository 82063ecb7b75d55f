"""Turns each KV head's page count into the set of tokens it keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.policies.base import PromptScores, Selection
from hybridkv_vllm.policies.classify import Verdict

POSITION_BITS = 30
SCORE_BITS = 31
# Tokens of all KV heads that are sorted at once.
SORT_ELEMENTS = 1 << 22


def window_first(scores: PromptScores) -> Tensor:
    """`[T']` int64 priority: 1 for tokens of the observation window, 0 for the others."""
    position = torch.arange(scores.compressible, device=scores.mass.device)
    return (position >= scores.past).long()


def text_first(scores: PromptScores) -> Tensor:
    """`[T']` int64 priority of text-prior pruning: 2 for the observation window, 1 for text, 0 for visual."""
    is_text = ~scores.is_visual[: scores.compressible]
    return is_text.long().masked_fill(window_first(scores) == 1, 2)


def keep_best(score: Tensor, priority: Tensor, lengths: Tensor) -> Tensor:
    """Keeps each KV head's best tokens: by priority, then by score, then the lower position.

    Args:
        score: `[L, H, T']` fp32, not negative; NaN counts as the largest.
        priority: `[T']` int64 in {0, 1, 2}, the larger first.
        lengths: `[L, H]` integer in [0, T'], tokens to keep.

    Returns:
        `[L, H, T']` bool with exactly `lengths` set in each row.
    """
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    # Sorting takes eight times the scores' own memory, which vLLM has not set aside: a few layers at a time.
    layers = max(1, SORT_ELEMENTS // max(1, score[0].numel()))
    for part in range(0, score.shape[0], layers):
        rows = slice(part, part + layers)
        keep[rows] = _keep_best(score[rows], priority, lengths[rows])
    return keep


def _keep_best(score: Tensor, priority: Tensor, lengths: Tensor) -> Tensor:
    """`keep_best` of some layers."""
    tokens = score.shape[-1]
    # One integer key holds all three without loss: the bits of floats that are not negative order as they do.
    # No two keys of a row are equal, so a threshold keeps an exact number.
    bits = score.contiguous().view(torch.int32).long() & ((1 << SCORE_BITS) - 1)
    backwards = torch.arange(tokens - 1, -1, -1, device=score.device)
    key = (bits << POSITION_BITS) + ((priority << (SCORE_BITS + POSITION_BITS)) + backwards)
    last_kept = (lengths.long() - 1).clamp(min=0).unsqueeze(-1)
    threshold = key.sort(dim=-1, descending=True).values.gather(-1, last_kept)
    return (key >= threshold) & (lengths > 0).unsqueeze(-1)


def kept_lengths(head_pages: Tensor, scores: PromptScores) -> Tensor:
    """Tokens that `head_pages` `[L, H]` pages hold, at most T'; same shape and dtype."""
    return (head_pages * PAGE_TOKENS).clamp(max=scores.compressible)


def make_selection(keep: Tensor, verdict: Verdict) -> Selection:
    """Lays out the extents of the tokens in `keep` `[L, H, T']` bool, and reports the verdict beside them."""
    lengths = keep.sum(-1, dtype=torch.int32)
    pages = (lengths + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    flat = pages.flatten()
    first_page = (flat.cumsum(0, dtype=torch.int32) - flat).view(lengths.shape)
    return Selection(
        keep=keep,
        lengths=lengths,
        first_page=first_page,
        dynamic=verdict.dynamic,
        figure=verdict.figure,
        sparsity=verdict.sparsity,
    )
