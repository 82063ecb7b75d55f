"""The plan of a prompt: its window, its arena, and where prefill chunks may end."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hybridkv_kernels import PAGE
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_vllm.plan import PAGE_TOKENS, Tier, arena_blocks, make_plan, observation_window


def test_a_page_is_what_the_kernels_take_for_one() -> None:
    assert PAGE_TOKENS == PAGE


@pytest.mark.parametrize(
    ("num_tokens", "spans", "window"),
    [
        (1000, [], 64),  # Text only: all tokens are text queries.
        (1000, [(10, 900)], 64),
        (1000, [(10, 980)], 20),  # Only the text after the picture.
        (1000, [(10, 200), (300, 990)], 10),
        (1000, [(10, 1000)], 32),  # Nothing follows the picture.
        (1000, [(10, 980), (990, 1000)], 10),  # ... and never two pictures in one window.
        (20, [], 20),
        (1, [], 1),
    ],
)
def test_observation_window(num_tokens: int, spans: list[tuple[int, int]], window: int) -> None:
    assert observation_window(num_tokens, spans, 64) == window


def test_a_shorter_window_option_holds_after_a_picture_too() -> None:
    assert observation_window(1000, [(10, 1000)], 16) == 16


@given(budget=st.integers(1, 1000).map(lambda n: Fraction(n, 1000)), num_tokens=st.integers(1, 200_000))
def test_arena_is_the_rounded_up_share(budget: Fraction, num_tokens: int) -> None:
    assert arena_blocks(float(budget), num_tokens) == math.ceil(budget * num_tokens / 16)


@given(
    num_tokens=st.integers(16, 600),
    longest_window=st.integers(2, 64),
    outputs=st.integers(0, 40),
    steps=st.lists(st.integers(1, 200), min_size=1, max_size=50),
    tier=st.sampled_from(["off", "host", "gpu"]),
)
def test_chunks_keep_the_window_whole_and_stop_at_the_prompts_end(
    num_tokens: int, longest_window: int, outputs: int, steps: list[int], tier: Tier
) -> None:
    """Whatever a step has room for: the last prompt chunk holds the window and ends exactly at T.

    Generated tokens come back one at a time where heads recall.
    """
    plan = make_plan(num_tokens, (), 0.25, longest_window, tier)
    position, total = 0, num_tokens + outputs
    boundaries = []
    # A step with room for the window comes sooner or later: the server checks that at its start.
    for room in [*steps, *[max(64, room) for room in steps], *[64] * 80]:
        length = plan.clip_chunk(position, min(room, total - position))
        assert 0 <= length <= room
        assert length <= 1 or position < num_tokens or not plan.recalls
        position += length
        boundaries.append(position)
        if position == total:
            break
    assert position == total
    assert num_tokens in boundaries
    last_start = max([0, *[b for b in boundaries if b < num_tokens]])
    assert num_tokens - last_start >= max(plan.window, 2)


def test_the_last_chunk_is_never_a_single_token() -> None:
    """As after a picture that one token of text follows: a decode's step would score nothing."""
    plan = make_plan(160, ((10, 159),), 0.25, 64)
    assert plan.window == 1
    assert plan.last_chunk_start == plan.clip_chunk(0, 159) == 158


@given(num_tokens=st.integers(16, 600), budget=st.sampled_from([0.1, 0.5, 0.97, 1.0]))
def test_an_arena_that_holds_everything_leaves_nothing_to_recall(num_tokens: int, budget: float) -> None:
    plan = make_plan(num_tokens, (), budget, 64, "gpu")
    assert plan.recalls == plan.keeps_prompt_blocks == (plan.arena_size < num_tokens // 16)
    host = make_plan(num_tokens, (), budget, 64, "host")
    assert host.recalls == plan.recalls
    assert not host.keeps_prompt_blocks
