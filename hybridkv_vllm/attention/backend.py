"""The backend class that `--attention-backend hybridkv` names."""

from __future__ import annotations

from typing import ClassVar

import torch
from hybridkv_kernels.pages import supports_head_size
from vllm.config.cache import CacheDType
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from hybridkv_vllm.attention.builder import HybridKVMetadataBuilder
from hybridkv_vllm.attention.impl import HybridKVImpl
from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.scheduling.spec import HybridKVSpec


class HybridKVBackend(AttentionBackend):
    """Per-head compressed KV cache over vLLM's blocks of 16 tokens."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        """Name in logs; CUSTOM is the registry member behind it."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HybridKVImpl]:
        """The layer's half."""
        return HybridKVImpl

    @staticmethod
    def get_builder_cls() -> type[HybridKVMetadataBuilder]:
        """The step's half."""
        return HybridKVMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """A page is one block of one KV head: 16 tokens."""
        del kv_cache_spec
        return [PAGE_TOKENS]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Exactly 16: larger blocks would be split and pages no longer lie side by side."""
        return block_size is None or block_size == PAGE_TOKENS

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Head sizes that the kernels are compiled and tested for."""
        return supports_head_size(head_size)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Ampere and later."""
        return capability >= DeviceCapability(8, 0)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors move blocks that compression gives back."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """One block holds all layers and heads, so that an arena is a bag of pages."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Makes vLLM use our block manager (found by the spec's class)."""
        if type(spec) is FullAttentionSpec:
            return HybridKVSpec.from_full_attention(spec)
        return spec
