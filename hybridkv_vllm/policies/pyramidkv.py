"""PyramidKV: budgets that shrink from layer to layer, tokens as SnapKV chooses them."""

from __future__ import annotations

from typing import ClassVar

import torch

from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.budget import floor_pages, share_by_weight
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, Verdict
from hybridkv_vllm.policies.select import keep_voted

# The last layer gets one in so many of an equal share.
BETA = 20


class PyramidKV(Policy):
    """PyramidKV (Cai et al. 2024, arXiv 2406.02069): lower layers, whose attention is broad, keep more.

    The paper's: every head keeps the observation window; beside it, budgets fall from layer to layer by equal
    steps, down to 1/20 of their mean in the last layer (the authors' beta = 20); where the first layer would
    get more than the prompt, it gets the prompt, and the slope is less so that the mean is kept; all heads of
    a layer keep as much, by SnapKV's choice of tokens. Ours: what `SnapKV` says of tokens; the layers are
    those of this rank, so with pipeline parallelism each rank has a pyramid of its own; whole pages, so that
    up to H - 1 stay unused, the window rounded up to them, and one for every head where there are as many.
    """

    name: ClassVar[str] = "pyramidkv"

    def select(
        self,
        scores: PromptScores,
        verdict: Verdict,
        pages: int,
        options: PolicyOptions,
        recall: Recall | None = None,
    ) -> Selection:
        layers, heads = scores.mass.shape[:2]
        for_each = min(pages // heads, layers * scores.capacity)
        floor = floor_pages(for_each, layers, scores.window_in_arena, percent=0)
        # In units of 1 / (BETA * layers) pages: the mean beside the floor, and the first layer's, the most.
        mean = BETA * (for_each - layers * floor)
        first = min((2 * BETA - 1) * mean // BETA, BETA * layers * (scores.capacity - floor))
        layer = torch.arange(layers, device=scores.mass.device)
        # With one layer there are no steps.
        weight = (first * (layers - 1) - 2 * (first - mean) * layer).clamp(min=1)
        layer_pages = share_by_weight(
            weight, pages=for_each, members=layers, floor=floor, capacity=scores.capacity
        )
        return keep_voted(layer_pages.unsqueeze(-1).expand(layers, heads), scores, verdict)
