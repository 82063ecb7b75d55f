"""Writes a small Qwen2.5-VL with random weights, which Transformers and vLLM load like the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

# In config.json; says that the folder may be overwritten.
MARK = "hybridkv_tiny_model"

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 256, 4, 2, 64
# Frequencies of M-RoPE for time, height and width, in the real model's proportion.
MROPE_SECTION = (8, 12, 12)
MAX_POSITIONS = 32768
BPE_TOKENS = 952
PATCH, MERGE, TEMPORAL_PATCH = 14, 2, 2
# Pixels of a picture or a frame: 4 to 1280 visual tokens.
PIXELS = {"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": 1280 * (PATCH * MERGE) ** 2}

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

SYSTEM_PROMPT = """\
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type in ('image', 'image_url') -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type in ('video', 'video_url') -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# What the tokenizer learns its pieces from.
CORPUS = """\
A photograph holds more than anyone can say about it. In the morning a woman in a dark blue uniform stands
before a flag; behind her the light is soft and the wall is grey. What is in the picture? Who is she, and what
does she wear? How many people are there, where do they look, and which of them is the tallest? The answer is
short, but the question needs every part of the image: the hat, the glasses, the buttons, the stripes.

Describe the scene in one sentence. A small harbour lies under heavy clouds. Two boats with red sails leave
the pier while a third one waits; gulls circle above the lighthouse, and along the street children walk home
from school. Read the text on the sign. Count the windows of the house on the left, then compare the colours
of the doors. Is the cat on the table or under the chair? Which bottle is empty? Explain your answer.

The video begins in a kitchen. First somebody opens a drawer and takes out a knife; then an onion, a carrot
and some bread are put on a wooden board. After ten seconds the camera moves to the stove, where water boils.
What happens next? When does the person with the yellow apron come back? List the steps in their order.

Please summarise this document. On page three the table shows the sales of the last four years: the numbers
grow from 120 to 345, fall to 289 and reach 678 at the end. The chart below it gives the same values as bars.
Write a short letter to the author and ask for the missing figures. Thank you very much for your help.

A language model reads a prompt once and keeps a key and a value for each token, in every layer and for every
head. Long prompts fill the memory of the machine, so a good cache forgets what nobody will ask for again.
Some heads follow the words of the question; others search the picture, and they change their mind with each
new word. Give the first kind a fixed choice and let the second kind look things up when it has to.

Yesterday we travelled through the mountains by train. Snow covered the roofs of the villages, a river ran
beside the road, and at noon the sun came out between the trees. My brother bought apples, cheese and coffee
at the station; our grandmother slept until evening. Nobody knew the way to the hotel, yet a friendly old man
with a bicycle showed us a path across the bridge. "Turn right at the church," he said, "and don't forget to
look back." It was the best advice of the whole journey. Could you draw a map? I'd like to go there again.
"""

# Standard deviation of a layer's output where its input has 1. Sharp queries and keys keep attention from
# being uniform; large logits keep greedy decoding from turning on rounding.
OUTPUT_STD = {
    "q_proj": 1.6,
    "k_proj": 1.6,
    "v_proj": 1.0,
    "o_proj": 2.0,
    "gate_proj": 1.5,
    "up_proj": 1.0,
    "down_proj": 1.5,
    "lm_head": 16.0,
    "patch_embed.proj": 1.0,
    "attn.qkv": 1.5,
    "attn.proj": 1.0,
    "merger.mlp.0": 1.5,
    "merger.mlp.2": 1.2,
}
ATTENTION_BIAS_STD = 0.5
# How far text and pictures lie apart in the hidden state, and how strongly the text heads tell them apart.
MODALITY_OFFSET = 0.5
TEXT_HEAD_GAIN = 4.0
# How much of a token's own embedding its logit's weights subtract.
SELF_AVERSION = 0.33
# RoPE hardly turns these frequencies within MAX_POSITIONS.
SLOW_FREQUENCIES = 8


def write_tiny_model(out: Path, *, seed: int = 0, layers: int = 4, force: bool = False) -> Path:
    """Writes config, weights (bfloat16), tokenizer, processors and chat template of a small Qwen2.5-VL.

    The shape is the real model's at a small size: 4 query heads on 2 KV heads of size 64, and a vision tower
    of two blocks, one windowed. In each layer every second KV head attends mostly to text. Greedy decoding
    yields printable pieces of text only, no special token, so an answer ends at `max_tokens`. The same
    arguments give the same bytes. Source: arXiv:2502.13923 (Qwen2.5-VL).

    Args:
        out: folder to write; made where it is missing. A tiny model that lies there is replaced.
        force: write even where the folder holds something else; weight files in it are deleted, because
            both loaders would read them, and other files stay.

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` is a file, or holds something other than a tiny model and `force` is off.
        ValueError: `layers` is not positive, or `seed` has more than 64 bits.
    """
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    _prepare_folder(out, force)
    tokenizer = _train_tokenizer()
    model = _build_model(_config(tokenizer, layers), tokenizer, seed)
    save_model(model, tokenizer, SYSTEM_PROMPT + CHAT_TEMPLATE, out)
    return out


def sample_picture() -> Image.Image:
    """A real photograph, 512 x 600 RGB: Grace Hopper in uniform, which ships with Matplotlib.

    Source: official portrait, James S. Davis, U.S. Navy (public domain).

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the sample photograph ships with matplotlib: pip install matplotlib", name=error.name
        ) from error
    with Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")) as picture:
        return picture.convert("RGB")


def _prepare_folder(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another path")
    if out.is_dir() and any(out.iterdir()) and not force and not _is_tiny_model(out):
        raise FileExistsError(
            f"{out} is not empty and is no tiny model; choose another folder, or overwrite it with --force"
        )
    out.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for stale in out.glob(pattern):
            stale.unlink()


def _is_tiny_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and MARK in config


def _train_tokenizer() -> Qwen2Tokenizer:
    # Learnt behind the real tokenizer's own splitting, which Qwen2Tokenizer sets up whatever its vocabulary.
    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    pieces.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(
            vocab_size=BPE_TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learnt = json.loads(pieces.to_str())["model"]
    return build_tokenizer(learnt["vocab"], [tuple(pair) for pair in learnt["merges"]])


def _config(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen2_5_VLConfig:
    return build_config(
        tokenizer,
        text={
            "hidden_size": HIDDEN,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
        },
        vision={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        rope_theta=1_000_000.0,
        mrope_section=MROPE_SECTION,
        **{MARK: True},
    )


def build_config(
    tokenizer: Qwen2Tokenizer,
    *,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    rope_theta: float,
    mrope_section: Sequence[int],
    **more: Any,
) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL's configuration at another size.

    Args:
        text: sizes of the language model.
        vision: sizes and windows of the vision tower.
        mrope_section: frequencies of M-RoPE for time, height and width.
        more: further entries at the top.
    """
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={
            "vocab_size": len(tokenizer),
            **text,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": rope_theta,
                "mrope_section": list(mrope_section),
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL_PATCH,
            "tokens_per_second": 2,
            "out_hidden_size": text["hidden_size"],
            **vision,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        **more,
    )


def build_tokenizer(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Qwen2Tokenizer:
    """Qwen's tokenizer with other pieces."""
    return Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=list(merges),
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=MAX_POSITIONS,
    )


def save_model(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, chat_template: str, out: Path
) -> None:
    """Writes all that vLLM and Transformers load: greedy by default, weights in the type that they have."""
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        pad_token_id=text.pad_token_id,
    )
    # The model first: its config marks the folder, so an interrupted run can simply be repeated.
    model.save_pretrained(out)
    processor = build_processor(tokenizer, chat_template)
    processor.save_pretrained(out)
    # processor_config.json holds these too, but older readers look for files of their own.
    processor.image_processor.save_pretrained(out)
    processor.video_processor.save_pretrained(out)


def build_processor(tokenizer: Qwen2Tokenizer, chat_template: str) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor with the small models' limits of picture size."""
    grid = {"size": PIXELS, "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL_PATCH}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid),
        # A frame has the same limits as a picture; the cap would lower them for long videos.
        video_processor=Qwen2VLVideoProcessor(**grid, cap_pixels_per_frame=False),
        tokenizer=tokenizer,
        chat_template=chat_template,
    )


@torch.no_grad()
def _build_model(
    config: Qwen2_5_VLConfig, tokenizer: Qwen2Tokenizer, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):  # The constructor draws weights of its own.
        model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, module in sorted(model.named_modules()):
        if isinstance(module, nn.Embedding):
            module.weight.normal_(generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv3d):
            _fill(name, module, generator)
    modality = torch.randn(HIDDEN, generator=generator).sign()
    _separate_modalities(model, modality)
    for layer in model.model.language_model.layers:
        _make_text_heads(layer.self_attn.q_proj, layer.self_attn.k_proj, modality)
    _silence(model.lm_head.weight, tokenizer)
    return model.to(torch.bfloat16)


def _fill(name: str, module: nn.Linear | nn.Conv3d, generator: torch.Generator) -> None:
    gain = next(gain for end, gain in OUTPUT_STD.items() if name.endswith(end))
    fan_in = module.weight[0].numel()
    module.weight.normal_(std=gain * fan_in**-0.5, generator=generator)
    if module.bias is not None:
        in_attention = name.endswith(("q_proj", "k_proj", "attn.qkv"))
        module.bias.normal_(std=ATTENTION_BIAS_STD if in_attention else 0.0, generator=generator)


def _separate_modalities(model: Qwen2_5_VLForConditionalGeneration, modality: Tensor) -> None:
    """Moves text and pictures apart along one direction, which no logit reads."""
    embeddings = model.get_input_embeddings().weight
    embeddings.add_(MODALITY_OFFSET * modality)
    model.model.visual.merger.mlp[2].bias.sub_(MODALITY_OFFSET * modality)
    logits = model.lm_head.weight
    # A token speaks against itself, or greedy decoding would stutter.
    logits.sub_(SELF_AVERSION * embeddings)
    logits.sub_((logits @ modality / HIDDEN)[:, None] * modality)


def _make_text_heads(query: nn.Linear, key: nn.Linear, modality: Tensor) -> None:
    """Lets every second KV head score text above pictures, as the static heads of real models do."""
    half = HEAD_SIZE // 2
    slow = [i for end in (half, HEAD_SIZE) for i in range(end - SLOW_FREQUENCIES, end)]
    group = HEADS // KV_HEADS
    for kv_head in range(1, KV_HEADS, 2):
        key_rows = [kv_head * HEAD_SIZE + i for i in slow]
        key.weight[key_rows] += TEXT_HEAD_GAIN / HIDDEN * modality
        for head in range(kv_head * group, (kv_head + 1) * group):
            query.bias[[head * HEAD_SIZE + i for i in slow]] += TEXT_HEAD_GAIN


def _silence(logits: Tensor, tokenizer: Qwen2Tokenizer) -> None:
    """Gives every token that is not printable ASCII the logit 0, far below the largest one."""
    logits[list(_unprintable(tokenizer))] = 0


def _unprintable(tokenizer: Qwen2Tokenizer) -> Iterator[int]:
    special = set(tokenizer.all_special_ids)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if token in special or not (text.isascii() and text.isprintable()):
            yield token
