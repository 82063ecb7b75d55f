"""The policies that a user can name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hybridkv_vllm.policies.adakv import AdaKV
from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.full import Full
from hybridkv_vllm.policies.hybridkv import HybridKV
from hybridkv_vllm.policies.hybridkv_paper import HybridKVPaper
from hybridkv_vllm.policies.lookm import LookM
from hybridkv_vllm.policies.pyramidkv import PyramidKV
from hybridkv_vllm.policies.quest import Quest
from hybridkv_vllm.policies.snapkv import SnapKV
from hybridkv_vllm.policies.sparsemm import SparseMM
from hybridkv_vllm.policies.streamingllm import StreamingLLM

POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            AdaKV(),
            Full(),
            HybridKV(),
            HybridKVPaper(),
            LookM(),
            PyramidKV(),
            Quest(),
            SnapKV(),
            SparseMM(),
            StreamingLLM(),
        )
    }
)


def get_policy(name: str) -> Policy:
    """The policy called `name`.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]
