"""The HybridKV policy: budgets by head type and sparsity, text before visual tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.budget import allocate_pages
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, StaticWeight, Verdict
from hybridkv_vllm.policies.select import fill_pages, settle_recall, text_first, window_first


class HybridKV(Policy):
    """HybridKV (Zeng et al., ACL 2026): classify, allocate top-down, prune text-prior or recall chunks.

    Static heads are pruned for good. Dynamic heads whose chunks found room in a tier, as many as the arena
    holds and the most dynamic first, share the type-level budget of dynamic heads, landmarks included, and
    start with the chunks that the observation window looks at; the others are allocated as static ones and
    pruned by votes: text first would leave a head that looks at pictures nothing of them. What is the paper's
    and what is our reading is said in `scoring`, `classify`, `budget` and `select`.
    """

    name: ClassVar[str] = "hybridkv"
    recalls: ClassVar[bool] = True

    def may_recall(self, has_visual: bool, options: PolicyOptions) -> bool:
        # The text mass of a prompt of text alone is 1, which no theta is above.
        return has_visual or (self.classifier or options.classifier) != "text_mass"

    def least_pages(self, recall: Recall) -> int:
        """Pages of a head that recalls which r must not undercut."""
        return recall.least_pages

    def _sparsity_for(self, weight: StaticWeight, sparsity: Tensor) -> Tensor:
        """What stands for S, of which the allocation weighs static heads by 1 - S."""
        if weight == "dense":
            return sparsity
        return 1 - sparsity if weight == "sparse" else torch.zeros_like(sparsity)

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
            self._sparsity_for(options.static_weight, verdict.sparsity),
            settled.heads,
            pages=pages,
            capacity=scores.capacity,
            window=scores.window_in_arena,
            dynamic_share=options.dynamic_share,
            dynamic_least=self.least_pages(settled),
        )
        # Bytes: they are as many as the scores.
        by_vote, text_prior = window_first(scores).to(torch.int8), text_first(scores).to(torch.int8)
        priority = torch.where(verdict.dynamic.unsqueeze(-1), by_vote, text_prior)
        return fill_pages(head_pages, priority, scores, verdict, settled)
