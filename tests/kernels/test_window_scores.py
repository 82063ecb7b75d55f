"""The window's scores against a softmax written out, and Triton's against torch's."""

import math

import pytest
import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.window_scores import VOTE_SHARE, window_scores
from hybridkv_kernels.window_scores import triton as fused
from kernel_cases import TOLERANCE, nan_pool, strided_heads
from torch import Tensor

LAYERS, LAYER = 2, 1


def prompt(
    tokens: int, heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A pool that holds nothing but these keys [H, T, D], the block ids, and the keys."""
    count = -(-tokens // PAGE)
    blocks = torch.randperm(count + 2)[:count].int().to(device)
    keys = (2 * torch.randn(heads, tokens, head_size, device=device)).to(dtype)
    pool = nan_pool(count + 2, LAYERS, heads, head_size, dtype, device)
    for token in range(tokens):
        first = (int(blocks[token // PAGE]) * LAYERS + LAYER) * heads
        pool[first : first + heads, token % PAGE, :head_size] = keys[:, token]
    return pool, blocks, keys


def score(
    query: Tensor, pool: Tensor, blocks: Tensor, heads: int, tokens: int, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Run the operation into NaN-filled results, which are slices of something wider."""
    mass, votes = torch.full((2, heads, tokens + 5), math.nan, device=query.device)[..., :tokens]
    window_scores(query, pool, blocks, tokens, LAYER, LAYERS, query.shape[-1] ** -0.5, mass, votes, backend)
    return mass, votes


CASES = [
    # tokens, window, heads, group, head size
    (1, 1, 1, 1, 64),
    (17, 17, 2, 2, 80),
    (100, 7, 2, 7, 128),
    (300, 64, 1, 7, 64),
    (130, 33, 1, 8, 96),
    (48, 16, 3, 1, 128),
    (260, 256, 1, 1, 64),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("tokens", "window", "heads", "group", "head_size"), CASES)
def test_matches_the_definition(
    backend: Backend, tokens: int, window: int, heads: int, group: int, head_size: int, device: torch.device
) -> None:
    query = strided_heads(window, heads * group, head_size, torch.float32, device)
    pool, blocks, keys = prompt(tokens, heads, head_size, torch.float32, device)
    mass, votes = torch.zeros(2, heads, tokens, dtype=torch.float64, device=device)
    for i in range(window):
        seen = tokens - window + i + 1
        for q_head in range(heads * group):
            head = q_head // group
            logits = keys[head, :seen].double() @ query[i, q_head].double() * head_size**-0.5
            share = logits.softmax(dim=0)
            mass[head, :seen] += share / (window * group)
            votes[head, :seen] += share >= VOTE_SHARE * share.max()

    actual_mass, actual_votes = score(query, pool, blocks, heads, tokens, backend)

    torch.testing.assert_close(actual_mass.double(), mass, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(actual_votes.double(), votes, rtol=0, atol=0)
    torch.testing.assert_close(mass.sum(dim=1), torch.ones_like(mass[:, 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_matches_torch_in_16_bit(dtype: torch.dtype, device: torch.device) -> None:
    query = strided_heads(20, 6, 80, dtype, device)
    pool, blocks, _ = prompt(150, 2, 80, dtype, device)
    expected_mass, expected_votes = score(query, pool, blocks, 2, 150, "torch")
    mass, votes = score(query, pool, blocks, 2, 150, "triton")
    torch.testing.assert_close(mass, expected_mass, rtol=TOLERANCE[dtype], atol=1e-6)
    # A score within rounding of the threshold may fall either way.
    assert (votes - expected_votes).abs().sum() <= 0.001 * expected_votes.sum()


def test_splits_merge_and_repeat_exactly(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    query = strided_heads(30, 2, 64, torch.float32, device)
    pool, blocks, _ = prompt(200, 1, 64, torch.float32, device)
    expected_mass, expected_votes = score(query, pool, blocks, 1, 200, "torch")
    for programs in (1, 4, 512):
        monkeypatch.setattr(fused, "STATISTICS_PROGRAMS", programs)
        first, second = (score(query, pool, blocks, 1, 200, "triton") for _ in range(2))
        torch.testing.assert_close(first[0], expected_mass, rtol=1e-4, atol=1e-7)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], expected_votes)


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    pool, blocks, _ = prompt(20, 1, 64, torch.float32, device)
    query = torch.zeros(4, 2, 64, device=device)
    mass, votes = torch.zeros(2, 1, 20, device=device)

    def call(query: Tensor, tokens: int = 20, mass: Tensor = mass, votes: Tensor = votes) -> None:
        window_scores(query, pool, blocks, tokens, LAYER, LAYERS, 1.0, mass, votes)

    call(query)
    with pytest.raises(ValueError, match="window"):
        call(query.repeat(6, 1, 1))
    with pytest.raises(ValueError, match="window"):
        call(query[:0])
    with pytest.raises(ValueError, match="blocks"):
        call(query, tokens=40)
    with pytest.raises(ValueError, match="votes"):
        call(query, votes=votes[:, :19])
    with pytest.raises(ValueError, match="group"):
        call(torch.zeros(4, 17, 64, device=device))
