"""What defines each rival: plain examples with known answers."""

from __future__ import annotations

import pytest
import torch
from policy_cases import CASES, PAGE, made_scores
from torch import Tensor

from hybridkv_vllm.config import parse_server_options
from hybridkv_vllm.policies import POLICIES, PolicyOptions, PromptScores, Recall, Selection, get_policy


def choose(policy: str, scores: PromptScores, pages: int, recall: Recall | None = None) -> Selection:
    chosen, options = get_policy(policy), PolicyOptions()
    return chosen.select(scores, chosen.classify(scores, options), pages, options, recall)


def scores_of_mass(mass: Tensor, votes: float = 0.0, visual: slice = slice(0, 0)) -> PromptScores:
    """`[L, H, T]` mass; the window is the last page, which every head then keeps."""
    is_visual = torch.zeros(mass.shape[-1], dtype=torch.bool)
    is_visual[visual] = True
    return made_scores(mass, torch.full_like(mass, votes), PAGE, is_visual)


def even_mass(layers: int, heads: int, pages: int) -> Tensor:
    return torch.full((layers, heads, pages * PAGE), 1 / (pages * PAGE))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_name_is_a_server_option(policy: str) -> None:
    options = parse_server_options({"policy": policy})
    assert options.policy == policy
    assert options.landmark_kind == {"hybridkv-paper": "mean", "quest": "minmax"}.get(policy, "sketch2")
    assert options.classifier_name == ("sparsity" if policy == "hybridkv-paper" else "text_mass")


def test_streamingllm_keeps_the_first_four_and_the_last_tokens() -> None:
    scores = CASES["long"]
    selection = choose("streamingllm", scores, 5 * scores.heads + 3)
    expected = torch.zeros(400, dtype=torch.bool)
    expected[:4] = expected[400 - 76 :] = True
    assert (selection.keep == expected).all()


def test_pyramidkv_falls_by_equal_steps_to_a_twentieth() -> None:
    scores = scores_of_mass(even_mass(20, 2, 100))
    # A page of window and a mean of 20 beside it: from 39 down to 1.
    pages = choose("pyramidkv", scores, 20 * 2 * 21 + 1).pages
    assert pages.tolist() == [[1 + 39 - 2 * layer] * 2 for layer in range(20)]


def test_pyramidkv_falls_less_where_the_first_layer_keeps_all() -> None:
    pages = choose("pyramidkv", scores_of_mass(even_mass(5, 2, 31)), 5 * 2 * 21).pages
    # The mean of 20 beside the window: from 30, which is all of the prompt, down to 10.
    assert pages.tolist() == [[31] * 2, [26] * 2, [21] * 2, [16] * 2, [11] * 2]


def test_pyramidkv_of_one_layer_is_snapkv() -> None:
    scores = scores_of_mass(torch.rand(1, 3, 320, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(choose("pyramidkv", scores, 24).keep, choose("snapkv", scores, 24).keep)


def test_adakv_follows_the_best_tokens_down_to_the_safeguard() -> None:
    mass = even_mass(2, 2, 100)
    mass[0, 1] *= 4  # all of the first layer's 640 best tokens before the window
    mass[1, 0, :477] *= 4  # three quarters of the second layer's: pooling adds 3 to each head's
    mass[1, 1, :157] *= 4
    pages = choose("adakv", scores_of_mass(mass), 2 * 2 * 21).pages
    # A page of window, 4 of the 20 beside it are safe, and 32 of a layer's 42 follow the tokens.
    assert pages.tolist() == [[5, 5 + 32], [5 + 24, 5 + 8]]


def test_adakv_is_even_where_all_tokens_are_alike() -> None:
    pages = choose("adakv", scores_of_mass(even_mass(2, 4, 50)), 2 * 4 * 10).pages
    assert pages.tolist() == [[10] * 4] * 2


def test_lookm_keeps_the_end_then_text_then_visual() -> None:
    mass = even_mass(1, 1, 20)
    mass[..., 5 * PAGE : 6 * PAGE] *= 2  # visual and well looked at
    scores = scores_of_mass(mass, visual=slice(2 * PAGE, 20 * PAGE))

    def kept(pages: int) -> list[int]:
        keep = choose("lookm", scores, pages).keep[0, 0].view(20, PAGE)
        assert torch.equal(keep.all(-1), keep.any(-1))
        return keep[:, 0].nonzero().flatten().tolist()

    assert kept(2) == [0, 19]
    assert kept(4) == [0, 1, 18, 19]
    assert kept(6) == [0, 1, 5, 17, 18, 19]
    assert kept(8) == [0, 1, 2, 5, 16, 17, 18, 19]


def test_sparsemm_gives_to_heads_that_look_at_the_picture() -> None:
    mass = torch.zeros(2, 2, 100 * PAGE)
    on_picture = torch.tensor([[0.1, 0.8], [0.1, 0.0]])
    mass[..., 200], mass[..., 0] = on_picture, 1 - on_picture
    pages = choose("sparsemm", scores_of_mass(mass, visual=slice(100, 900)), 4 * 21).pages
    # A page of window, 2 of the 20 beside it for each; the other 72 follow the mass, from layer to layer too.
    assert pages.tolist() == [[3 + 7, 3 + 58], [3 + 7, 3]]


def test_sparsemm_is_even_without_a_picture() -> None:
    assert choose("sparsemm", scores_of_mass(even_mass(2, 2, 50)), 40).pages.tolist() == [[10] * 2] * 2


@pytest.mark.parametrize(
    ("landmark_pages", "paper", "ours"),
    [
        (3, 8, 12),  # r * 20 pages, which our least overrides
        (10, 11, 19),  # less than the landmarks and a chunk
    ],
)
def test_the_papers_dynamic_heads_get_what_r_says(landmark_pages: int, paper: int, ours: int) -> None:
    # Every token gets all votes, and nearly all mass is visual: dynamic by either figure.
    scores = scores_of_mass(even_mass(1, 4, 100), votes=16.0, visual=slice(0, 99 * PAGE))
    some = torch.tensor([[True, False, False, False]])
    recall = Recall(some, landmark_pages, least_pages=landmark_pages + 9, most_heads=4)
    for policy, pages in {"hybridkv-paper": paper, "hybridkv": ours}.items():
        selection = choose(policy, scores, 80, recall)
        assert selection.recalled.tolist() == some.tolist()
        assert int(selection.pages[0, 0]) == pages
        assert int(selection.lengths[0, 0]) == PAGE * (pages - landmark_pages)
        assert int(selection.pages.sum()) == 80
