"""What HybridKV cannot serve is refused at the start, in one line that names the remedy."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.worker.gpu import model_states
from vllm.v1.worker.gpu.model_states.encoder_only import EncoderOnlyModelState

from hybridkv_vllm import startup
from hybridkv_vllm.attention.impl import HybridKVImpl
from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.plan import PAGE_TOKENS
from hybridkv_vllm.plugin import install_worker_hooks
from hybridkv_vllm.profile import HeadProfile
from hybridkv_vllm.startup import ASYNC_SCHEDULER, SYNC_SCHEDULER

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MOE = {"num_experts_per_tok": 1, "moe_intermediate_size": 64}
# Real architectures at a small size, each with one property that our cache cannot hold.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "mla": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        **MOE,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    "sliding window in every layer": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 512,
    },
    "sliding window in one layer": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 512,
        "max_window_layers": 1,
    },
    "mamba hybrid": {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "head_dim": 16,
        **MOE,
        "num_experts": 2,
        "shared_expert_intermediate_size": 64,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    # vLLM 0.32 dropped its own Bamba and takes it for a plain Transformers model.
    "mamba through transformers": {
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "chunked attention": {
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "attention_chunk_size": 512,
        "head_dim": 16,
        "num_local_experts": 2,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 1,
    },
    "encoder-decoder": {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_target_positions": 4096,
    },
    "pictures in both directions": {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "text_config": {**SMALL, "model_type": "gemma", "head_dim": 16},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 64,
        },
    },
    "head size 12": {**QWEN2, "hidden_size": 48},
    "17 query heads on a KV head": {**QWEN2, "hidden_size": 34 * 16, "num_attention_heads": 34},
    "plain": {**QWEN2},
    "sliding window switched off": {**QWEN2, "use_sliding_window": False, "sliding_window": 512},
}
SPECULATION = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def model_folder(root: Path, name: str) -> Path:
    """A folder with the configuration only: nothing is loaded before the checks."""
    folder = root / name.replace(" ", "-")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SMALL, "torch_dtype": "float32", **MODELS[name]}))
    return folder


def engine_config(model: Path, options: Mapping[str, Any] | None = None, **settings: Any) -> VllmConfig:
    """The whole configuration, checked as at every start; with `options` it asks for HybridKV."""
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "skip_tokenizer_init": True,
        **settings,
    }
    if options is not None:
        arguments["attention_backend"] = "hybridkv"
        arguments["additional_config"] = {"hybridkv": dict(options)}
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def refusal(model: Path, options: Mapping[str, Any], **settings: Any) -> str:
    """The one line of the refusal; the same settings pass without HybridKV, so our check refuses."""
    engine_config(model, **settings)
    with pytest.raises(HybridKVConfigError) as caught:
        engine_config(model, options, **settings)
    line = str(caught.value)
    assert line.startswith("hybridkv: ")
    assert "\n" not in line
    return line


def test_a_plain_configuration_passes_and_is_completed(tiny_model: Path) -> None:
    config = engine_config(tiny_model, {})
    scheduler = config.scheduler_config
    assert scheduler.scheduler_cls == (ASYNC_SCHEDULER if scheduler.async_scheduling else SYNC_SCHEDULER)
    assert config.cache_config.block_size == PAGE_TOKENS
    engine_config(tiny_model, {"budget": 1.0, "window": 32}, block_size=16)


@pytest.mark.parametrize("name", ["plain", "sliding window switched off"])
def test_text_models_pass(tmp_path: Path, name: str) -> None:
    assert engine_config(model_folder(tmp_path, name), {}).cache_config.block_size == PAGE_TOKENS


def test_without_our_backend_nothing_changes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = engine_config(tiny_model, additional_config={"hybridkv": {"budget": 7}})
    monkeypatch.setattr("hybridkv_vllm.plugin.configure", lambda _: None)
    stock = engine_config(tiny_model)
    assert loaded.scheduler_config.scheduler_cls is None
    assert loaded.attention_config.backend is None
    assert loaded.scheduler_config == stock.scheduler_config
    assert loaded.cache_config == stock.cache_config


@pytest.mark.parametrize("budget", [0, -1, 1.5, "abc", math.nan])
def test_a_budget_out_of_range(tiny_model: Path, budget: Any) -> None:
    line = refusal(tiny_model, {"budget": budget})
    assert f"option 'budget' is {budget!r}" in line
    assert "correct --additional-config.hybridkv" in line


def test_an_unknown_option(tiny_model: Path) -> None:
    line = refusal(tiny_model, {"bugdet": 0.1})
    assert "unknown option 'bugdet' (known: budget, classifier" in line


def test_an_unknown_tier(tiny_model: Path) -> None:
    line = refusal(tiny_model, {"dynamic_tier": "disk"})
    assert "option 'dynamic_tier' is 'disk': input should be 'host', 'gpu' or 'off'" in line


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"dynamic_tier": "off", "recall_interval": 2, "landmark": "mean"}, "landmark, recall_interval"),
        # A method that prunes every head, whatever the tier.
        (
            {"policy": "snapkv", "host_pool_gib": 1, "pin_recent_chunks": 1},
            "host_pool_gib, pin_recent_chunks",
        ),
        ({"dynamic_tier": "host", "host_pool_gib": 1, "recall_interval": 2}, None),
        ({"dynamic_tier": "off"}, None),
    ],
    ids=["tier off", "policy without recall", "used", "none given"],
)
def test_options_that_do_nothing_are_warned_about(
    tiny_model: Path,
    options: dict[str, Any],
    idle: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # vLLM sets its loggers up anew for each configuration: the check is repeated with them open.
    config = engine_config(tiny_model, {})
    monkeypatch.setattr(config, "additional_config", {"hybridkv": options})
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm.hybridkv_vllm.startup"):
        startup.configure(config)
    # Some versions of pytest listen to such loggers twice.
    records = [record for record in dict.fromkeys(caplog.records) if record.name.endswith("startup")]
    warnings = [record.getMessage() for record in records]
    assert warnings == ([f"hybridkv: where no head recalls chunks these do nothing: {idle}"] if idle else [])


def test_a_host_pool_larger_than_the_machine(tiny_model: Path) -> None:
    line = refusal(tiny_model, {"host_pool_gib": 1_000_000})
    assert "a host pool of 1000000 GiB for each of 1 ranks is more than the" in line
    assert line.endswith(
        "give a smaller --additional-config.hybridkv.host_pool_gib, or set "
        "--additional-config.hybridkv.dynamic_tier to gpu or off"
    )
    engine_config(tiny_model, {"host_pool_gib": 0.01})
    engine_config(tiny_model, {"host_pool_gib": 1_000_000, "dynamic_tier": "gpu"})
    with pytest.raises(HybridKVConfigError, match="for each of 2 ranks is more than"):
        engine_config(tiny_model, {"host_pool_gib": 1_000_000}, tensor_parallel_size=2)


def test_a_profile_of_another_model(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(
        HeadProfile(
            model="another", tasks=["chain"], tokens=1, prompts=1, share=0.1, moving=[[0.0]]
        ).model_dump_json()
    )
    assert "with 1 layers of 1 KV heads, but this model has" in refusal(tiny_model, {"profile": str(file)})
    assert "cannot be read" in refusal(tiny_model, {"profile": str(tmp_path / "none.json")})


def test_an_unknown_policy(tiny_model: Path) -> None:
    assert "choose one of" in refusal(tiny_model, {"policy": "best"})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mla", "multi-head latent attention (MLA)"),
        ("sliding window in every layer", "sliding-window attention"),
        ("sliding window in one layer", "sliding-window attention"),
        ("mamba hybrid", "Mamba or linear-attention layers"),
        ("mamba through transformers", "linear_attention"),
        ("chunked attention", "chunked local attention"),
        ("encoder-decoder", "the model is an encoder-decoder"),
        ("pictures in both directions", "attends to pictures in both directions"),
        ("head size 12", "head size 12 is not supported (16 to 256, a multiple of 8)"),
        ("17 query heads on a KV head", "34 query heads share 2 KV heads on a rank (at most 16 may"),
    ],
)
def test_models_that_cannot_be_served(tmp_path: Path, name: str, reason: str) -> None:
    line = refusal(model_folder(tmp_path, name), {})
    assert reason in line
    assert line.endswith("; serve this model with another --attention-backend")


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"kv_transfer_config": CONNECTOR}, "remove --kv-transfer-config"),
        ({"kv_offloading_size": 1.0}, "remove --kv-offloading-size"),
        (
            {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
            "remove --decode-context-parallel-size",
        ),
        ({"prefill_context_parallel_size": 2}, "remove --prefill-context-parallel-size"),
        ({"speculative_config": SPECULATION}, "remove --speculative-config"),
        ({"mm_encoder_only": True}, "remove --attention-backend"),
        ({"block_size": 32}, "remove --block-size or set it to 16"),
        (
            {"kv_cache_dtype": "fp8"},
            "remove --kv-cache-dtype, or set it and --dtype to bfloat16 where the checkpoint asks",
        ),
        ({"kv_cache_dtype": "fp8", "dtype": "bfloat16"}, "set --kv-cache-dtype bfloat16"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "remove --scheduler-cls"),
        (
            {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64},
            "of at least 72, not 64; raise it, or lower one of them",
        ),
        (
            {"max_num_seqs": 8, "max_num_scheduled_tokens": 48},
            "of at least 72, not 48; raise it, or lower one of them",
        ),
        (
            {"long_prefill_token_threshold": 32},
            "-token-threshold (32) is below option 'window' (64); raise it, or lower the window",
        ),
        ({"runner": "pooling"}, "serve this model with another --attention-backend"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_be_served(tiny_model: Path, settings: dict[str, Any], remedy: str) -> None:
    assert refusal(tiny_model, {}, **settings).endswith(remedy)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "ignore": []},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {},
            "ignore": [],
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        },
    ],
    ids=lambda value: value["quant_method"],
)
def test_a_checkpoint_that_asks_for_another_kv_cache(tmp_path: Path, quantization: dict[str, Any]) -> None:
    """Nobody has set the flag: the remedy is to set it."""
    folder = model_folder(tmp_path, "plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    line = refusal(folder, {}, dtype="bfloat16")
    assert "KV cache dtype 'fp8" in line
    assert line.endswith("set --kv-cache-dtype bfloat16")
    engine_config(folder, {}, dtype="bfloat16", kv_cache_dtype="bfloat16")


def test_micro_batching(tmp_path: Path) -> None:
    """Of a text model: with one for pictures vLLM refuses it itself."""
    line = refusal(model_folder(tmp_path, "plain"), {}, ubatch_size=2, all2all_backend="deepep_low_latency")
    assert line.endswith("remove --enable-dbo and --ubatch-size")


def test_torch_kernels_under_cuda_graphs(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(tiny_model, {"kernels": "torch"})
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    with pytest.raises(HybridKVConfigError, match="cannot hold; add --enforce-eager or use auto"):
        startup.configure(config)
    startup.configure(engine_config(tiny_model, {"kernels": "torch"}, enforce_eager=True))


def test_sleep_mode(tiny_model: Path) -> None:
    """vLLM itself refuses it on a CPU."""
    config = engine_config(tiny_model, {})
    config.model_config.enable_sleep_mode = True
    with pytest.raises(HybridKVConfigError, match="remove --enable-sleep-mode"):
        startup.configure(config)


def test_heads_recall_in_contexts_of_less_than_a_million_tokens(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2**20: the last that fit, one token more, and that again where no head recalls."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    engine_config(tiny_model, {}, max_model_len=2**20 - 1)
    line = refusal(tiny_model, {}, max_model_len=2**20)
    assert line.endswith("lower --max-model-len (1048576), or set option 'dynamic_tier' to off")
    engine_config(tiny_model, {"dynamic_tier": "off"}, max_model_len=2**20)


def test_a_model_with_a_state_of_its_own(tiny_model: Path) -> None:
    """Found by a worker: the class is known when the model is built."""

    class Model(torch.nn.Module):
        def get_model_state_cls(self) -> type:
            return EncoderOnlyModelState

    install_worker_hooks()
    assert model_states.resolve_model_state_cls(engine_config(tiny_model), Model()) is EncoderOnlyModelState
    with pytest.raises(HybridKVConfigError, match=r"its own state \(EncoderOnlyModelState\); serve it with"):
        model_states.resolve_model_state_cls(engine_config(tiny_model, {}), Model())


@pytest.mark.parametrize(
    ("layer", "feature"),
    [
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"sliding_window": 512}, "sliding-window attention"),
        ({"logits_soft_cap": 30.0}, "logits soft cap"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "KV sharing between layers"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "encoder_decoder attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_attend_in_another_way(layer: dict[str, Any], feature: str) -> None:
    """Found by a worker: only the model's code knows."""
    expected = f"{feature} is not supported; serve this model with another --attention-backend"
    with pytest.raises(HybridKVConfigError, match=expected):
        HybridKVImpl(4, 64, 0.125, 2, **layer)


def test_the_window_has_its_room_exactly(tiny_model: Path) -> None:
    room = {"max_num_seqs": 8, "max_model_len": 64}
    engine_config(tiny_model, {"window": 56}, max_num_batched_tokens=64, **room)
    assert "of at least 65, not 64" in refusal(tiny_model, {"window": 57}, max_num_batched_tokens=64, **room)


def test_model_runner_v1(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    envs.disable_envs_cache()  # An engine started earlier in this process has frozen the variables.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert refusal(tiny_model, {}).endswith("unset VLLM_USE_V2_MODEL_RUNNER or set it to 1")
    # vLLM takes it for some kinds of this, which is what to change then.
    assert refusal(tiny_model, {}, speculative_config=SPECULATION).endswith("remove --speculative-config")


def test_model_runner_v1_by_choice_of_vllm(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsetting a variable that is not set would help nobody."""
    config = engine_config(tiny_model, {})
    envs.disable_envs_cache()
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    config.parallel_config.distributed_executor_backend = "external_launcher"
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(HybridKVConfigError, match="vLLM's warning above says what it was chosen for"):
        startup.configure(config)


def test_batch_invariant_answers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert refusal(tiny_model, {}).endswith("unset VLLM_BATCH_INVARIANT")


def test_returned_routed_experts(tiny_model: Path) -> None:
    """vLLM itself refuses it for a model without experts."""
    config = engine_config(tiny_model, {})
    config.aux_output_config.enable_return_routed_experts = True
    with pytest.raises(HybridKVConfigError, match="remove --enable-return-routed-experts"):
        startup.configure(config)


def test_async_scheduling_gets_the_async_scheduler(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(tiny_model, {})
    # The CPU platform turns it off; on a GPU it is on by default when our check runs.
    monkeypatch.setattr(config.scheduler_config, "async_scheduling", True)
    startup.configure(config)
    assert config.scheduler_config.scheduler_cls == ASYNC_SCHEDULER


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--additional-config.hybridkv.budget", "1.5"], "hybridkv: option 'budget' is 1.5: "),
        (["--additional-config.hybridkv.bugdet", "0.5"], "hybridkv: unknown option 'bugdet' (known: "),
        (["--additional-config", '{"hybridkv": {"budget": NaN}}'], "hybridkv: option 'budget' is nan: "),
        (["--additional-config.hybridkv.host_pool_gib", "1000000"], "hybridkv: a host pool of 1000000 GiB "),
    ],
    ids=["out of range", "unknown name", "not a number", "more than the machine"],
)
def test_vllm_serve_prints_the_one_line_last(tiny_model: Path, arguments: list[str], expected: str) -> None:
    vllm = Path(sys.executable).with_name("vllm")
    # As on a user's command line: without what conftest.py sets for tests, and all plugins allowed.
    own = ("VLLM_LOGGING_LEVEL", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_PLUGINS", "HYBRIDKV_METRICS_DIR")
    done = subprocess.run(
        [vllm, "serve", tiny_model, "--attention-backend", "hybridkv", *arguments],
        env={name: value for name, value in os.environ.items() if name not in own},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(expected)
    assert "Traceback" not in done.stderr + done.stdout
