"""The tiny model: both loaders' files are there, Transformers runs it, and its greedy decoding is stable."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from hybridkv_vllm.tiny_model import SPECIAL_TOKENS, sample_picture, write_tiny_model

NEW_TOKENS = 16
PICTURE_TOKENS = 21 * 18  # 600 x 512 pixels in squares of 28.
CLIP_TOKENS = 3 * 4 * 4  # Six frames of 112 x 112 in pairs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def processor(folder: Path) -> Qwen2_5_VLProcessor:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def clip() -> np.ndarray[Any, Any]:
    picture = np.asarray(sample_picture().resize((112, 112)))
    return np.stack([np.roll(picture, 8 * step, axis=1) for step in range(6)])


def prompt(processor: Qwen2_5_VLProcessor, question: str, *media: Image.Image | np.ndarray[Any, Any]) -> Any:
    pictures = [item for item in media if isinstance(item, Image.Image)]
    videos = [item for item in media if isinstance(item, np.ndarray)]
    parts: list[dict[str, str]] = [
        {"type": "image" if isinstance(item, Image.Image) else "video"} for item in media
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    arguments = {**({"images": pictures} if pictures else {}), **({"videos": videos} if videos else {})}
    return processor(text=text, return_tensors="pt", **arguments)


def prompts(processor: Qwen2_5_VLProcessor) -> Iterator[Any]:
    question = "Who is in the picture, and what does she wear?"
    yield prompt(processor, question, sample_picture())
    yield prompt(processor, question, sample_picture().rotate(90, expand=True))
    yield prompt(processor, "What happens next?", clip())
    yield prompt(processor, "Compare the two.", sample_picture().resize((224, 140)), clip())
    yield prompt(processor, "Where do the boats go?")
    yield prompt(processor, "Please write a short letter.")


def greedy(model: Qwen2_5_VLForConditionalGeneration, inputs: Any) -> tuple[list[int], torch.Tensor]:
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits)


def test_both_loaders_files_are_there_and_small(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000


def test_transformers_loads_every_weight(folder: Path) -> None:
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    text = model.config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (4, 4, 2)
    assert text.hidden_size // text.num_attention_heads == 64
    assert sum(text.rope_parameters["mrope_section"]) == 32
    assert model.config.vision_config.out_hidden_size == text.hidden_size


def test_weights_carry_names_that_vllm_maps(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    # vLLM's hf_to_vllm_mapper for Qwen2.5-VL knows the published checkpoints' prefixes.
    assert all(name.startswith(("model.", "visual.", "lm_head.")) for name in names)
    assert {"lm_head.weight", "visual.patch_embed.proj.weight"} <= names


def test_special_tokens_agree_with_config(
    processor: Qwen2_5_VLProcessor, model: Qwen2_5_VLForConditionalGeneration
) -> None:
    config, tokenizer = model.config, processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    assert len(set(ids.values())) == len(SPECIAL_TOKENS)
    for token, token_id in ids.items():
        assert tokenizer(f"a{token}b")["input_ids"][1] == token_id
    assert config.image_token_id == processor.image_token_id == ids["<|image_pad|>"]
    assert config.video_token_id == processor.video_token_id == ids["<|video_pad|>"]
    assert config.vision_start_token_id == ids["<|vision_start|>"]
    assert config.vision_end_token_id == ids["<|vision_end|>"]
    assert config.text_config.eos_token_id == tokenizer.eos_token_id == ids["<|im_end|>"]
    assert config.text_config.pad_token_id == tokenizer.pad_token_id == ids["<|endoftext|>"]
    assert config.text_config.vocab_size == len(tokenizer)


def test_tokenizer_round_trips_any_text(processor: Qwen2_5_VLProcessor) -> None:
    for text in ("Who is in the picture?", "Größe 12,5 € 写真は?\n\tok", "a  b   c\r\n", "\U0001f600\x00"):
        assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
    assert len(processor.tokenizer("What is in the picture?")["input_ids"]) == 6


def test_chat_template(processor: Qwen2_5_VLProcessor) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "She."},
    ]
    assert processor.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|vision_end|>Who?<|im_end|>\n"
        "<|im_start|>assistant\nShe.<|im_end|>\n"
    )
    assert processor.apply_chat_template(messages[1:], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|vision_end|>Who?<|im_end|>\n"
        "<|im_start|>assistant\nShe.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_visual_tokens_are_counted(processor: Qwen2_5_VLProcessor) -> None:
    picture = prompt(processor, "Who?", sample_picture())["input_ids"]
    assert int((picture == processor.image_token_id).sum()) == PICTURE_TOKENS
    video = prompt(processor, "Who?", clip())["input_ids"]
    assert int((video == processor.video_token_id).sum()) == CLIP_TOKENS
    huge = prompt(processor, "Who?", sample_picture().resize((2048, 2400)))["input_ids"]
    assert 1100 < int((huge == processor.image_token_id).sum()) <= 1280


def test_greedy_answers_are_finite_varied_and_printable(
    processor: Qwen2_5_VLProcessor, model: Qwen2_5_VLForConditionalGeneration
) -> None:
    answers = []
    for inputs in prompts(processor):
        answer, logits = greedy(model, inputs)
        assert bool(logits.isfinite().all())
        assert len(answer) == NEW_TOKENS
        assert len(set(answer)) >= 6
        text = processor.tokenizer.decode(answer)
        assert text.isascii()
        assert text.isprintable()
        answers.append(text)
    assert len(set(answers)) == len(answers)


def test_greedy_decoding_survives_noise(
    processor: Qwen2_5_VLProcessor, model: Qwen2_5_VLForConditionalGeneration
) -> None:
    generator = torch.Generator().manual_seed(0)

    def shake(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        # A hundred times fp32's rounding.
        return output + 1e-4 * torch.randn(output.shape, generator=generator)

    for inputs in prompts(processor):
        calm, logits = greedy(model, inputs)
        best, second = logits.topk(2).values.unbind(-1)
        assert float((best - second).min()) > 2e-3  # Twice a logit's error of 1e-3.
        hooks = [
            projection.register_forward_hook(shake)
            for layer in model.model.language_model.layers
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
        try:
            assert greedy(model, inputs)[0] == calm
        finally:
            for hook in hooks:
                hook.remove()


def test_heads_look_at_different_things(
    processor: Qwen2_5_VLProcessor, model: Qwen2_5_VLForConditionalGeneration
) -> None:
    inputs = prompt(processor, "Who is in the picture, and what does she wear?", sample_picture())
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"][0] == processor.image_token_id
    for attention in attentions:
        window = attention[0, :, -16:].mean(1)
        text_mass = window[:, ~visual].sum(-1).view(2, 2).mean(-1)
        assert text_mass[0] < 0.8
        assert text_mass[1] > 0.9
        # Uniform attention would spread over more than 400 tokens.
        assert bool((1 / window.square().sum(-1) < 300).all())


def test_same_arguments_same_bytes(folder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    write_tiny_model(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    other = write_tiny_model(tmp_path / "other", seed=1, layers=2)
    assert json.loads((other / "config.json").read_text())["text_config"]["num_hidden_layers"] == 2
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_refuses_to_overwrite_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    stale = tmp_path / "model-00001-of-00002.safetensors"
    stale.write_bytes(b"")
    with pytest.raises(FileExistsError, match="--force"):
        write_tiny_model(tmp_path, layers=1)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", stale.name}

    write_tiny_model(tmp_path, layers=1, force=True)
    assert not stale.exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    # Now a tiny model, so no force is needed.
    write_tiny_model(tmp_path, layers=1, seed=1)

    with pytest.raises(FileExistsError, match="is a file"):
        write_tiny_model(tmp_path / "notes.txt", force=True)
    with pytest.raises(ValueError, match="layers"):
        write_tiny_model(tmp_path / "new", layers=0)
    assert not (tmp_path / "new").exists()


def test_sample_picture() -> None:
    picture = sample_picture()
    assert (picture.size, picture.mode) == ((512, 600), "RGB")


def test_sample_picture_names_the_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        sample_picture()


def test_needs_no_vllm() -> None:
    code = "import sys, hybridkv_vllm.tiny_model; sys.exit('vllm' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
