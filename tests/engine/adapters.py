"""LoRA adapters of the tiny model, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hybridkv_vllm.tiny_model import HEAD_SIZE, HEADS, HIDDEN, KV_HEADS

LAYERS = 4  # The tiny model's.


def write_adapter(folder: Path, seed: int) -> Path:
    """Writes a LoRA adapter that changes the tiny model's queries and values; returns where it lies."""
    generator, rank, weights = torch.Generator().manual_seed(seed), 8, {}
    outputs = {"q_proj": HEADS * HEAD_SIZE, "v_proj": KV_HEADS * HEAD_SIZE}
    for layer in range(LAYERS):
        for projection, size in outputs.items():
            name = f"base_model.model.model.language_model.layers.{layer}.self_attn.{projection}"
            down = torch.randn(rank, HIDDEN, generator=generator) * HIDDEN**-0.5
            weights[f"{name}.lora_A.weight"] = down
            weights[f"{name}.lora_B.weight"] = torch.randn(size, rank, generator=generator)
    out = folder / str(seed)
    out.mkdir()
    save_file(weights, out / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(outputs)}
    (out / "adapter_config.json").write_text(json.dumps({**adapter, "bias": "none"}))
    return out
