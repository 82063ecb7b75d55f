"""The policy that keeps everything, to compare the others with."""

from __future__ import annotations

from typing import ClassVar

import torch

from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, Verdict
from hybridkv_vllm.policies.select import make_selection


class Full(Policy):
    """Keeps every token of every KV head, whatever budget was asked for."""

    name: ClassVar[str] = "full"

    def budget_share(self, requested: float) -> float:
        return 1.0

    def select(
        self,
        scores: PromptScores,
        verdict: Verdict,
        pages: int,
        options: PolicyOptions,
        recall: Recall | None = None,
    ) -> Selection:
        needed = scores.heads * scores.capacity
        if pages < needed:
            raise ValueError(f"policy 'full' needs {needed} pages for this prompt, got {pages}")
        keep = torch.ones_like(scores.mass[..., : scores.compressible], dtype=torch.bool)
        return make_selection(keep, verdict)
