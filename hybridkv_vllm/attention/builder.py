"""Sorts a step's rows: dense prompt rows, decode rows, replayed rows, and prompts that end here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from hybridkv_kernels.extent_decode import DecodePlan
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from hybridkv_vllm.attention.dense import make_dense_builder, slice_rows
from hybridkv_vllm.attention.impl import HybridKVImpl
from hybridkv_vllm.worker.compress import PrefillEnd
from hybridkv_vllm.worker.tables import REPLAY_ROWS, RequestTables, make_replay_plan


@dataclass(frozen=True)
class DecodeRows:
    """Tokens that attend to extent and tail.

    Attributes:
        tokens: their place in the step's token order.
        row_slot: `[n]` int32, request slot, -1 for padding.
        row_len: `[n]` int32, tokens visible including the row's own.
        plan: how the kernel splits them over programs; None for the torch backend, and where heads recall.
        recalls: whether heads recall the chunks that these tokens need, as the recall's own plan says.
    """

    tokens: slice
    row_slot: torch.Tensor
    row_len: torch.Tensor
    plan: DecodePlan | None
    recalls: bool


@dataclass(frozen=True)
class DenseRows:
    """A run of prompt rows and the dense backend's own metadata for it."""

    tokens: slice
    metadata: Any


@dataclass
class HybridKVMetadata(AttentionMetadata):
    """What every layer does in this step."""

    decodes: list[DecodeRows] = field(default_factory=list)
    dense: list[DenseRows] = field(default_factory=list)
    prefill_ends: list[PrefillEnd] = field(default_factory=list)


class HybridKVMetadataBuilder(AttentionMetadataBuilder[HybridKVMetadata]):
    """Builds `HybridKVMetadata`; vLLM orders a batch's rows by query length, single tokens first."""

    # A full graph holds decode rows only: prompts are scored, which is not a fixed shape.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        # Any layer's impl leads to the tables, which exist once the cache is bound.
        self._impl: HybridKVImpl = next(iter(layers.values())).impl
        # vLLM's memory profiling binds a throwaway cache; it must be gone before the real one is allocated.
        self._impl.release_pool()
        self._dense = make_dense_builder(
            self._impl.dense_backend, kv_cache_spec, layer_names, vllm_config, device
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HybridKVMetadata:
        """See vLLM's base class."""
        del common_prefix_len, fast_build
        common, tables = common_attn_metadata, self._impl.tables
        num_decodes = common.num_reqs
        if common.max_query_len > 1:
            bounds = common.query_start_loc_cpu
            num_decodes = int((bounds[1:] - bounds[:-1] <= 1).sum())
        metadata = HybridKVMetadata()
        if num_decodes:
            row_slot, row_len = tables.row_slot[:num_decodes], common.seq_lens[:num_decodes]
            recall = tables.recall
            if recall is not None:
                recall.update_plan(row_slot, row_len, tables.decode)
            if tables.plan is not None:
                tables.plan.update(row_slot, row_len, tables.decode)
            tokens = slice(0, num_decodes)
            metadata.decodes.append(DecodeRows(tokens, row_slot, row_len, tables.plan, recall is not None))
        if num_decodes < common.num_reqs:
            self._add_prompt_rows(metadata, common, tables, num_decodes)
        return metadata

    def _add_prompt_rows(
        self,
        metadata: HybridKVMetadata,
        common: CommonAttentionMetadata,
        tables: RequestTables,
        first_row: int,
    ) -> None:
        """Sorts the rows of more than one token; runs of adjacent prompt rows share one dense call."""
        assert common.seq_lens_cpu_upper_bound is not None
        assert common.req_idx is not None
        bounds = common.query_start_loc_cpu.tolist()
        seq_lens = common.seq_lens_cpu_upper_bound.tolist()
        run_start = first_row
        for row in range(first_row, common.num_reqs):
            slot = int(common.req_idx[row])
            grant = tables.grants.get(slot) if tables.live else None
            if grant is None:
                continue
            plan = grant.plan
            start, stop = bounds[row], bounds[row + 1]
            computed = seq_lens[row] - (stop - start)
            if computed >= plan.num_tokens:
                self._add_dense(metadata, common, slice(run_start, row), alone=False)
                run_start = row + 1
                # The scheduler replays such a request token by token: as decodes, each with its own chunks.
                assert not plan.recalls, "hybridkv: a replay of several tokens cannot recall chunks"
                metadata.decodes.extend(self._replay(tables, slot, slice(start, stop), computed))
            elif seq_lens[row] == plan.num_tokens:
                assert stop - start >= plan.window, "hybridkv: a prefill chunk cut the observation window"
                metadata.prefill_ends.append(
                    PrefillEnd(tables, self._impl.options, slot, grant, stop, self._impl.kernel_backend)
                )
        rest = slice(run_start, common.num_reqs)
        self._add_dense(metadata, common, rest, alone=run_start == first_row)

    def _add_dense(
        self, metadata: HybridKVMetadata, common: CommonAttentionMetadata, rows: slice, *, alone: bool
    ) -> None:
        if rows.start < rows.stop:
            bounds = common.query_start_loc_cpu
            tokens = slice(int(bounds[rows.start]), int(bounds[rows.stop]))
            # FlashAttention 3 keeps its schedule in one buffer a builder: a second build of the step would
            # overwrite it, so only a run that is alone has one.
            built = self._dense.build(0, slice_rows(common, rows), fast_build=not alone)
            metadata.dense.append(DenseRows(tokens, built))

    def _replay(self, tables: RequestTables, slot: int, tokens: slice, computed: int) -> list[DecodeRows]:
        """A preempted request's generated tokens, computed again as they were: against the compressed prompt.

        Rare, and no decode step: allocations are in order here.
        """
        parts = []
        for start in range(tokens.start, tokens.stop, REPLAY_ROWS):
            stop = min(start + REPLAY_ROWS, tokens.stop)
            first_len = computed + 1 + start - tokens.start
            device = self.device
            row_slot = torch.full((stop - start,), slot, dtype=torch.int32, device=device)
            row_len = torch.arange(first_len, first_len + stop - start, dtype=torch.int32, device=device)
            decode_plan = None
            if self._impl.kernel_backend == "triton":
                decode_plan = make_replay_plan(tables, row_slot, row_len)
            parts.append(DecodeRows(slice(start, stop), row_slot, row_len, decode_plan, recalls=False))
        return parts
