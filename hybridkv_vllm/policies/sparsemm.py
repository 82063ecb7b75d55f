"""SparseMM-like: heads that look at pictures keep more, as this prompt shows rather than a calibration."""

from __future__ import annotations

from typing import ClassVar

import torch

from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.budget import WEIGHT_ONE, floor_pages, share_by_weight
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, Verdict
from hybridkv_vllm.policies.scoring import visual_mass
from hybridkv_vllm.policies.select import keep_voted

# What all heads share evenly beside the window, in percent.
RHO = 10


class SparseMM(Policy):
    """SparseMM (Wang et al. 2025, arXiv 2506.05344) without its calibration, so SparseMM-like only.

    The paper's: every head keeps a local window and an even share, 0.1, of what the windows leave; the rest
    goes to the heads of all layers by their visual scores; each keeps its best tokens as SnapKV chooses them.
    There a head's visual score is measured once for a model, offline: how often, while the model reads text
    out of pictures, the head looks at the place that is being read. Ours instead: the share of the
    observation window's attention that lies on this prompt's visual tokens. That says that a head looks at
    pictures, not that it looks at the right place. Without visual tokens all heads share evenly. Also ours:
    what `SnapKV` says of tokens; whole pages, floors rounded up to them, and one for every head where there
    are as many; what a head cannot use goes to the others; the heads of one rank compete.
    """

    name: ClassVar[str] = "sparsemm"

    def select(
        self,
        scores: PromptScores,
        verdict: Verdict,
        pages: int,
        options: PolicyOptions,
        recall: Recall | None = None,
    ) -> Selection:
        given = min(pages, scores.heads * scores.capacity)
        # Through fp32, because the order of adding must not show.
        visual = torch.nan_to_num(visual_mass(scores).float()).double().clamp(0, 1)
        head_pages = share_by_weight(
            (visual * WEIGHT_ONE).long().flatten().clamp(min=1),
            pages=given,
            members=scores.heads,
            floor=floor_pages(given, scores.heads, scores.window_in_arena, RHO),
            capacity=scores.capacity,
        )
        return keep_voted(head_pages.view(scores.mass.shape[:2]), scores, verdict)
