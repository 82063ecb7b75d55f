"""What a rank takes for its own: its heads of a profile, its share of the node's memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.profile import HeadProfile
from hybridkv_vllm.worker import state
from hybridkv_vllm.worker.recall import RecallState
from hybridkv_vllm.worker.state import HybridKVModelState
from hybridkv_vllm.worker.tables import CacheShape


def make_model_state(**parallel: int) -> HybridKVModelState:
    """Ours without vLLM's, which wants a whole model."""
    found = object.__new__(HybridKVModelState)
    found.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(**parallel))
    found.device = torch.device("cpu")
    found._host_tier_bytes = 0
    return found


@pytest.mark.parametrize(
    ("rank", "ranks", "heads"),
    [
        (0, 2, [0, 1]),
        (1, 2, [2, 3]),
        # With more ranks than heads neighbours have the same one.
        (4, 8, [2]),
        (5, 8, [2]),
    ],
)
def test_a_rank_reads_its_own_heads_of_a_profile(
    rank: int, ranks: int, heads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = [[0.0, 0.25, 0.5, 0.75]]
    profile = HeadProfile(model="m", tasks=["chain"], tokens=1, prompts=1, share=0.1, moving=moving)
    file = tmp_path / "profile.json"
    file.write_text(profile.model_dump_json())
    monkeypatch.setattr(state, "get_tp_group", lambda: SimpleNamespace(rank_in_group=rank, world_size=ranks))
    monkeypatch.setattr(state, "model_shape", lambda _: profile.shape)
    layers = [SimpleNamespace(layer_name="model.layers.0.self_attn")]
    shape = CacheShape(1, len(heads), len(heads), 16)
    figures = make_model_state()._read_profile(layers, shape, ServerOptions(profile=file))
    assert figures is not None
    assert figures.tolist() == [[1 - moving[0][head] for head in heads]]


def test_the_default_host_pool_is_shared_by_the_nodes_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def default_pool_bytes(*arguments: Any) -> int:
        asked.append(arguments)
        return 2**20

    monkeypatch.setattr(state, "default_pool_bytes", default_pool_bytes)
    pool = torch.zeros(3, 16, 32)
    recall = cast(RecallState, SimpleNamespace(options=ServerOptions(budget=0.2), tier=None))
    make_model_state(local_world_size=4, data_parallel_size_local=2)._attach_host_tier(
        recall, CacheShape(3, 1, 1, 16), pool
    )
    assert asked == [(pool.nbytes, 0.2, 8)]
    assert recall.tier is not None
    assert recall.tier.store.nbytes == 2**20
