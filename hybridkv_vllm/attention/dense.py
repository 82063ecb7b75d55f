"""Dense attention for prompt rows: vLLM's own kernels, or torch on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.fa_utils import is_flash_attn_varlen_func_available
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from hybridkv_vllm.plan import PAGE_TOKENS, ceil_pages


def dense_backend(kernel_backend: str, dtype: torch.dtype, head_size: int) -> type[AttentionBackend] | None:
    """vLLM's backend for prompt rows; None where torch serves them."""
    if kernel_backend == "torch" and not current_platform.is_cuda():
        return None
    if (
        current_platform.is_cuda()
        and is_flash_attn_varlen_func_available()
        and FlashAttentionBackend.supports_dtype(dtype)
        and FlashAttentionBackend.supports_head_size(head_size)
        and _takes_our_pages(FlashAttentionBackend, dtype, head_size)
    ):
        return FlashAttentionBackend
    return TritonAttentionBackend


def _takes_our_pages(backend: type[AttentionBackend], dtype: torch.dtype, head_size: int) -> bool:
    """Whether its kernels read pages of 16 tokens: on Blackwell FlashAttention wants 128 for heads of 256."""
    spec = FullAttentionSpec(block_size=PAGE_TOKENS, num_kv_heads=1, head_size=head_size, dtype=dtype)
    sizes = backend.get_supported_kernel_block_sizes(spec)
    return any(
        PAGE_TOKENS % size.base == 0 if isinstance(size, MultipleOf) else size == PAGE_TOKENS
        for size in sizes
    )


def slice_rows(common: CommonAttentionMetadata, rows: slice) -> CommonAttentionMetadata:
    """The batch's metadata for a run of adjacent rows, with token positions counted from its first."""
    bounds = common.query_start_loc_cpu[rows.start : rows.stop + 1]
    first, last = int(bounds[0]), int(bounds[-1])
    seq_lens_cpu = common.seq_lens_cpu_upper_bound
    assert seq_lens_cpu is not None
    return common.replace(
        query_start_loc=common.query_start_loc[rows.start : rows.stop + 1] - first,
        query_start_loc_cpu=bounds - first,
        seq_lens=common.seq_lens[rows],
        seq_lens_cpu_upper_bound=seq_lens_cpu[rows],
        num_reqs=rows.stop - rows.start,
        num_actual_tokens=last - first,
        max_query_len=int((bounds[1:] - bounds[:-1]).max()),
        max_seq_len=int(seq_lens_cpu[rows].max()),
        block_table_tensor=common.block_table_tensor[rows],
        slot_mapping=common.slot_mapping[first:last],
        positions=None,
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[rows],
        req_idx=None if common.req_idx is None else common.req_idx[rows],
        # What vLLM has cached is of the whole batch (private fields, read in 0.32.0 and 0.33.0).
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class DenseBuilder(Protocol):
    """Builds what `forward` needs to know of a run of prompt rows."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """See vLLM's `AttentionMetadataBuilder.build`."""


class DenseImpl(Protocol):
    """Attends a run of prompt rows; vLLM's `AttentionImpl.forward`."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Writes `[tokens, Hq, D]` into output."""


@dataclass(frozen=True)
class TorchRow:
    """One prompt row: its queries, all its tokens so far, and the blocks that hold them."""

    queries: slice
    num_tokens: int
    blocks: torch.Tensor


class TorchDenseBuilder:
    """The torch counterpart of a vLLM metadata builder (CPU: reading lengths costs nothing)."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> list[TorchRow]:
        """One `TorchRow` a request."""
        del common_prefix_len, fast_build
        bounds = common_attn_metadata.query_start_loc_cpu.tolist()
        return [
            TorchRow(
                queries=slice(bounds[row], bounds[row + 1]),
                num_tokens=num_tokens,
                blocks=common_attn_metadata.block_table_tensor[row, : ceil_pages(num_tokens)],
            )
            for row, num_tokens in enumerate(common_attn_metadata.seq_lens.tolist())
        ]


class TorchDenseImpl:
    """Gathers a row's keys and values from its blocks and runs torch's own attention."""

    def __init__(self, head_size: int, scale: float) -> None:
        self._head_size = head_size
        self._scale = scale

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: list[TorchRow],
        output: torch.Tensor,
    ) -> torch.Tensor:
        """See `DenseImpl`; `kv_cache` is the layer's `[B, H, 16, 2 * D]`."""
        del layer, key, value
        for row in attn_metadata:
            pages = kv_cache[row.blocks.long()].transpose(0, 1).flatten(1, 2)[:, : row.num_tokens]
            keys, values = pages.split(self._head_size, dim=-1)
            queries = query[row.queries].transpose(0, 1)
            num_queries = queries.shape[1]
            # Not torch's `CausalBias`: compiled models may run with tensor subclasses switched off.
            earlier = None
            if num_queries < row.num_tokens:
                earlier = torch.ones(num_queries, row.num_tokens, dtype=torch.bool, device=query.device)
                earlier = earlier.tril(row.num_tokens - num_queries)
            attended = torch.nn.functional.scaled_dot_product_attention(
                queries.unsqueeze(0),
                keys.unsqueeze(0),
                values.unsqueeze(0),
                attn_mask=earlier,
                is_causal=earlier is None,
                scale=self._scale,
                enable_gqa=True,
            )
            output[row.queries] = attended[0].transpose(0, 1)
        return output


def make_dense_builder(
    backend: type[AttentionBackend] | None,
    spec: AttentionSpec,
    layer_names: list[str],
    vllm_config: VllmConfig,
    device: torch.device,
) -> DenseBuilder:
    """The metadata builder that belongs to `dense_backend`'s answer."""
    if backend is None:
        return TorchDenseBuilder()
    return backend.get_builder_cls()(spec, layer_names, vllm_config, device)
