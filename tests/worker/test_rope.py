"""The rope that we find turns vectors as vLLM's own rotary embeddings do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hybridkv_kernels.recall.landmarks import Rope
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from hybridkv_vllm.worker.rope import rope_of

HEAD_SIZE = 64
KINDS: dict[str, dict[str, Any]] = {
    "M-RoPE": {"mrope_section": [8, 12, 12]},
    "M-RoPE in turn": {"mrope_section": [12, 10, 10], "mrope_interleaved": True},
    "M-RoPE, half of the head": {"mrope_section": [4, 6, 6], "partial_rotary_factor": 0.5},
    "text": {},
    "text, adjacent pairs": {"is_neox_style": False},
    "YaRN": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "Llama 3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.fixture(autouse=True)
def _config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def make(parameters: dict[str, Any]) -> RotaryEmbeddingBase:
    """vLLM's rotary embedding for these rope parameters."""
    parameters = {"rope_type": "default", "rope_theta": 10_000.0, **parameters}
    is_neox = parameters.pop("is_neox_style", True)
    return get_rope(HEAD_SIZE, 512, is_neox_style=is_neox, rope_parameters=parameters, dtype=torch.float32)


@pytest.mark.parametrize("parameters", KINDS.values(), ids=KINDS.keys())
def test_vectors_turn_as_in_vllm(parameters: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = make(parameters)
    axes = 3 if "mrope_section" in parameters else 1
    rope = rope_of(module, axes)
    assert isinstance(rope, Rope)
    tokens = 40
    positions = torch.randint(0, 200, (axes, tokens))
    keys = torch.randn(tokens, HEAD_SIZE)
    expected = module.forward_native(positions if axes > 1 else positions[0], keys.clone(), keys.clone())[1]
    assert torch.allclose(rope.rotate(keys, positions), expected, atol=1e-5)
    assert torch.allclose(rope.unrotate(expected, positions), keys, atol=1e-4)


def test_what_is_not_known_is_left_alone() -> None:
    assert rope_of(None, 1) is None
    assert rope_of(torch.nn.Linear(2, 2), 1) is None
    # Positions with more axes than the module tells apart.
    assert rope_of(make({}), 3) is None
    assert rope_of(make({"mrope_section": [8, 12, 12]}), 4) is None
