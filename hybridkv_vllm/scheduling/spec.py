"""The KV cache spec: tells vLLM which manager to use and how much one longest request needs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec

from hybridkv_vllm.config import server_options
from hybridkv_vllm.plan import arena_blocks

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class HybridKVSpec(FullAttentionSpec):
    """Full attention whose prompts move into an arena (hook: `AttentionBackend.customize_spec`)."""

    @classmethod
    def from_full_attention(cls, spec: FullAttentionSpec) -> HybridKVSpec:
        """Copies the spec that vLLM's attention layer built."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec)})

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one layer that the longest request holds at once.

        The arena is reserved while the prompt's own blocks are still held. (vLLM counts its null block.)
        """
        max_model_len = vllm_config.model_config.max_model_len
        arena = arena_blocks(server_options(vllm_config).budget_share, max_model_len)
        return (cdiv(max_model_len, self.block_size) + arena) * self.page_size_bytes
