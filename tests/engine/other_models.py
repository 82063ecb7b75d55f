"""Small models of other architectures than Qwen2.5-VL, with random weights and the small tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

HIDDEN, TILE = 128, 112
TILED = {"height": TILE, "width": TILE}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"
# Standard deviation of a layer's output where its input has 1; large logits keep greedy decoding from
# turning on rounding.
OUTPUT_STD, LOGIT_STD = 1.5, 16.0

Built = tuple[PreTrainedModel, ProcessorMixin | None]


def _text(tokenizer: Qwen2Tokenizer, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        **more,
    }


def _qwen3_vl(
    tokenizer: Qwen2Tokenizer,
    config_class: type[PreTrainedConfig],
    model_class: type[PreTrainedModel],
    **text: Any,
) -> Built:
    patch, merge = 16, 2
    pixels = (patch * merge) ** 2
    grid = {
        "size": {"shortest_edge": 4 * pixels, "longest_edge": 1280 * pixels},
        "patch_size": patch,
        "merge_size": merge,
        "temporal_patch_size": 2,
    }
    rope = {
        "rope_type": "default",
        "rope_theta": 1_000_000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
    config = config_class(
        architectures=[model_class.__name__],
        text_config=_text(tokenizer, head_dim=32, rope_parameters=rope, **text),
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 2,
            "patch_size": patch,
            "out_hidden_size": HIDDEN,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 256,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid),
        video_processor=Qwen3VLVideoProcessor(**grid),
        tokenizer=tokenizer,
    )
    return model_class(config), processor


def qwen3_vl(tokenizer: Qwen2Tokenizer) -> Built:
    """Interleaved M-RoPE, normed queries and keys, features in several layers, timestamps before frames."""
    return _qwen3_vl(tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration)


def qwen3_vl_moe(tokenizer: Qwen2Tokenizer) -> Built:
    """The same with experts, of which each token takes two."""
    return _qwen3_vl(
        tokenizer,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )


def llava_onevision(tokenizer: Qwen2Tokenizer) -> Built:
    """Plain RoPE; a picture is an overview, tiles, and a newline's token after each row."""
    grids = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
    config = LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config={
            "model_type": "siglip_vision_model",
            **TOWER,
            "image_size": TILE,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=TILED, image_grid_pinpoints=grids),
        video_processor=LlavaOnevisionVideoProcessor(size=TILED),
        tokenizer=tokenizer,
        num_image_tokens=(TILE // 14) ** 2,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        video_token=VIDEO,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def internvl(tokenizer: Qwen2Tokenizer) -> Built:
    """Plain RoPE; a picture is up to six tiles of 16 tokens, and an overview."""
    config = InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config={**TOWER, "image_size": [TILE, TILE], "patch_size": [14, 14]},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        downsample_ratio=0.5,
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=TILED, crop_to_patches=True, max_patches=6),
        video_processor=InternVLVideoProcessor(size=TILED),
        tokenizer=tokenizer,
        image_seq_length=16,
    )
    return InternVLForConditionalGeneration(config), processor


def llama(tokenizer: Qwen2Tokenizer) -> Built:
    """Text alone."""
    config = LlamaConfig(architectures=["LlamaForCausalLM"], **_text(tokenizer))
    return LlamaForCausalLM(config), None


MODELS: Mapping[str, Callable[[Qwen2Tokenizer], Built]] = {
    "Qwen3-VL": qwen3_vl,
    "Qwen3-VL-MoE": qwen3_vl_moe,
    "LLaVA-OneVision": llava_onevision,
    "InternVL": internvl,
    "Llama": llama,
}


def write_model(name: str, tiny_model: Path, out: Path) -> Path:
    """Writes what vLLM loads of `MODELS[name]`, with the tokenizer of `tiny_model`; returns `out`."""
    tokenizer = Qwen2Tokenizer.from_pretrained(
        tiny_model,
        # InternVL's processor asks its tokenizer for these.
        extra_special_tokens={
            "start_image_token": START,
            "end_image_token": END,
            "context_image_token": IMAGE,
            "video_token": VIDEO,
        },
    )
    with torch.random.fork_rng(devices=[]):
        model, processor = MODELS[name](tokenizer)
    _fill(model)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    if processor is None:
        tokenizer.save_pretrained(out)
    else:
        processor.save_pretrained(out)
        # processor_config.json holds it too, but vLLM looks for a file of its own.
        processor.image_processor.save_pretrained(out)
    _write_as_published(name, out / "model.safetensors")
    return out


@torch.no_grad()
def _fill(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, module in sorted(model.named_modules()):
        if isinstance(module, nn.Embedding):
            module.weight.normal_(generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            std = LOGIT_STD if name.endswith("lm_head") else OUTPUT_STD
            module.weight.normal_(std=std * module.weight[0].numel() ** -0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(std=0.1, generator=generator)
    for name, weight in sorted(model.named_parameters()):
        if ".experts." in name or name.endswith("mlp.gate.weight"):
            weight.normal_(std=OUTPUT_STD * weight.shape[-1] ** -0.5, generator=generator)


def _write_as_published(name: str, file: Path) -> None:
    """Undoes what Transformers 5 writes in another way than the checkpoints that vLLM knows."""
    weights = load_file(file)
    if name == "LLaVA-OneVision":
        weights = {
            key.replace("vision_tower.", "vision_tower.vision_model."): weights[key] for key in weights
        }
    elif name == "Qwen3-VL-MoE":
        weights = {
            key: weight.mT.contiguous() if ".experts." in key else weight for key, weight in weights.items()
        }
    save_file(weights, file, metadata={"format": "pt"})
