"""LOOK-M without merging: recent tokens, then text before visual ones."""

from __future__ import annotations

from typing import ClassVar

import torch

from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, Verdict
from hybridkv_vllm.policies.select import keep_best, make_selection


class LookM(Policy):
    """LOOK-M (Wan et al. 2024, arXiv 2406.18139) without merging: the prompt's end, then text, then visual.

    The paper's: every head keeps as much, half of it (the default of the authors' code) recent tokens and
    half important ones: by the attention they gathered, text before visual. Then what is dropped is merged
    into the nearest of what is kept; that changes keys and values, so it is no selection and is missing here,
    though the paper owes some of its quality to it. Ours: attention gathered over the observation window
    rather than all of the prompt's queries; one choice per KV head, from the mean over its query group; a
    budget that is a share of the prompt in whole pages, so that up to L * H - 1 pages stay unused; recent
    tokens are counted from the end of what is compressed.
    """

    name: ClassVar[str] = "lookm"

    def select(
        self,
        scores: PromptScores,
        verdict: Verdict,
        pages: int,
        options: PolicyOptions,
        recall: Recall | None = None,
    ) -> Selection:
        length = min(pages // scores.heads, scores.capacity) * PAGE_TOKENS
        tokens, device = scores.compressible, scores.mass.device
        recent = torch.arange(tokens, device=device) >= tokens - length // 2
        priority = (~scores.is_visual[:tokens]).long().masked_fill(recent, 2)
        lengths = torch.full(scores.mass.shape[:2], length, dtype=torch.int64, device=device)
        return make_selection(keep_best(scores.mass[..., :tokens], priority, lengths), verdict)
