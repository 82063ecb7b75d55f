"""Turns each KV head's page count into the set of tokens it keeps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.policies.budget import heads_that_fit
from hybridkv_vllm.policies.data import PromptScores, Recall, Selection, Verdict
from hybridkv_vllm.policies.scoring import pooled_mass

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
        priority: `[T']` or `[L, H, T']` integer in {0, 1, 2}, the larger first.
        lengths: `[L, H]` integer in [0, T'], tokens to keep.

    Returns:
        `[L, H, T']` bool with exactly `lengths` set in each row.
    """
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    # Sorting takes eight times the scores' own memory, which vLLM has not set aside: a few layers at a time.
    layers = max(1, SORT_ELEMENTS // max(1, score[0].numel()))
    for part in range(0, score.shape[0], layers):
        rows = slice(part, part + layers)
        of_heads = priority if priority.ndim == 1 else priority[rows]
        keep[rows] = _keep_best(score[rows], of_heads.long(), lengths[rows])
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


def keep_chunks(score: Tensor, hot: Tensor) -> Tensor:
    """Keeps each KV head's best chunks of 16 tokens: by the sum of their scores, then the lower chunk.

    Args:
        score: `[L, H, T']` fp32, not negative, T' a multiple of 16; a chunk with NaN counts as the largest.
        hot: `[L, H]` integer in [0, T' / 16], chunks to keep.

    Returns:
        `[L, H, T']` bool with exactly `16 * hot` set in each row.
    """
    # In fp64, because the order of adding must not show.
    chunks = score.unflatten(-1, (-1, PAGE_TOKENS)).sum(-1, dtype=torch.float64).float()
    alike = torch.zeros(chunks.shape[-1], dtype=torch.int64, device=score.device)
    return keep_best(chunks, alike, hot).unsqueeze(-1).expand(-1, -1, -1, PAGE_TOKENS).flatten(-2)


def kept_lengths(head_pages: Tensor, scores: PromptScores) -> Tensor:
    """Tokens that `head_pages` `[L, H]` pages hold, at most T'; same shape and dtype."""
    return (head_pages * PAGE_TOKENS).clamp(max=scores.compressible)


def keep_voted(head_pages: Tensor, scores: PromptScores, verdict: Verdict) -> Selection:
    """Fills `head_pages` `[L, H]` as SnapKV would: the observation window, then the best-voted tokens."""
    keep = keep_best(pooled_mass(scores), window_first(scores), kept_lengths(head_pages, scores))
    return make_selection(keep, verdict)


def no_recall(verdict: Verdict) -> Recall:
    """What stands for a recall of no head."""
    return Recall(heads=torch.zeros_like(verdict.dynamic), landmark_pages=0, least_pages=1, most_heads=0)


def settle_recall(recall: Recall | None, verdict: Verdict, scores: PromptScores, pages: int) -> Recall:
    """The recall that takes place: of the most dynamic heads, and of none where `pages` hold everything.

    Those of the dynamic heads in the tier recall whose figures are the lowest, `most_heads` at most, ties to
    the first.

    Raises:
        ValueError: `pages` that do not hold the landmarks and a chunk for `most_heads`.
    """
    if recall is None or pages >= scores.heads * scores.capacity:
        return no_recall(verdict)
    most = min(recall.most_heads, scores.heads)
    if most > heads_that_fit(pages, scores.heads, recall.landmark_pages + 1, scores.window_in_arena):
        raise ValueError(
            f"{recall.landmark_pages} landmark pages and a chunk for each of {most} heads "
            f"do not fit in {pages} pages of {scores.heads} heads"
        )
    candidates = recall.heads & verdict.dynamic
    by_figure = verdict.figure.masked_fill(~candidates, torch.inf).flatten().argsort(stable=True)
    # The inverse of a permutation is its order.
    place = by_figure.argsort().view(candidates.shape)
    return replace(recall, heads=candidates & (place < most))


def fill_pages(
    head_pages: Tensor, priority: Tensor, scores: PromptScores, verdict: Verdict, recall: Recall
) -> Selection:
    """Fills each KV head's pages: with landmarks and the best chunks where it recalls, else the best tokens.

    Chunks are ranked by the observation window's mass without pooling, which could only lift a chunk for what
    lies outside of it; that the first chunks come from the window at all is ours.

    Args:
        head_pages: `[L, H]` int64 in [0, T' / 16]; of a head that recalls, more than its landmarks take.
        priority: `[T']` or `[L, H, T']` integer in {0, 1, 2}, which tokens pruned heads keep first.
        recall: as `settle_recall` returns it.
    """
    lengths = kept_lengths(head_pages, scores).masked_fill(recall.heads, 0)
    hot = (head_pages - recall.landmark_pages).masked_fill(~recall.heads, 0)
    tokens = keep_best(pooled_mass(scores), priority, lengths)
    chunks = keep_chunks(scores.mass[..., : scores.compressible], hot)
    return make_selection(tokens | chunks, verdict, recall)


def make_selection(keep: Tensor, verdict: Verdict, recall: Recall | None = None) -> Selection:
    """Lays out the extents of the tokens in `keep` `[L, H, T']` bool, landmarks of `recall` before them."""
    if recall is None:
        recall = no_recall(verdict)
    lengths = keep.sum(-1, dtype=torch.int32)
    landmarks = recall.heads.int() * recall.landmark_pages
    pages = landmarks + (lengths + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    flat = pages.flatten()
    first_page = (flat.cumsum(0, dtype=torch.int32) - flat).view(lengths.shape) + landmarks
    return Selection(
        keep=keep,
        lengths=lengths,
        first_page=first_page,
        pages=pages,
        recalled=recall.heads,
        dynamic=verdict.dynamic,
        figure=verdict.figure,
        sparsity=verdict.sparsity,
    )
