"""Ada-KV: each layer's budget goes to the heads whose tokens score best."""

from __future__ import annotations

from typing import ClassVar

from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.budget import floor_pages, share_by_weight, share_evenly
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, Verdict
from hybridkv_vllm.policies.scoring import pooled_mass
from hybridkv_vllm.policies.select import keep_best, keep_voted, window_first

# The safeguard, in percent of an equal share.
ALPHA = 20


class AdaKV(Policy):
    """Ada-KV (Feng et al. 2024, arXiv 2407.11550) over SnapKV: heads of a layer compete with their tokens.

    The paper's: layers keep as much as each other; within one, the best tokens are found among those of all
    heads together, and beside the observation window a head's budget follows how many of them are its own,
    but for a safeguard of 0.2 of an equal share (the authors' alpha); each head then keeps its own best
    tokens, as SnapKV chooses them. Ours: what `SnapKV` says of tokens; whole pages, window and safeguard
    rounded up to them, and one for every head where there are as many; what a head cannot use goes to the
    layer's others, and pages that layers cannot share evenly to the first ones; the heads of one rank
    compete.
    """

    name: ClassVar[str] = "adakv"

    def select(
        self,
        scores: PromptScores,
        verdict: Verdict,
        pages: int,
        options: PolicyOptions,
        recall: Recall | None = None,
    ) -> Selection:
        layers, heads = scores.mass.shape[:2]
        window = scores.window_in_arena
        given = min(pages, scores.heads * scores.capacity)
        layer_pages = share_evenly(given, layers, scores.mass.device).unsqueeze(-1)
        # Tokens of a layer's heads alternate, so that ties do not all go to one head.
        score = pooled_mass(scores).transpose(1, 2).flatten(1).unsqueeze(1)
        priority = window_first(scores).unsqueeze(-1).expand(-1, heads).flatten()
        best = keep_best(score, priority, PAGE_TOKENS * layer_pages).view(layers, -1, heads)
        weight = (best.sum(1) - window).clamp(min=1)
        floor = floor_pages(given // layers, heads, window, ALPHA)
        head_pages = share_by_weight(
            weight, pages=layer_pages, members=heads, floor=floor, capacity=scores.capacity
        )
        return keep_voted(head_pages, scores, verdict)
