"""StreamingLLM: the prompt's first tokens and its last ones, whatever they say."""

from __future__ import annotations

from typing import ClassVar

import torch

from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, Verdict
from hybridkv_vllm.policies.select import make_selection

SINKS = 4


class StreamingLLM(Policy):
    """StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): attention sinks and the most recent tokens.

    The paper's: every head keeps the first 4 tokens, on which attention settles that has nowhere else to go,
    and the latest ones. Ours: keys keep the positions of the prompt, where the paper counts them anew within
    the cache (it aims at endless streams, we at long prompts); nothing is pushed out while decoding; a budget
    that is a share of the prompt in whole pages, so that up to L * H - 1 pages stay unused; the prompt's last
    partial block, which is never compressed, comes on top.
    """

    name: ClassVar[str] = "streamingllm"

    def select(
        self,
        scores: PromptScores,
        verdict: Verdict,
        pages: int,
        options: PolicyOptions,
        recall: Recall | None = None,
    ) -> Selection:
        length = min(pages // scores.heads, scores.capacity) * PAGE_TOKENS
        sinks = min(SINKS, length)
        position = torch.arange(scores.compressible, device=scores.mass.device)
        keep = (position < sinks) | (position >= scores.compressible - (length - sinks))
        return make_selection(keep.expand(*scores.mass.shape[:2], -1), verdict)
