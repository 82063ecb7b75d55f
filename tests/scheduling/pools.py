"""The real block manager over pools of any size, and requests that hold their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.plugin import register
from hybridkv_vllm.scheduling.manager import HybridKVManager
from hybridkv_vllm.scheduling.spec import HybridKVSpec

register()
init_none_hash(sha256)

SPEC = HybridKVSpec(block_size=PAGE_TOKENS, num_kv_heads=2, head_size=16, dtype=torch.float32)


def make_pool(
    num_blocks: int, max_model_len: int = 2048, *, caching: bool = False
) -> tuple[KVCacheManager, HybridKVManager]:
    """vLLM's manager of so many blocks, the null block among them, and ours within."""
    manager = KVCacheManager(
        KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], SPEC)]),
        max_model_len=max_model_len,
        scheduler_block_size=PAGE_TOKENS,
        hash_block_size=PAGE_TOKENS,
        enable_caching=caching,
    )
    (ours,) = manager.coordinator.single_type_managers
    assert isinstance(ours, HybridKVManager)
    return manager, ours


def make_request(
    tokens: int | Sequence[int],
    max_tokens: int = 8,
    *,
    name: str = "r",
    block_hasher: Callable[[Request], list[Any]] | None = None,
    resumable: bool = False,
    extra_args: dict[str, Any] | None = None,
) -> Request:
    """A request with a prompt of these tokens, or of so many."""
    prompt = range(tokens) if isinstance(tokens, int) else tokens
    params = SamplingParams(max_tokens=max_tokens, extra_args=extra_args)
    return Request(name, list(prompt), params, None, block_hasher=block_hasher, resumable=resumable)
