"""What each KV head really looked at while an answer was decoded, held against what a prompt says of it.

Runs the model in Transformers, whose attention can be read. A head may be pruned for good if what the
observation window looked at is what the decode steps look at; it has to recall if its target moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hybridkv_quality.sample import Sample
from hybridkv_vllm.plan import PAGE_TOKENS, observation_window
from hybridkv_vllm.policies import PromptScores
from hybridkv_vllm.policies.classify import CLASSIFIERS
from hybridkv_vllm.policies.scoring import pooled_mass

LONGEST_WINDOW = 64
# Probability, of a query's largest, from which a token counts as important (the scoring kernel's).
IMPORTANT = 0.01
TOP_TOKENS = 16
# Transformers' name for the attention that is watched.
WATCHED = "hybridkv_watched"


@dataclass(frozen=True)
class HeadBehaviour:
    """One prompt and its answer, all `[L, H]` fp32; masses are of a decode step's attention, mean over steps.

    Attributes:
        reach: mass on the prompt before the observation window.
        pruned: what of it is lost when the head keeps a share of the prompt by the window's scores.
        best: what of it is lost when each step chooses the same number of tokens for itself.
        overlap: median share of a step's 16 heaviest prompt tokens that are the next step's as well.
        figures: what each classifier says of the prompt.
    """

    reach: Tensor
    pruned: Tensor
    best: Tensor
    overlap: Tensor
    figures: Mapping[str, Tensor]

    @property
    def moving(self) -> Tensor:
        """`[L, H]` fp32: attention that only recalling brings back."""
        return self.pruned - self.best


@torch.no_grad()
def watch_heads(model: Any, processor: Any, sample: Sample, share: float) -> HeadBehaviour:
    """Reads the attention of a sample's prompt and right answer.

    Args:
        model: a Transformers model with PyTorch's own attention (`attn_implementation="sdpa"`).
        processor: its processor.
        sample: from the suite.
        share: of the prompt's tokens that a pruned head keeps, in (0, 1].
    """
    inputs, prompt = _inputs(processor, sample)
    first = max(0, prompt - LONGEST_WINDOW)
    with _watching(model, first) as layers:
        model(**inputs.to(model.device), use_cache=False, logits_to_keep=1)
    weights = torch.stack(layers)  # [L, H, group, queries from `first`, keys]
    visual = torch.tensor([model.config.image_token_id, model.config.video_token_id])
    # On the host, where the attention is: `to` moved the inputs themselves.
    is_visual = torch.isin(inputs["input_ids"][0, :prompt].cpu(), visual)
    scores = _scores(weights[..., : prompt - first, :prompt], is_visual)
    steps = weights[..., prompt - first :, :prompt].mean(2)  # [L, H, n, T]
    past = min(scores.past, scores.compressible)
    before = steps[..., :past]
    keep = min(max(1, round(share * prompt) - scores.window), past)
    chosen = pooled_mass(scores)[..., :past].topk(keep, dim=-1).indices
    kept = before.gather(-1, chosen.unsqueeze(2).expand(-1, -1, before.shape[2], -1)).sum(-1)
    ideal = before.topk(keep, dim=-1).values.sum(-1)
    whole = before.sum(-1)
    return HeadBehaviour(
        reach=whole.mean(-1),
        pruned=(whole - kept).mean(-1),
        best=(whole - ideal).mean(-1),
        overlap=_overlap(before),
        figures={name: figure(scores) for name, figure in CLASSIFIERS.items()},
    )


def mean_behaviour(seen: Sequence[HeadBehaviour]) -> HeadBehaviour:
    """The mean over prompts."""

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).mean(0)

    return HeadBehaviour(
        reach=mean([one.reach for one in seen]),
        pruned=mean([one.pruned for one in seen]),
        best=mean([one.best for one in seen]),
        overlap=mean([one.overlap for one in seen]),
        figures={name: mean([one.figures[name] for one in seen]) for name in CLASSIFIERS},
    )


def _inputs(processor: Any, sample: Sample) -> tuple[Any, int]:
    """Model inputs of prompt and answer, and the prompt's length."""
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
                for part in message.parts
            ],
        }
        for message in sample.messages
    ]
    pictures = [part for message in sample.messages for part in message.parts if not isinstance(part, str)]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    arguments: dict[str, Any] = {"return_tensors": "pt"} | ({"images": pictures} if pictures else {})
    prompt = processor(text=[text], **arguments)["input_ids"].shape[1]
    return processor(text=[f"{text} {sample.answer}"], **arguments), prompt


@contextmanager
def _watching(model: Any, first: int) -> Iterator[list[Tensor]]:
    """Collects each layer's attention `[H, group, queries, keys]` fp32 of the queries from `first` on."""
    seen: list[Tensor] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        grouped = query[0, :, first:].unflatten(0, (key.shape[1], -1)).float() * options["scaling"]
        logits = grouped @ key[0].float().transpose(-1, -2).unsqueeze(1)
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(first + 1)
        seen.append(logits.masked_fill(later, -torch.inf).softmax(-1).cpu())
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(WATCHED, attend)
    AttentionMaskInterface.register(WATCHED, sdpa_mask)
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": WATCHED})
    try:
        yield seen
    finally:
        model.set_attn_implementation({"text_config": before})


def _scores(rows: Tensor, is_visual: Tensor) -> PromptScores:
    """Scores as a worker has them, of a prompt's last queries `[L, H, group, queries, T]`."""
    prompt = rows.shape[-1]
    edges = torch.diff(
        is_visual.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32)
    )
    spans = list(
        zip(
            (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True
        )
    )
    window = observation_window(prompt, spans, LONGEST_WINDOW)
    rows = rows[..., -window:, :]
    important = rows >= IMPORTANT * rows.amax(-1, keepdim=True)
    return PromptScores(
        mass=rows.mean((2, 3)),
        votes=important.float().sum((2, 3)),
        is_visual=is_visual,
        window=window,
        group=rows.shape[2],
        compressible=prompt // PAGE_TOKENS * PAGE_TOKENS,
    )


def _overlap(before: Tensor) -> Tensor:
    """Median over steps of the share of the 16 heaviest tokens that stay."""
    top = before.topk(min(TOP_TOKENS, before.shape[-1]), dim=-1).indices
    member = torch.zeros_like(before, dtype=torch.bool).scatter(-1, top, True)
    shared = (member[:, :, 1:] & member[:, :, :-1]).sum(-1) / top.shape[-1]
    return shared.median(-1).values
