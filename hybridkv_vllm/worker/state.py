"""The model state: vLLM's per-request hooks on the worker, kept in step with our tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hybridkv_kernels.extent_decode import DecodePlan, extent_decode
from hybridkv_kernels.recall.landmarks import Landmarks
from vllm.config import get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from hybridkv_vllm.attention.impl import HybridKVImpl
from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.observe.heads import heads_report
from hybridkv_vllm.observe.metrics import worker_metrics
from hybridkv_vllm.plan import PAGE_TOKENS, ArenaGrant, PromptPlan, make_plan
from hybridkv_vllm.profile import read_profile
from hybridkv_vllm.startup import model_shape
from hybridkv_vllm.worker.compress import PrefillEnd
from hybridkv_vllm.worker.compression_log import CompressionLog
from hybridkv_vllm.worker.host_tier import (
    GIB,
    HostTier,
    default_pool_bytes,
    local_ranks,
    requested_pool_bytes,
    store_block_bytes,
)
from hybridkv_vllm.worker.recall import RecallState
from hybridkv_vllm.worker.tables import (
    CacheShape,
    RequestTables,
    make_decode_plan,
    make_replay_plan,
    page_pool,
)

# Long enough for a few tiles of every kernel.
MIN_WARM_UP_TOKENS = 256
WARM_UP_BUDGET = 0.6

# vLLM configures loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")


def _cache_shape(layers: Sequence[Attention]) -> CacheShape:
    """Of layers that are all alike."""
    impl: HybridKVImpl = layers[0].impl
    return CacheShape(
        num_layers=len(layers),
        num_kv_heads=impl.num_kv_heads,
        num_query_heads=impl.num_heads,
        head_size=impl.head_size,
    )


class HybridKVModelState(DefaultModelState):
    """vLLM's default model state plus the tables of compressed prompts (hooks read in 0.32.0 and 0.33.0)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables: RequestTables | None = None
        self._log: CompressionLog | None = None
        self._slots: dict[str, int] = {}
        self._host_tier_bytes = 0
        self._next_step_is_real = False
        # Now, so that vLLM counts these buffers when it measures what is left for the cache.
        self._recall: RecallState | None = None
        self._decode_plan: DecodePlan | None = None
        layers = self._attention_layers()
        if layers:
            self._recall = self._make_recall(layers)
            if self._recall is None and layers[0].impl.kernel_backend == "triton":
                self._decode_plan = make_decode_plan(_cache_shape(layers), self.max_num_reqs, self.device)

    def _attention_layers(self) -> list[Attention]:
        """This rank's layers that use this backend."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention).values()
        return [layer for layer in layers if isinstance(layer.impl, HybridKVImpl)]

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Builds the tables over the cache that vLLM has just bound, and hands them to every layer.

        Raises:
            HybridKVConfigError: the model's layers need more than one kind of KV cache.
        """
        super().initialize_kv_cache(kv_cache_config, block_tables)
        layers = sorted(self._attention_layers(), key=lambda layer: layer.kv_cache.storage_offset())
        if len(kv_cache_config.kv_cache_groups) != 1 or not layers:
            raise HybridKVConfigError(
                "the model's layers need different kinds of KV cache; serve it with another "
                "--attention-backend"
            )
        impl: HybridKVImpl = layers[0].impl
        shape = _cache_shape(layers)
        pool = page_pool([layer.kv_cache for layer in layers], shape)
        if self._recall is not None and impl.options.recall_tier == "host":
            self._attach_host_tier(self._recall, shape, pool)
        self._tables = RequestTables.create(
            shape,
            pool,
            block_tables.block_tables[0].gpu,
            max_rows=self.max_num_reqs,
            plan=self._decode_plan,
            recall=self._recall,
            profile=self._read_profile(layers, shape, impl.options),
        )
        parallel = self.vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        tp_rank = get_tp_group().rank_in_group
        heads = heads_report(parallel.data_parallel_index, get_pp_group().rank_in_group, tp_rank)
        self._log = CompressionLog(worker_metrics(ranks, tp_rank), heads, self._recall, self.device)
        for index, layer in enumerate(layers):
            layer.impl.bind(self._tables, index, self._log)
        if impl.kernel_backend == "triton":
            self._warm_up_prefill_end(self._tables, impl)
            self._warm_up_replay(self._tables, impl)

    def _read_profile(
        self, layers: Sequence[Attention], shape: CacheShape, options: ServerOptions
    ) -> torch.Tensor | None:
        """What the option `profile` says of this rank's heads, `[L, H]` fp32."""
        if options.profile is None:
            return None
        profile = read_profile(options.profile, *model_shape(self.vllm_config))
        # With more ranks than KV heads vLLM gives neighbouring ranks the same head.
        tp = get_tp_group()
        first = tp.rank_in_group * profile.shape[1] // tp.world_size
        numbers = [extract_layer_index(layer.layer_name) for layer in layers]
        figures = profile.figures(numbers, range(first, first + shape.num_kv_heads))
        return torch.tensor(figures, dtype=torch.float32, device=self.device)

    def _make_recall(self, layers: Sequence[Attention]) -> RecallState | None:
        """What heads need to recall chunks, but for the host tier; None where the options let none do so."""
        impl: HybridKVImpl = layers[0].impl
        options, shape = impl.options, _cache_shape(layers)
        if options.recall_tier == "off":
            return None
        dtype = layers[0].kv_cache_torch_dtype
        return RecallState.create(
            shape,
            options,
            Landmarks.create(options.landmark_kind, shape.head_size, dtype, self.device),
            slots=self.max_num_reqs,
            max_rows=self.max_num_reqs,
            max_chunks=max(self.vllm_config.model_config.max_model_len // PAGE_TOKENS, 1),
            backend=impl.kernel_backend,
            device=self.device,
        )

    def _attach_host_tier(self, recall: RecallState, shape: CacheShape, pool: torch.Tensor) -> None:
        """Gives it a host tier for a cache of this size.

        Raises:
            HybridKVConfigError: the host memory is not to be had.
        """
        options, ranks = recall.options, local_ranks(self.vllm_config.parallel_config)
        if options.host_pool_gib is None:
            # The cache of vLLM's graph profiling can be a single block.
            least = store_block_bytes(shape.head_size, pool.dtype)
            num_bytes = max(least, default_pool_bytes(pool.nbytes, options.budget_share, ranks))
        else:
            num_bytes = requested_pool_bytes(options.host_pool_gib, ranks)
        # That cache comes first, and pinning takes seconds.
        if recall.tier is None or self._host_tier_bytes != num_bytes:
            # The old one goes before the new one comes.
            recall.tier = None
            recall.tier = HostTier.create(num_bytes, shape.head_size, pool.dtype, self.device)
            self._host_tier_bytes = num_bytes
            logger.info("hybridkv: host pool of %.2f GiB for the chunks of dynamic heads", num_bytes / GIB)

    def _warm_up_prefill_end(self, tables: RequestTables, impl: HybridKVImpl) -> None:
        """Compiles what the end of a prefill launches: vLLM's own warm-up holds no compressed prompt.

        The cache is empty yet, and block 0, which all of slot 0 points at, is nobody's.
        """
        shape, options, slot = tables.shape, impl.options, 0
        num_tokens = min(max(options.window, MIN_WARM_UP_TOKENS), self.vllm_config.model_config.max_model_len)
        if num_tokens < PAGE_TOKENS:
            return
        plan = warm_up_plan(num_tokens, options)
        tables.grants[slot] = grant = ArenaGrant("warm-up", plan, (0,) * plan.arena_size)
        null_block = tables.pool[: shape.num_layers * shape.num_kv_heads]
        null_block.zero_()
        query = torch.zeros(
            num_tokens, shape.num_query_heads, shape.head_size, dtype=tables.pool.dtype, device=self.device
        )
        end = PrefillEnd(tables, options, slot, grant, num_tokens, impl.kernel_backend)
        for layer in range(shape.num_layers):
            end.score(query, layer, impl.scale)
        end.compress()
        # Landmarks are bytes that may look like NaN.
        null_block.zero_()
        tables.reset(slot)

    def _warm_up_replay(self, tables: RequestTables, impl: HybridKVImpl) -> None:
        """Compiles what a replay of several tokens launches: where heads recall, no other step does.

        Its one row is padding, so that no page is read.
        """
        shape, rows = tables.shape, 1
        row_slot = torch.full((rows,), -1, dtype=torch.int32, device=self.device)
        row_len = torch.zeros_like(row_slot)
        plan = make_replay_plan(tables, row_slot, row_len)
        # A launch after the plan's, which an early one reads ahead.
        query = torch.zeros(
            rows, shape.num_query_heads, shape.head_size, dtype=tables.pool.dtype, device=self.device
        )
        extent_decode(
            query,
            tables.pool,
            torch.empty_like(query),
            row_slot,
            row_len,
            tables.decode,
            0,
            impl.scale,
            plan,
            backend=impl.kernel_backend,
            early=True,
        )

    def accept_grants(self, grants: Sequence[ArenaGrant]) -> None:
        """Takes the arenas of the step about to run (called by the runner patch, see plugin.py)."""
        assert self._tables is not None
        for grant in grants:
            self._tables.grant(self._slots[grant.request_id], grant)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request takes a slot."""
        super().add_request(req_index, new_req_data)
        self._slots[new_req_data.req_id] = req_index

    def remove_request(self, req_id: str) -> None:
        """A request finished or was preempted: its slot's tables are empty again."""
        super().remove_request(req_id)
        slot = self._slots.pop(req_id, None)
        if slot is not None and self._tables is not None and self._log is not None:
            if slot in self._tables.grants:
                self._log.end(req_id, slot)
            self._tables.reset(slot)
            if not self._slots:
                self._log.drain()

    def preprocess_state(self, *args: Any, **kwargs: Any) -> None:
        """vLLM calls this for real batches only, just before `prepare_attn`."""
        super().preprocess_state(*args, **kwargs)
        self._next_step_is_real = True
        if self._log is not None:
            self._log.collect()

    def prepare_attn(
        self, input_batch: InputBatch, cudagraph_mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Notes the rows' slots, then lets vLLM build the metadata."""
        if self._tables is not None:
            slots: torch.Tensor | None = None
            if self._next_step_is_real:
                slots = input_batch.idx_mapping[: input_batch.num_reqs]
            self._tables.begin_step(slots, input_batch.num_reqs_after_padding)
        self._next_step_is_real = False
        return super().prepare_attn(input_batch, cudagraph_mode, *args, **kwargs)


def warm_up_plan(num_tokens: int, options: ServerOptions) -> PromptPlan:
    """A prompt whose heads recall, if a request's may: whatever the server's budget, a request has its own.

    A small budget of so short a prompt has no room for landmarks, and one of everything recalls nothing.
    """
    budget = options.budget_share if options.recall_tier == "off" else WARM_UP_BUDGET
    return make_plan(num_tokens, (), budget, options.window, options.recall_tier)
