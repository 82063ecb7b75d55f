"""What is decided about a prompt before its prefill ends, in numbers that scheduler and workers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PAGE_TOKENS = 16
# Observation window where no text follows the last visual token.
FALLBACK_WINDOW = 32
# A last chunk of one token would run as a decode, where nothing is scored.
MIN_LAST_CHUNK = 2

Span = tuple[int, int]
Tier = Literal["host", "gpu", "off"]


def observation_window(num_tokens: int, visual_spans: Sequence[Span], longest: int) -> int:
    """Number of queries, at the prompt's end, whose attention decides what is kept.

    The text after the last visual token, at most `longest`; where none follows, the last 32 tokens, but
    none before the last visual item's start, so that at most one item lies in the window.

    Args:
        num_tokens: prompt length in tokens, at least 1.
        visual_spans: `(start, end)` of visual tokens, end exclusive, in ascending order.
        longest: the server's `window` option.
    """
    last_start, last_end = visual_spans[-1] if visual_spans else (0, 0)
    text_after = num_tokens - last_end
    if text_after > 0:
        return min(text_after, longest)
    return max(1, min(FALLBACK_WINDOW, longest, num_tokens - last_start))


def ceil_pages(num_tokens: int) -> int:
    """Blocks (or pages) that hold `num_tokens`."""
    return -(-num_tokens // PAGE_TOKENS)


def arena_blocks(budget: float, num_tokens: int) -> int:
    """Blocks of an arena: `ceil(budget * T / 16)`, at least one (rounded first: 0.07 * 1600 / 16 is 7)."""
    return max(1, math.ceil(round(budget * num_tokens / PAGE_TOKENS, 9)))


@dataclass(frozen=True)
class PromptPlan:
    """How one request's prompt will be compressed.

    Attributes:
        num_tokens: T, prompt length.
        window: W, queries of the observation window.
        arena_size: A, blocks of the arena.
        visual_spans: `(start, end)` of visual tokens, end exclusive.
        tier: where heads that recall keep their chunks; `off` where none will.
    """

    num_tokens: int
    window: int
    arena_size: int
    visual_spans: tuple[Span, ...]
    tier: Tier = "off"

    @property
    def recalls(self) -> bool:
        """Whether heads may recall chunks of this prompt while decoding."""
        return self.tier != "off"

    @property
    def keeps_prompt_blocks(self) -> bool:
        """Whether the prompt's blocks stay with the request: chunks are recalled from there."""
        return self.tier == "gpu"

    @property
    def num_full_blocks(self) -> int:
        """Prompt blocks that the arena replaces; the partial block stays in the tail."""
        return self.num_tokens // PAGE_TOKENS

    @property
    def window_in_arena(self) -> int:
        """Window tokens in full blocks; those in the partial block stay in the tail."""
        return max(0, self.window - self.num_tokens % PAGE_TOKENS)

    @property
    def last_chunk_start(self) -> int:
        """Latest position at which the last prefill chunk may start: the window must be whole."""
        return max(0, self.num_tokens - max(self.window, MIN_LAST_CHUNK))

    def clip_chunk(self, start: int, length: int) -> int:
        """Length of the prefill chunk at `start`, cut so that it ends neither in the window nor past T.

        Zero asks the scheduler to wait for a step with room for the whole window. Past T lie the generated
        tokens of a preempted request. Where heads recall, each chose its chunks when it was new, so each is
        computed in a step of its own again.
        """
        if start >= self.num_tokens:
            return min(length, 1) if self.recalls else length
        if start + length >= self.num_tokens:
            return self.num_tokens - start
        return min(length, max(0, self.last_chunk_start - start))


@dataclass(frozen=True)
class ArenaGrant:
    """A plan with its reserved blocks, as the scheduler sends it on the step that ends the prefill."""

    request_id: str
    plan: PromptPlan
    block_ids: tuple[int, ...]


def make_plan(
    num_tokens: int, visual_spans: Sequence[Span], budget: float, longest_window: int, tier: Tier = "off"
) -> PromptPlan:
    """Plans the compression of a prompt of at least one full block.

    An arena that holds the whole prompt leaves nothing to recall, whatever the tier.
    """
    arena_size = arena_blocks(budget, num_tokens)
    return PromptPlan(
        num_tokens=num_tokens,
        window=observation_window(num_tokens, visual_spans, longest_window),
        arena_size=arena_size,
        visual_spans=tuple(visual_spans),
        tier=tier if arena_size < num_tokens // PAGE_TOKENS else "off",
    )
