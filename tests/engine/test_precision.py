"""Weights of other types, in the trained model: it reads what it is shown, at a tenth of the prompt's KV."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engines import engine
from hybridkv_quality.chat import engine_chat
from hybridkv_quality.model_path import model_folder
from hybridkv_quality.tasks import suite_samples
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from hybridkv_vllm.observe.heads import read_requests

pytestmark = pytest.mark.slow

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*visual.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def write_int8(model: Path, out: Path) -> Path:
    """Writes `model` with the decoder's weights in int8, a scale for each output, as llm-compressor does."""
    shutil.copytree(model, out)
    weights = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight") and "visual" not in name:
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            weights[f"{name}_scale"] = scale
            weights[name] = (weight / scale).round().to(torch.int8)
        else:
            weights[name] = weight
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    return out


@pytest.mark.parametrize(("weights", "dtype"), [("int8", "bfloat16"), ("as published", "float16")])
def test_answers_are_right(weights: str, dtype: str, tmp_path: Path) -> None:
    model = write_int8(model_folder(), tmp_path / "int8") if weights == "int8" else model_folder()
    samples = list(suite_samples(["recall"], tokens=1024, contexts=3))
    settings = {"dtype": dtype, "limit_mm_per_prompt": {"image": 16}}
    with engine(model, options={"budget": 0.1}, **settings) as ours:
        for sample in samples:
            params = SamplingParams(temperature=0, max_tokens=sample.max_tokens)
            (output,) = ours.llm.chat(engine_chat(sample), params, use_tqdm=False)
            assert output.outputs[0].text.strip() == sample.answer
        ours.assert_empty()
        reports = read_requests()[: len(samples)]
    assert all(report.blocks_freed > 4 * report.arena_blocks for report in reports)
    assert all(report.recalled_share > 0 for report in reports)
