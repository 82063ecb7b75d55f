"""Quest: every head keeps everything elsewhere and recalls chunks by their bounds, to compare with."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from hybridkv_kernels.recall.layout import LandmarkKind

from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.budget import allocate_pages
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, Verdict
from hybridkv_vllm.policies.select import fill_pages, settle_recall, window_first


class Quest(Policy):
    """Quest (Tang et al. 2024, arXiv 2406.10774): each step attends to the pages its query may need.

    The paper's: pages of 16 tokens, for each the least and the largest value of every key dimension; a page's
    score is the largest product with the query that these bounds allow; each step attends to the pages with
    the highest scores. There all KV stays on the GPU, each head chooses on its own, and the first two layers
    stay dense. Ours: one choice per KV head, for its whole query group; every layer recalls; the bounds come
    out of the same budget as the chunks, and all heads share it evenly; the observation window says which
    chunks are hot at first. Where the arena does not hold every head's bounds and a handful of chunks, the
    heads with the classifier's lowest figures recall and get that much. Those that do not, or found no room
    in the tier, share the rest and are pruned as `SnapKV` would: the window, then its best-voted tokens.
    """

    name: ClassVar[str] = "quest"
    recalls: ClassVar[bool] = True
    landmark: ClassVar[LandmarkKind | None] = "minmax"

    def classify(self, scores: PromptScores, options: PolicyOptions) -> Verdict:
        verdict = super().classify(scores, options)
        return replace(verdict, dynamic=torch.ones_like(verdict.dynamic))

    def select(
        self,
        scores: PromptScores,
        verdict: Verdict,
        pages: int,
        options: PolicyOptions,
        recall: Recall | None = None,
    ) -> Selection:
        settled = settle_recall(recall, verdict, scores, pages)
        head_pages = allocate_pages(
            torch.zeros_like(verdict.sparsity),
            settled.heads,
            pages=pages,
            capacity=scores.capacity,
            window=scores.window_in_arena,
            dynamic_share=1.0,
            dynamic_least=settled.least_pages,
        )
        return fill_pages(head_pages, window_first(scores), scores, verdict, settled)
