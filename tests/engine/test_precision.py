"""Weights of other types, in the trained model: it reads what it is shown, at a tenth of the prompt's KV."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engines import engine
from hybridkv_quality.chat import engine_chat
from hybridkv_quality.model_path import model_folder
from hybridkv_quality.tasks import suite_samples
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import SamplingParams
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    awq_pack,
    gptq_pack,
    pack_cols,
    quantize_weights,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from hybridkv_vllm.observe.heads import read_requests

pytestmark = pytest.mark.slow

# Inputs of a projection that share a scale, in 4 bits.
GROUP = 32
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


def compressed_tensors(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """What llm-compressor writes into a checkpoint's configuration."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*visual.*"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"symmetric": True, "dynamic": False, **weights},
                "input_activations": inputs and {"symmetric": True, "dynamic": True, **inputs},
            }
        },
    }


def eight_bits(layout: str, kind: str) -> dict[str, Any]:
    """A scale for each output, and for each token of the input."""
    number = {"num_bits": 8, "type": kind}
    return compressed_tensors(layout, {**number, "strategy": "channel"}, {**number, "strategy": "token"})


def int8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / LARGEST_FP8
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def int4(weight: Tensor) -> dict[str, Tensor]:
    _, values, scale, _ = quantize_weights(weight.T, scalar_types.uint4b8, GROUP)
    return {
        "weight_packed": gptq_pack(values, 4, *values.shape).T,
        "weight_scale": scale.T.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def gptq(weight: Tensor) -> dict[str, Tensor]:
    _, values, scale, _ = quantize_weights(weight.T, scalar_types.uint4b8, GROUP)
    # The format holds what to add to 1 for zero, which is 8.
    zero = torch.full_like(scale, 7)
    return {
        "qweight": gptq_pack(values, 4, *values.shape),
        "qzeros": pack_cols(zero, 4, *zero.shape),
        "scales": scale.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def awq(weight: Tensor) -> dict[str, Tensor]:
    _, values, scale, zero = quantize_weights(weight.T, scalar_types.uint4, GROUP, zero_points=True)
    return {
        "qweight": awq_pack(values, 4, *values.shape),
        "qzeros": awq_pack(zero, 4, *zero.shape),
        "scales": scale.half(),
    }


class Quantization(NamedTuple):
    """How a decoder's weights are written, and what the checkpoint says of it."""

    quantize: Callable[[Tensor], dict[str, Tensor]]
    config: dict[str, Any]


QUANTIZATIONS = {
    "int8": Quantization(int8, eight_bits("int-quantized", "int")),
    "FP8": Quantization(fp8, eight_bits("float-quantized", "float")),
    "int4": Quantization(
        int4,
        compressed_tensors(
            "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}, None
        ),
    ),
    "GPTQ": Quantization(
        gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "dynamic": {"-:.*visual.*": {}},
        },
    ),
    "AWQ": Quantization(
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["visual"],
        },
    ),
}


def write_quantized(name: str, out: Path) -> Path:
    """Writes the trained model with its decoder's weights in another type."""
    model, (quantize, config) = model_folder(), QUANTIZATIONS[name]
    shutil.copytree(model, out)
    weights = {}
    for key, weight in load_file(model / "model.safetensors").items():
        layer, is_projection = key.removesuffix(".weight"), key.endswith("_proj.weight")
        if is_projection and "visual" not in key:
            parts = quantize(weight.float())
            weights.update({f"{layer}.{part}": value.contiguous() for part, value in parts.items()})
        else:
            weights[key] = weight
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
    return out


needs_avx512 = pytest.mark.skipif(
    current_platform.is_cpu() and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="vLLM's CPU build multiplies weights of 4 bits with AVX-512 only",
)


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        ("as published", "float16"),
        ("int8", "bfloat16"),
        ("FP8", "bfloat16"),
        pytest.param("int4", "bfloat16", marks=needs_avx512),
        pytest.param("GPTQ", "bfloat16", marks=needs_avx512),
        pytest.param("AWQ", "bfloat16", marks=needs_avx512),
    ],
)
def test_answers_are_right(weights: str, dtype: str, tmp_path: Path) -> None:
    model = model_folder() if weights == "as published" else write_quantized(weights, tmp_path / "model")
    samples = list(suite_samples(["recall"], tokens=1024, contexts=3))
    settings = {"dtype": dtype, "limit_mm_per_prompt": {"image": 16}}
    with engine(model, options={"budget": 0.1}, **settings) as ours:
        for sample in samples:
            params = SamplingParams(temperature=0, max_tokens=sample.max_tokens)
            (output,) = ours.llm.chat(engine_chat(sample), params, use_tqdm=False)
            assert output.outputs[0].text.strip() == sample.answer
        ours.assert_empty()
        reports = read_requests()[: len(samples)]
    assert len(reports) == len(samples)
    assert all(report.blocks_freed > 4 * report.arena_blocks for report in reports)
    assert all(report.recalled_share > 0 for report in reports)
