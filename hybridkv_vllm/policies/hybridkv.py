"""The HybridKV policy: budgets by head type and sparsity, text before visual tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from hybridkv_vllm.policies.base import Policy, PolicyOptions, PromptScores, Selection
from hybridkv_vllm.policies.budget import allocate_pages
from hybridkv_vllm.policies.classify import classify
from hybridkv_vllm.policies.scoring import pooled_mass
from hybridkv_vllm.policies.select import keep_best, kept_lengths, make_selection, text_first


class HybridKV(Policy):
    """HybridKV (Zeng et al., ACL 2026): classify, allocate top-down, prune text-prior.

    With `dynamic_tier` off every KV head is allocated and pruned as a static one; the verdict is only
    reported. Otherwise the type-level split applies, and what `keep` says of a dynamic head is the text-prior
    choice that fills its extent until chunks are recalled into it. What is the paper's and what is our
    reading is said in `scoring`, `classify` and `budget`.
    """

    name: ClassVar[str] = "hybridkv"

    def select(self, scores: PromptScores, pages: int, options: PolicyOptions) -> Selection:
        verdict = classify(scores, options)
        pruned = options.dynamic_tier == "off"
        head_pages = allocate_pages(
            verdict.sparsity,
            torch.zeros_like(verdict.dynamic) if pruned else verdict.dynamic,
            pages=pages,
            capacity=scores.capacity,
            window=scores.window_in_arena,
            dynamic_share=options.dynamic_share,
        )
        keep = keep_best(pooled_mass(scores), text_first(scores), kept_lengths(head_pages, scores))
        return make_selection(keep, verdict)
