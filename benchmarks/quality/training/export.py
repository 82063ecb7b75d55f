"""Writes a trained model as a folder that vLLM and Transformers load."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from hybridkv_vllm.tiny_model import CHAT_TEMPLATE, save_model


def write_folder(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, out: Path) -> None:
    """Config, weights (bfloat16; the model keeps its own), tokenizer, processors and chat template."""
    rounded = Qwen2_5_VLForConditionalGeneration(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    save_model(rounded, tokenizer, CHAT_TEMPLATE, out)
