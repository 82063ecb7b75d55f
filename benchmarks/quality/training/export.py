"""Writes a trained model as a folder that vLLM and Transformers load."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from hybridkv_vllm.tiny_model import CHAT_TEMPLATE, build_processor


def write_folder(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, out: Path) -> None:
    """Config, weights (bfloat16), tokenizer, processors and chat template."""
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        pad_token_id=text.pad_token_id,
    )
    rounded = Qwen2_5_VLForConditionalGeneration(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(out)
    processor = build_processor(tokenizer, CHAT_TEMPLATE)
    processor.save_pretrained(out)
    # processor_config.json holds these too, but older readers look for files of their own.
    processor.image_processor.save_pretrained(out)
    processor.video_processor.save_pretrained(out)
