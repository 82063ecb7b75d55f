"""SnapKV: the same length for every head, tokens by the window's votes."""

from __future__ import annotations

from typing import ClassVar

import torch

from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, Verdict
from hybridkv_vllm.policies.select import keep_voted


class SnapKV(Policy):
    """SnapKV (Li et al. 2024, arXiv 2404.14469): the observation window, then the prompt's best-voted tokens.

    The paper's: each head on its own, attention summed over the window's queries (a mean here, which ranks
    alike), pooled over neighbours in the prompt before the window, the best ones kept beside the window; no
    difference between text and visual tokens. Ours: one choice per KV head, from the mean over its query
    group (the authors' code chooses per query head); max pooling of width 7 (their code's default is a mean
    of 5); the window of `PromptScores`; a budget that is a share of the prompt in whole pages rather than a
    fixed capacity, so that up to L * H - 1 pages stay unused; where the window alone does not fit, its own
    best-voted tokens.
    """

    name: ClassVar[str] = "snapkv"

    def select(
        self,
        scores: PromptScores,
        verdict: Verdict,
        pages: int,
        options: PolicyOptions,
        recall: Recall | None = None,
    ) -> Selection:
        each = pages // scores.heads
        head_pages = torch.full(scores.mass.shape[:2], each, dtype=torch.int64, device=scores.mass.device)
        return keep_voted(head_pages, scores, verdict)
