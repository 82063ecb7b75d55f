"""What the shipped model's heads looked at while decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hybridkv_quality.calibrate import load_model
from hybridkv_quality.heads import HeadBehaviour, mean_behaviour, watch_heads
from hybridkv_quality.model_path import model_folder
from hybridkv_quality.tasks import suite_samples

from hybridkv_vllm.policies import CLASSIFIERS


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return load_model(str(model_folder()))


def watch(model: tuple[Any, Any], task: str, share: float) -> HeadBehaviour:
    (sample,) = suite_samples([task], tokens=400, contexts=1)
    return watch_heads(*model, sample, share)


def test_a_chain_moves_and_a_recall_does_not(model: tuple[Any, Any]) -> None:
    chain, recall = watch(model, "chain", 0.1), watch(model, "recall", 0.1)
    for seen in (chain, recall):
        assert seen.reach.shape == (4, 2)
        assert (seen.reach <= 1 + 1e-5).all()
        assert (seen.best >= -1e-5).all()
        # No fixed choice beats each step's own, and none loses more than there is.
        assert (seen.best <= seen.pruned + 1e-5).all()
        assert (seen.pruned <= seen.reach + 1e-5).all()
        assert set(seen.figures) == set(CLASSIFIERS)
    # Later names of a chain were not asked for; what a recall needs, the question has looked at.
    looks_up = 2, 0  # The head that training showed where to look.
    assert chain.moving[looks_up] > 0.2
    assert chain.moving[looks_up] > recall.moving[looks_up] + 0.05
    assert chain.overlap[looks_up] < 0.5


def test_nothing_is_lost_where_everything_is_kept(model: tuple[Any, Any]) -> None:
    seen = watch(model, "chain", 1.0)
    assert seen.pruned.max() < watch(model, "chain", 0.1).pruned.max() / 4
    assert seen.moving.abs().max() < 0.05


def test_the_mean_is_over_prompts(model: tuple[Any, Any]) -> None:
    one, other = watch(model, "chain", 0.1), watch(model, "recall", 0.1)
    mean = mean_behaviour([one, other])
    assert torch.allclose(mean.pruned, (one.pruned + other.pruned) / 2)
    assert torch.allclose(
        mean.figures["text_mass"], (one.figures["text_mass"] + other.figures["text_mass"]) / 2
    )
