"""A local model's weights, by its files: every tensor counted once, as it will lie in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hybridkv_vllm.checkpoint import INDEX, Weights, read_weights
from hybridkv_vllm.shapes import read_shape

CONFIG = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}
QUANTISED: dict[str, np.ndarray[Any, Any]] = {
    "model.embed_tokens.weight": np.zeros((1000, 64), np.float16),
    "model.layers.0.self_attn.q_proj.qweight": np.zeros((64, 8), np.int32),
    "model.layers.0.self_attn.q_proj.scales": np.zeros((1, 64), np.float16),
    "model.layers.0.mlp.experts.0.up_proj.qweight": np.zeros((64, 16), np.int32),
    "model.layers.0.mlp.experts.1.up_proj.qweight": np.zeros((64, 16), np.int32),
    "model.layers.0.mlp.shared_expert.up_proj.qweight": np.zeros((64, 16), np.int32),
    "visual.blocks.0.attn.qkv.weight": np.zeros((32, 96), np.float16),
    "lm_head.weight": np.zeros((1000, 64), np.float16),
}
SIZES = Weights(
    decoder=64 * 8 * 4 + 64 * 2 + 64 * 16 * 4 + 1000 * 64 * 2,
    experts=2 * 64 * 16 * 4,
    embedding=1000 * 64 * 2,
    outside=32 * 96 * 2,
)


def write(folder: Path, config: dict[str, Any]) -> Path:
    """A quantised checkpoint in two files, and one beside them that its index does not name."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    names, half = list(QUANTISED), len(QUANTISED) // 2
    files = {"a.safetensors": names[:half], "b.safetensors": names[half:], "consolidated.safetensors": names}
    for file, held in files.items():
        save_file({name: QUANTISED[name] for name in held}, folder / file)
    named = {name: file for file in ("a.safetensors", "b.safetensors") for name in files[file]}
    (folder / INDEX).write_text(json.dumps({"weight_map": named}))
    return folder


def test_a_quantised_checkpoint_is_counted_as_it_is_stored(tmp_path: Path) -> None:
    """In the parts that a decode step reads, or does not."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    shape = read_shape(write(tmp_path, {"quantization_config": {"quant_method": "awq"}, **experts}))
    assert shape.weights == SIZES
    assert shape.weight_bytes == sum(weights.nbytes for weights in QUANTISED.values())
    # Of two experts one token reads one, two tokens one and a half.
    assert shape.step_bytes(1) == SIZES.decoder + SIZES.experts / 2
    assert shape.step_bytes(2) == SIZES.decoder + SIZES.experts * 3 / 4


def test_an_embedding_that_is_the_output_layer_is_read(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, {"tie_word_embeddings": True}))
    assert shape.step_bytes(1) == SIZES.decoder + SIZES.experts + SIZES.embedding


def test_floats_are_counted_in_the_type_that_they_are_loaded_in(tmp_path: Path) -> None:
    save_file({"lm_head.weight": np.zeros((10, 6), np.float32)}, tmp_path / "model.safetensors")
    assert read_weights(tmp_path, 2) == Weights(decoder=120)


def test_a_real_checkpoint_has_what_its_shape_says(tiny_model: Path) -> None:
    """But for norms and biases; and its vision tower, which the configuration does not tell of."""
    shape = read_shape(tiny_model)
    assert shape.weights is not None
    assert shape.weights.embedding == shape.hidden * shape.vocabulary * shape.itemsize
    assert shape.weights.decoder == pytest.approx(shape.step_parameters(1) * shape.itemsize, rel=0.01)
    assert shape.weights.outside > 0
    assert shape.weights.experts == 0
    stored = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))
    assert shape.weight_bytes == pytest.approx(stored, rel=0.01)


def test_without_weights_there_are_none(tmp_path: Path) -> None:
    assert read_weights(tmp_path, 2) is None


@pytest.mark.parametrize(
    "header", [b"", b"{]", b"null", b'{"lm_head.weight": {"dtype": "F16", "shape": [1]}}']
)
def test_a_file_that_is_none_is_named(header: bytes, tmp_path: Path) -> None:
    """Something else; or cut short, so that its first eight bytes are no length."""
    for length in (len(header), 2**64 - 1):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
            read_weights(tmp_path, 2)


@pytest.mark.parametrize(
    "index",
    [
        b"[]",
        b"{]",
        b"{}",
        b'{"weight_map": null}',
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"\xff": "a"}}',
    ],
)
def test_an_index_that_is_none_is_named(index: bytes, tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(
        ValueError, match=r"the weights in .* cannot be read: model\.safetensors\.index\.json"
    ):
        read_shape(tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: .*b\.safetensors"):
        read_shape(tmp_path)
