"""What must hold before a server starts with HybridKV, and the few settings that follow from choosing it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from hybridkv_kernels.pages import HEAD_SIZES, MAX_CHUNKS, MAX_GROUP, supports_head_size

from hybridkv_vllm.config import ServerOptions, server_options
from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.profile import read_profile
from hybridkv_vllm.shapes import FULL_ATTENTION

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SYNC_SCHEDULER = "hybridkv_vllm.scheduling.scheduler.HybridKVScheduler"
ASYNC_SCHEDULER = "hybridkv_vllm.scheduling.scheduler.HybridKVAsyncScheduler"
# Options that only heads that recall chunks make use of.
FOR_RECALL = {
    "dynamic_share",
    "landmark",
    "host_pool_gib",
    "recall_interval",
    "pin_first_chunks",
    "pin_recent_chunks",
}


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether the server was asked for `--attention-backend hybridkv`."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = vllm_config.attention_config.backend
    return (
        backend is AttentionBackendEnum.CUSTOM
        and backend.is_overridden()
        and backend.get_path().startswith("hybridkv_vllm.")
    )


def configure(vllm_config: VllmConfig) -> None:
    """Checks the configuration and completes it; called at the end of vLLM's own checks.

    Raises:
        HybridKVConfigError: the first thing that cannot be served, with its remedy, in one line.
    """
    if vllm_config.model_config is None:
        return
    if not is_selected(vllm_config):
        _warn_of_idle_options(vllm_config)
        return
    options = server_options(vllm_config)
    for problem in _model_problems(vllm_config):
        raise HybridKVConfigError(f"{problem}; serve this model with another --attention-backend")
    for problem in _server_problems(vllm_config, options):
        raise HybridKVConfigError(problem)
    _check_host_pool(vllm_config, options)
    if options.profile is not None:
        read_profile(options.profile, *model_shape(vllm_config))
    if not vllm_config.cache_config.user_specified_block_size:
        vllm_config.cache_config.block_size = PAGE_TOKENS
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SYNC_SCHEDULER
    _log_options(options)


def model_shape(vllm_config: VllmConfig) -> tuple[int, int]:
    """Layers and KV heads of the whole model, over all ranks."""
    model = vllm_config.model_config
    return model.get_total_num_hidden_layers(), model.get_total_num_kv_heads()


def _warn_of_idle_options(vllm_config: VllmConfig) -> None:
    """Options without the flag do nothing, which nobody who gave them wants."""
    from vllm.logger import init_logger

    if isinstance(vllm_config.additional_config, dict) and "hybridkv" in vllm_config.additional_config:
        init_logger(f"vllm.{__name__}").warning_once(
            "hybridkv: options are given, but not --attention-backend hybridkv; nothing is compressed"
        )


def _log_options(options: ServerOptions) -> None:
    """Says once what the server will do."""
    from vllm.logger import init_logger

    given = ", ".join(f"{name}={value}" for name, value in options.model_dump(exclude_none=True).items())
    logger = init_logger(f"vllm.{__name__}")
    logger.info_once("hybridkv: %s", given)
    idle = sorted(options.model_fields_set & FOR_RECALL)
    if idle and options.recall_tier == "off":
        logger.warning_once("hybridkv: where no head recalls chunks these do nothing: %s", ", ".join(idle))


def _check_host_pool(vllm_config: VllmConfig, options: ServerOptions) -> None:
    """Refuses a host pool that this machine cannot hold before the engine starts.

    A worker checks its own machine too, but its line would drown in the tracebacks of three processes.

    Raises:
        HybridKVConfigError: see `requested_pool_bytes`.
    """
    if options.recall_tier != "host" or options.host_pool_gib is None:
        return
    from hybridkv_vllm.worker.host_tier import local_ranks, requested_pool_bytes

    requested_pool_bytes(options.host_pool_gib, local_ranks(vllm_config.parallel_config))


def _model_problems(vllm_config: VllmConfig) -> Iterator[str]:
    """What in the model itself HybridKV cannot serve."""
    model = vllm_config.model_config
    text = model.hf_text_config
    layer_types = set(getattr(text, "layer_types", None) or ())
    if model.use_mla:
        yield "the model uses multi-head latent attention (MLA)"
    if model.is_hybrid or model.is_attention_free:
        yield "the model has Mamba or linear-attention layers"
    if model.get_sliding_window() is not None or "sliding_attention" in layer_types:
        yield "the model uses sliding-window attention"
    if getattr(text, "attention_chunk_size", None) or "chunked_attention" in layer_types:
        yield "the model uses chunked local attention"
    # vLLM takes a hybrid model that it does not know itself for a plain Transformers model.
    if others := layer_types - FULL_ATTENTION:
        yield f"the model has layers of other kinds than full attention ({', '.join(sorted(others))})"
    if model.is_encoder_decoder:
        yield "the model is an encoder-decoder"
    if model.is_mm_prefix_lm:
        yield "the model attends to pictures in both directions"
    if model.runner_type != "generate":
        yield "pooling models have no decode to speed up"
    head_size = model.get_head_size()
    if not supports_head_size(head_size):
        yield f"head size {head_size} is not supported ({HEAD_SIZES})"
    heads = model.get_num_attention_heads(vllm_config.parallel_config)
    kv_heads = model.get_num_kv_heads(vllm_config.parallel_config)
    if heads > MAX_GROUP * kv_heads:
        yield f"{heads} query heads share {kv_heads} KV heads on a rank (at most {MAX_GROUP} may share one)"


def _server_problems(vllm_config: VllmConfig, options: ServerOptions) -> Iterator[str]:
    """What in the server's settings stands against HybridKV, each with its remedy."""
    from vllm import envs
    from vllm.config.cache import CacheDType
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    if vllm_config.is_mm_encoder_only:
        yield "an instance that only encodes pictures has no KV cache to compress; remove --attention-backend"
    if vllm_config.kv_transfer_config is not None:
        yield "KV connectors are not supported; remove --kv-transfer-config"
    if cache.kv_offloading_size is not None:  # vLLM makes a connector of it after this check.
        yield "KV offloading is not supported; remove --kv-offloading-size"
    if parallel.decode_context_parallel_size > 1:
        yield "context parallelism is not supported; remove --decode-context-parallel-size"
    if parallel.prefill_context_parallel_size > 1:
        yield "context parallelism is not supported; remove --prefill-context-parallel-size"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not supported; remove --speculative-config"
    if model.enable_sleep_mode:  # Sleeping at level 2 loses what a worker has allocated beside the weights.
        yield "sleep mode is not supported; remove --enable-sleep-mode"
    if parallel.use_ubatching:
        yield "micro-batching is not supported; remove --enable-dbo and --ubatch-size"
    if vllm_config.aux_output_config.enabled:  # 0.32 keeps room for as many tokens as the KV cache holds.
        yield "routed experts cannot be returned; remove --enable-return-routed-experts"
    if envs.VLLM_BATCH_INVARIANT:
        yield "batch-invariant answers are not supported; unset VLLM_BATCH_INVARIANT"
    # After what makes vLLM choose it by itself.
    if not vllm_config.use_v2_model_runner:
        remedy = "unset VLLM_USE_V2_MODEL_RUNNER or set it to 1"
        if envs.VLLM_USE_V2_MODEL_RUNNER is None:
            remedy = "vLLM's warning above says what it was chosen for"
        yield f"Model Runner V1 is not supported; {remedy}"
    dtype = str(model.dtype).removeprefix("torch.")
    # vLLM's layers read the checkpoint's scheme, after this check.
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    kv_dtype = "fp8" if scheme and cache.cache_dtype == "auto" else cache.cache_dtype
    if kv_dtype not in ("auto", dtype):
        remedy = f"set --kv-cache-dtype {dtype}"
        if dtype not in get_args(CacheDType):
            remedy = "remove --kv-cache-dtype, or set it and --dtype to bfloat16 where the checkpoint asks"
        yield f"KV cache dtype {kv_dtype!r} is not supported; {remedy}"
    if cache.user_specified_block_size and cache.block_size != PAGE_TOKENS:
        yield f"block size {cache.block_size} is not supported; remove --block-size or set it to 16"
    if options.kernels == "torch" and current_platform.is_cuda() and not model.enforce_eager:
        yield "option 'kernels' is torch, which CUDA graphs cannot hold; add --enforce-eager or use auto"
    if scheduler.scheduler_cls not in (None, SYNC_SCHEDULER, ASYNC_SCHEDULER):
        yield f"scheduler {scheduler.scheduler_cls!r} is not supported; remove --scheduler-cls"
    longest = PAGE_TOKENS * (MAX_CHUNKS + 1)
    if options.recall_tier != "off" and model.max_model_len >= longest:
        yield (
            f"heads recall in contexts below {longest:,} tokens only; lower --max-model-len "
            f"({model.max_model_len}), or set option 'dynamic_tier' to off"
        )
    # Running decodes come first in a step; what is left must hold a whole observation window.
    needed = options.window + scheduler.max_num_seqs
    room = scheduler.max_num_batched_tokens
    room = min(room, scheduler.max_num_scheduled_tokens or room)
    if room < needed:
        yield (
            f"option 'window' ({options.window}) and --max-num-seqs ({scheduler.max_num_seqs}) need "
            f"--max-num-batched-tokens (and --max-num-scheduled-tokens) of at least {needed}, not {room}; "
            "raise it, or lower one of them"
        )
    if 0 < scheduler.long_prefill_token_threshold < options.window:
        yield (
            f"--long-prefill-token-threshold ({scheduler.long_prefill_token_threshold}) is below option "
            f"'window' ({options.window}); raise it, or lower the window"
        )
