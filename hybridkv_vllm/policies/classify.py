"""Classifiers that call each KV head static or dynamic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Verdict
from hybridkv_vllm.policies.scoring import sparsity, visual_mass

TOP_SHARE = 10
# The classifier that does not look at the prompt.
PROFILE = "profile"


def text_mass(scores: PromptScores) -> Tensor:
    """Attention mass that the window puts on text tokens, its own included; `[L, H]` fp32 in [0, 1].

    Our reading of the paper's "text-centric" attention: a head that looks at the picture keeps its choice.
    Counted as what the visual tokens leave of 1, so that it is exactly 1 for a prompt of text alone.
    """
    return (1 - visual_mass(scores)).clamp(min=0).float()


def top_mass(scores: PromptScores) -> Tensor:
    """Attention mass of the tenth of tokens (rounded up) with the most of it; `[L, H]` fp32 in [0, 1].

    A reading of the paper's sparsity threshold as concentration of mass.
    """
    most = -(-scores.tokens // TOP_SHARE)
    return scores.mass.topk(most, dim=-1, sorted=False).values.sum(-1, dtype=torch.float64).float()


def union(scores: PromptScores) -> Tensor:
    """One minus the share of prompt tokens that matter to any query of the window; `[L, H]` fp32 in [0, 1].

    Unlike `sparsity` it is low for a sharp head whose queries each look elsewhere: few distinct important
    tokens mean static. Ours.
    """
    return 1 - (scores.votes > 0).float().mean(-1)


CLASSIFIERS: Mapping[str, Callable[[PromptScores], Tensor]] = MappingProxyType(
    {"sparsity": sparsity, "text_mass": text_mass, "top_mass": top_mass, "union": union}
)


def classify(scores: PromptScores, options: PolicyOptions) -> Verdict:
    """Calls each KV head dynamic or static (paper: online, per prompt, static at a figure of theta or more).

    A head whose figure is not a number is dynamic, unless theta is 0.

    Raises:
        ValueError: unknown classifier; the message lists the known ones.
    """
    figure = torch.nan_to_num(_figure(scores, options))
    return Verdict(dynamic=figure < options.theta, figure=figure, sparsity=sparsity(scores))


def _figure(scores: PromptScores, options: PolicyOptions) -> Tensor:
    """`[L, H]` fp32, what is held against theta."""
    if options.classifier == PROFILE and options.profile is not None:
        return options.profile
    if options.classifier not in CLASSIFIERS:
        known = ", ".join(sorted(CLASSIFIERS))
        raise ValueError(f"unknown classifier {options.classifier!r}: choose one of {known}")
    return CLASSIFIERS[options.classifier](scores)
