"""Profiles of KV heads: what a rank takes from one, and what is refused with its remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridkv_vllm.config import ServerOptions, parse_server_options
from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.policies import PROFILE
from hybridkv_vllm.profile import HeadProfile, read_profile

MOVING = [[0.0, 0.25, 1.0], [0.5, 0.125, 0.75]]


def profile(**changed: object) -> dict[str, object]:
    usual = {"model": "a/model", "tasks": ["chain"], "tokens": 512, "prompts": 3, "share": 0.1}
    return {**usual, "moving": MOVING, **changed}


def test_a_rank_takes_its_layers_and_heads(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(HeadProfile.model_validate(profile()).model_dump_json())
    read = read_profile(file, 2, 3)
    assert read.shape == (2, 3)
    assert read.figures([0, 1], range(3)) == [[1.0, 0.75, 0.0], [0.5, 0.875, 0.25]]
    assert read.figures([1], range(1, 3)) == [[0.875, 0.25]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("moving", "is no profile (file: Invalid JSON"),
        (profile(moving=[[0.1, 2.0]]), "moving.0.1: Input should be less than or equal to 1"),
        (profile(moving=[[0.1], [0.1, 0.2]]), "layers of different numbers of KV heads"),
        (profile(moving=[]), "is no profile (moving"),
        (profile(format=2), "is no profile (format: Extra inputs"),
        (profile(moving=MOVING[:1]), "with 1 layers of 3 KV heads, but this model has 2 of 3"),
    ],
)
def test_what_is_no_profile_of_the_model_is_refused(content: object, says: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(HybridKVConfigError) as refused:
        read_profile(file, 2, 3)
    assert says in str(refused.value)
    assert "hybridkv calibrate MODEL" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_option_names_the_classifier_in_use() -> None:
    assert ServerOptions().classifier_name == "text_mass"
    options = parse_server_options({"profile": "heads.json"})
    assert options.profile == Path("heads.json")
    assert options.classifier_name == options.policy_options().classifier == PROFILE
    papers = parse_server_options({"profile": "heads.json", "policy": "hybridkv-paper"})
    assert papers.classifier_name == "sparsity"
