"""The page allocation against its definition in exact fractions, and its numbers on plain examples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hybridkv_kernels.recall.layout import LandmarkLayout
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import Allocation

from hybridkv_vllm.policies.budget import allocate_pages, heads_that_fit, recall_limits


def allocate(case: Allocation) -> list[int]:
    return allocate_pages(
        torch.tensor([case.sparsity]),
        torch.tensor([case.dynamic]),
        pages=case.pages,
        capacity=case.capacity,
        window=case.window,
        dynamic_share=case.share_ppm / 10**6,
        dynamic_least=case.least,
    )[0].tolist()


@st.composite
def allocations(draw: st.DrawFn) -> Allocation:
    heads = draw(st.integers(1, 12))
    capacity = draw(st.integers(1, 60))
    # Multiples of 1/64 for many ties, and 1 - S within fp32.
    sparsity = st.one_of(st.integers(0, 64).map(lambda n: n / 64), st.floats(0, 1, width=32))
    return Allocation(
        sparsity=draw(st.lists(sparsity, min_size=heads, max_size=heads)),
        dynamic=draw(st.lists(st.booleans(), min_size=heads, max_size=heads)),
        pages=draw(st.integers(0, heads * capacity + 2)),
        capacity=capacity,
        window=draw(st.integers(0, 64)),
        share_ppm=draw(st.integers(0, 10**6)),
        least=draw(st.integers(0, 70)),
    )


@settings(max_examples=600, deadline=None, database=None)
@given(allocations())
def test_matches_its_definition(case: Allocation) -> None:
    given_pages = allocate(case)
    assert given_pages == case.expected()
    assert sum(given_pages) == min(case.pages, len(given_pages) * case.capacity)
    assert all(0 <= pages <= case.capacity for pages in given_pages)
    if case.pages >= len(given_pages):
        assert min(given_pages) >= 1


@settings(max_examples=200, deadline=None, database=None)
@given(allocations())
def test_less_sparse_static_heads_never_get_less(case: Allocation) -> None:
    heads = zip(case.sparsity, allocate(case), case.dynamic, strict=True)
    # As precisely as weights are held: below that heads are equals, and the first comes first.
    static = [(int((1 - sparsity) * 2**30), pages) for sparsity, pages, dynamic in heads if not dynamic]
    for weight, pages in static:
        assert all(pages >= others for lighter, others in static if lighter < weight)


@settings(max_examples=100, deadline=None, database=None)
@given(allocations())
def test_dynamic_heads_are_uniform(case: Allocation) -> None:
    broad = [pages for pages, dynamic in zip(allocate(case), case.dynamic, strict=True) if dynamic]
    if broad:
        assert max(broad) - min(broad) <= 1
        assert broad == sorted(broad, reverse=True)


@settings(max_examples=200, deadline=None, database=None)
@given(allocations())
def test_dynamic_heads_get_their_least_beside_the_static_ones_floor(case: Allocation) -> None:
    equal_share = case.pages // len(case.sparsity)
    heads = list(zip(allocate(case), case.dynamic, strict=True))
    broad = [pages for pages, dynamic in heads if dynamic]
    static = [pages for pages, dynamic in heads if not dynamic]
    floor = math.ceil(case.window / 16) + 1
    assert all(pages >= min(case.least, equal_share, case.capacity) for pages in broad)
    if static and case.pages >= len(heads):
        assert sum(static) >= len(static) * min(floor, equal_share, case.capacity)
        assert min(static) >= min(max(1, floor - 1), equal_share, case.capacity)
    if broad and static:
        assert max(broad) <= max(case.least, equal_share) or set(static) == {case.capacity}
        if min(broad) < min(case.least, case.capacity):
            assert (min(broad) + 1) * len(broad) + floor * len(static) > case.pages


def example(
    sparsity: list[float],
    dynamic: list[bool] | None = None,
    *,
    pages: int,
    capacity: int = 100,
    window: int = 0,
    least: int = 0,
) -> list[int]:
    verdict = dynamic or [False] * len(sparsity)
    return allocate(Allocation(sparsity, verdict, pages, capacity, window, 400_000, least))


def test_type_split_numbers() -> None:
    # 100 pages, 4 heads: an equal share is 25, each dynamic head gets 0.4 of it, the static ones the rest.
    assert example([0.5, 0.5, 0.5, 0.5], [True, False, False, True], pages=100) == [10, 40, 40, 10]
    assert example([0.5, 0.5, 0.5, 0.5], [True, True, True, True], pages=100) == [25, 25, 25, 25]
    assert example([0.5, 0.5, 0.5, 0.5], [False, False, False, False], pages=100) == [25, 25, 25, 25]


def test_least_pages_of_dynamic_heads() -> None:
    half, one = [0.5] * 4, [True, False, False, False]
    assert example(half, one, pages=100, least=10) == [10, 30, 30, 30]
    assert example(half, one, pages=100, least=16) == [16, 28, 28, 28]
    # Above an equal share too, while every static head keeps a page, and those of the window.
    assert example(half, one, pages=100, least=90) == [90, 4, 3, 3]
    assert example(half, one, pages=100, least=98) == [97, 1, 1, 1]
    assert example(half, one, pages=100, least=90, window=17) == [90, 4, 3, 3]
    assert example(half, one, pages=100, least=98, window=17) == [91, 3, 3, 3]
    assert example(half, one, pages=100, least=98, capacity=80) == [80, 7, 7, 6]
    assert example(half, [True, True, True, False], pages=103, least=90) == [34, 34, 34, 1]
    # An equal share in any case: the window alone takes more than that.
    assert example(half, one, pages=101, least=90, window=400) == [25, 26, 25, 25]
    # Where all are dynamic each has its equal share in any case.
    assert example(half, [True] * 4, pages=102, least=90) == [26, 26, 25, 25]


@pytest.mark.parametrize(
    ("kind", "landmark_pages", "least"),
    # 512 chunks of 8,192 tokens, a budget of 10%: 2% of them are 11.
    [("sketch", 19, 30), ("sketch2", 37, 48), ("mean", 17, 28), ("minmax", 35, 46)],
)
def test_limits_of_a_long_prompt(kind: Any, landmark_pages: int, least: int) -> None:
    assert LandmarkLayout(kind, head_size=128, itemsize=2).pages(512) == landmark_pages
    assert recall_limits(112 * 51, 112, 512, landmark_pages, 64) == (least, 112)


@pytest.mark.parametrize(
    ("pages", "num_chunks", "landmarks", "window", "limits"),
    # Of 10 heads, whose floor is a page and that of their window.
    [
        (270, 512, 19, 64, (30, 10)),  # landmarks and 8 chunks
        (269, 512, 19, 64, (30, 10)),  # and 7
        (250, 512, 19, 64, (30, 9)),  # 5 pages a head, 200 beside: 9 times 22
        (229, 512, 19, 64, (30, 8)),  # 8 times 22; with 4 chunks there would be 9
        (68, 512, 19, 64, (30, 1)),
        (67, 512, 19, 64, None),
        (67, 512, 19, 48, (30, 1)),  # a smaller window
        (40, 512, 19, 64, None),  # less than the floors
        (0, 512, 19, 0, None),
        (999, 100, 4, 0, (12, 10)),
        (105, 100, 4, 0, (10, 10)),  # all with 6 chunks rather than 9 with 7
        (1000, 100, 4, 0, None),  # keeps every chunk
        (100, 401, 4, 0, (13, 10)),  # 2% of the chunks, rounded up
        (60, 9, 4, 0, (8, 7)),
        (60, 8, 4, 0, None),  # a head with 4 chunks takes as much as all of its prompt
    ],
)
def test_how_many_heads_recall(
    pages: int, num_chunks: int, landmarks: int, window: int, limits: tuple[int, int] | None
) -> None:
    assert recall_limits(pages, 10, num_chunks, landmarks, window) == limits


HEADS, PAGES, LEAST, WINDOW = (
    st.integers(1, 40),
    st.integers(0, 4000),
    st.integers(1, 100),
    st.integers(0, 64),
)


@settings(max_examples=300, deadline=None, database=None)
@given(HEADS, PAGES, LEAST, WINDOW)
def test_as_many_heads_as_fit_and_never_fewer_with_more_pages(
    heads: int, pages: int, least: int, window: int
) -> None:
    floor = math.ceil(window / 16) + 1
    fits = [
        number
        for number in range(heads + 1)
        if number * least + (heads - number) * floor <= pages or heads * least <= pages
    ]
    # Where not even the floors fit, a head with less than its floor would: it is not asked to recall.
    most = heads_that_fit(pages, heads, least, window)
    assert most == (max(fits, default=0) if least > floor else heads * (heads * least <= pages))
    assert most <= heads_that_fit(pages + 1, heads, least, window)


@settings(max_examples=300, deadline=None, database=None)
@given(HEADS, PAGES, st.integers(1, 400), LEAST, WINDOW)
def test_limits_hold_landmarks_and_chunks(
    heads: int, pages: int, num_chunks: int, landmarks: int, window: int
) -> None:
    limits = recall_limits(pages, heads, num_chunks, landmarks, window)
    fit = {
        hot: heads_that_fit(pages, heads, landmarks + hot, window)
        for hot in range(4, 9)
        if landmarks + hot < num_chunks
    }
    assert (limits is None) == (pages >= heads * num_chunks or not any(fit.values()))
    if limits:
        worth = {hot: number * math.log(1 + hot) for hot, number in fit.items()}
        best = [hot for hot in fit if worth[hot] > max(worth.values()) - 1e-9]
        share = math.ceil(num_chunks / 50)
        assert limits in [(landmarks + max(hot, share), fit[hot]) for hot in best]
        # As many recall as may, or fewer: none gets less than its landmarks and 4 chunks.
        for number in {1, limits[1]}:
            case = Allocation(
                [0.5] * heads,
                [head < number for head in range(heads)],
                pages,
                num_chunks,
                window,
                400_000,
                limits[0],
            )
            assert min(allocate(case)[:number]) >= landmarks + 4


def test_whole_pages_of_a_decimal_share() -> None:
    # 0.29 * 100 is 28.999999999999996 in binary.
    case = Allocation([0.5, 0.5], [True, False], 200, 500, 0, 290_000)
    assert allocate(case) == [29, 171]


def test_static_floor_then_weights() -> None:
    # Mean 20 pages: the floor is one page of window plus 2, the other 34 pages go 1 : 3.
    assert example([0.75, 0.25], pages=40, window=16) == [3 + 8, 3 + 26]


def test_capped_heads_give_back() -> None:
    assert example([0.0, 0.5, 0.5], pages=30, capacity=12) == [12, 9, 9]
    # All static heads capped: the dynamic one gets what is left.
    assert example([0.5, 0.5, 0.5], [False, False, True], pages=30, capacity=11) == [11, 11, 8]


def test_zero_weights_share_evenly_and_take_surplus() -> None:
    assert example([1.0, 1.0, 1.0], pages=30) == [10, 10, 10]
    assert example([1.0, 0.0, 1.0], pages=30, capacity=14) == [8, 14, 8]


def test_ties_go_to_the_first_head() -> None:
    assert example([0.5] * 4, pages=6) == [2, 2, 1, 1]
    assert example([0.5] * 4, pages=2) == [1, 1, 0, 0]
    assert example([0.5] * 4, [True] * 4, pages=6) == [2, 2, 1, 1]


def test_many_heads_of_a_long_prompt_stay_exact() -> None:
    """The largest products of the fixed-point arithmetic."""
    heads, capacity = 4096, 65536
    random = torch.Generator().manual_seed(0)
    sparsity = torch.rand(64, 64, generator=random)
    pages = heads * capacity - 12_345
    given_pages = allocate_pages(
        sparsity,
        torch.zeros(64, 64, dtype=torch.bool),
        pages=pages,
        capacity=capacity,
        window=64,
        dynamic_share=0.4,
    )
    assert int(given_pages.sum()) == pages
    assert int(given_pages.min()) > 0
    assert int(given_pages.max()) == capacity


def test_negative_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        example([0.5], pages=-1)
