"""One layer's attention: writes the cache, attends each kind of row, and ends prefills."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from hybridkv_kernels import Backend
from hybridkv_kernels.cache_write import cache_write
from hybridkv_kernels.extent_decode import extent_decode
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from hybridkv_vllm.attention.dense import DenseImpl, TorchDenseImpl, dense_backend
from hybridkv_vllm.config import ServerOptions, server_options
from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.plugin import install_worker_hooks

if TYPE_CHECKING:
    from hybridkv_vllm.attention.builder import HybridKVMetadata
    from hybridkv_vllm.worker.compression_log import CompressionLog
    from hybridkv_vllm.worker.tables import RequestTables


def kernel_backend(options: ServerOptions) -> Backend:
    """`triton` or `torch`."""
    if options.kernels == "auto":
        return "triton" if current_platform.is_cuda() else "torch"
    return options.kernels


class HybridKVImpl(AttentionImpl["HybridKVMetadata"]):
    """Composes a dense implementation for prompt rows with the extent decode for all others."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """See vLLM's base class.

        Raises:
            HybridKVConfigError: the layer attends in a way that the decode kernel does not know.
        """
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "sliding-window attention": sliding_window is not None,
            "logits soft cap": bool(logits_soft_cap),
            "attention sinks": sinks is not None,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            f"{AttentionType(attn_type).value} attention": attn_type != AttentionType.DECODER,
        }
        for feature, present in unsupported.items():
            if present:
                raise HybridKVConfigError(
                    f"{feature} is not supported; serve this model with another --attention-backend"
                )
        install_worker_hooks()
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        vllm_config = get_current_vllm_config()
        self.options = server_options(vllm_config)
        self.kernel_backend = kernel_backend(self.options)
        self.dense_backend = dense_backend(self.kernel_backend, vllm_config.model_config.dtype, head_size)
        self._dense: DenseImpl
        if self.dense_backend is None:
            self._dense = TorchDenseImpl(head_size, self.scale)
        else:
            self._dense = self.dense_backend.get_impl_cls()(
                num_heads, head_size, self.scale, self.num_kv_heads, None, None, kv_cache_dtype
            )
        self._tables: Callable[[], RequestTables | None] = lambda: None
        self._log: Callable[[], CompressionLog | None] = lambda: None
        self._layer = -1

    def bind(self, tables: RequestTables, layer: int, log: CompressionLog) -> None:
        """Joins the layer, `layer`-th of this rank, to the worker's tables once the KV cache exists.

        The model state owns them: a model can outlive its engine, whose KV cache must go with it.
        """
        self._tables = weakref.ref(tables)
        self._log = weakref.ref(log)
        self._layer = layer

    @property
    def tables(self) -> RequestTables:
        """Of all layers, once the KV cache exists."""
        tables = self._tables()
        assert tables is not None, "hybridkv: the KV cache is not there yet, or gone"
        return tables

    def release_pool(self) -> None:
        """Lets go of a KV cache that was bound before, for all layers: they share the tables."""
        tables = self._tables()
        if tables is not None:
            tables.pool = tables.pool.new_empty(0)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes the step's keys and values `[N, H, D]` into their pages."""
        del layer, kv_cache
        tables, num_tokens = self.tables, slot_mapping.shape[0]
        cache_write(
            key[:num_tokens],
            value[:num_tokens],
            tables.pool,
            slot_mapping,
            self._layer,
            tables.shape.num_layers,
            backend=self.kernel_backend,
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HybridKVMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes `[N, Hq, D]` into output; a profiling run (no metadata) leaves zeros."""
        del output_scale, output_block_scale
        if attn_metadata is None:
            return output.fill_(0)
        tables = self.tables
        for rows in attn_metadata.dense:
            self._dense.forward(
                layer,
                query[rows.tokens],
                key[rows.tokens],
                value[rows.tokens],
                kv_cache,
                rows.metadata,
                output[rows.tokens],
            )
        for decode in attn_metadata.decodes:
            if decode.recalls:
                assert tables.recall is not None
                tables.recall.decode(
                    query[decode.tokens],
                    tables.pool,
                    output[decode.tokens],
                    decode.row_slot,
                    decode.row_len,
                    tables.decode,
                    self._layer,
                    self.scale,
                )
                continue
            extent_decode(
                query[decode.tokens],
                tables.pool,
                output[decode.tokens],
                decode.row_slot,
                decode.row_len,
                tables.decode,
                self._layer,
                self.scale,
                decode.plan,
                backend=self.kernel_backend,
                early=True,
            )
        for prefill_end in attn_metadata.prefill_ends:
            prefill_end.score(query, self._layer, self.scale)
            if self._layer == tables.shape.num_layers - 1:
                log = self._log()
                assert log is not None
                log.record(prefill_end.compress())
        return output
