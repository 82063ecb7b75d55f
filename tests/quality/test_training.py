"""The training's own forward pass against Transformers', on pictures that went through the real processor."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hybridkv_quality.lexicon import NUMBERS, spaced_words
from hybridkv_quality.pictures import CELL, draw_board
from hybridkv_quality.questions import TASKS
from hybridkv_quality.scenes import KINDS, Kind, build_scene, shape_for

TRAINING = Path(__file__).resolve().parents[2] / "benchmarks" / "quality" / "training"
sys.path.insert(0, str(TRAINING))

import accuracy  # noqa: E402
import batches  # noqa: E402
import export  # noqa: E402
import network  # noqa: E402
import train  # noqa: E402
import vocabulary  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, written as the trained one is."""
    torch.manual_seed(0)
    tokenizer = vocabulary.build_tokenizer()
    out = tmp_path_factory.mktemp("untrained")
    export.write_folder(network.build_model(network.build_config(tokenizer)), tokenizer, out)
    return out


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    """Transformers' model and processor of it."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def test_every_word_is_one_token_and_anything_else_is_possible() -> None:
    tokenizer = vocabulary.build_tokenizer()
    for word in spaced_words():
        assert tokenizer.tokenize(f" {word}") == [f"Ġ{word}"], word
    assert tokenizer.decode(tokenizer("Überraschung, 42?")["input_ids"]) == "Überraschung, 42?"


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_for_many_questions_equals_transformers(kind: Kind, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    vocabulary_ids = processor.tokenizer.get_vocab()
    rng = np.random.default_rng(3)
    scene = build_scene(shape_for(kind, 200, rng), rng)
    pictures = [draw_board(part, rng) for part in scene.parts if not isinstance(part, str)]
    asked = [TASKS[task].ask(scene, rng) for task in TASKS if TASKS[task].kind == kind]

    encoder = object.__new__(batches.Batches)
    encoder._ids = vocabulary_ids
    tokens, targets = encoder._pad([[("", *encoder._encode(question)) for question in asked]])
    scene_ids = encoder._ids_of(scene)
    cells = [
        torch.from_numpy(np.array(picture)).unflatten(0, (-1, CELL)).unflatten(2, (-1, CELL))
        for picture in pictures
    ]
    stacked = torch.cat([cell.permute(0, 2, 1, 3, 4).flatten(0, 1) for cell in cells])
    with torch.no_grad():
        context = model.model.language_model.embed_tokens(torch.tensor([scene_ids]))
        pads = torch.tensor([scene_ids]) == vocabulary_ids["<|image_pad|>"]
        context[pads] = network.see(model, network.to_patches(stacked))
        batch = network.Batch(context, batches.positions_of(scene), tokens, targets, [[""] * len(asked)])
        ours = network.answer_logits(model, batch)

    expected = []
    for place, question in enumerate(asked):
        parts = iter(pictures)
        shown = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": next(parts)}
            for part in scene.parts
        ]
        messages: list[dict[str, Any]] = []
        for turn in question:
            before = [] if messages else shown
            messages.append({"role": "user", "content": [*before, {"type": "text", "text": turn.ask}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        text = processor.apply_chat_template(messages, tokenize=False)
        inputs = processor(text=[text], images=pictures, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        where = (targets[0, place] != -100).nonzero().flatten()
        said = inputs["input_ids"][0]
        assert torch.equal(said[: len(scene_ids)], torch.tensor(scene_ids))
        assert torch.equal(said[len(scene_ids) + where + 1], targets[0, place, where])
        expected.append(logits[len(scene_ids) + where])
    assert torch.allclose(ours, torch.cat(expected), atol=1e-4)


def test_the_head_that_counts_is_shown_as_many_things_as_the_answer_says(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    monkeypatch.setattr(batches, "VARIANTS", 1)
    monkeypatch.setattr(batches, "CLUTTER", 8)
    drawings = batches.Drawings.draw(np.random.default_rng(0))
    made = batches.Batches(model, processor.tokenizer, drawings, seed=1)
    shape = shape_for("gallery", 200, np.random.default_rng(2))
    batch = made.draw(shape, 2, 6, {"count": 1.0, "index": 0.5})
    assert len(batch.tallies) == sum(task == "count" for tasks in batch.tasks for task in tasks) > 2
    numbers = [processor.tokenizer.get_vocab()[f"Ġ{word}"] for word in NUMBERS]
    for row, place, counted in batch.tallies:
        assert batch.targets[row].flatten()[place] == numbers[len(set(counted)) - 1]
    found = network.Found()
    network.answer_logits(model, batch, found)
    assert found.tallies is not None
    # The ideal: two of the first token's share to one of each thing, and nothing for all else.
    ideal = [
        -sum(w / (2 + len(c)) * math.log(w / (2 + len(c))) for w in (2, *[1] * len(c)))
        for _, _, c in batch.tallies
    ]
    assert (found.tallies <= -torch.tensor(ideal)).all()


def test_training_lowers_the_loss_and_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "VISION_STEPS", 3)
    monkeypatch.setattr(train, "STEP_TOKENS", 600)
    monkeypatch.setattr(train, "REPORT_EVERY", 4)
    arguments = ["train.py", "--out", str(tmp_path), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "8"])
    train.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "16", "--resume"])
    train.main()
    curve = json.loads((tmp_path / train.CURVE).read_text())
    assert [point["step"] for point in curve if "step" in point] == [4, 8, 12, 16]
    assert curve[-1]["loss"] < curve[1]["loss"]
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 25 * 2**20


def test_training_goes_on_from_the_model_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "STEP_TOKENS", 600)
    monkeypatch.setattr(train, "REPORT_EVERY", 1)
    shipped = json.loads(train.SHIPPED_CURVE.read_text())
    last = shipped[-1]["step"]
    arguments = ["train.py", "--out", str(tmp_path), "--threads", "1", "--shipped", "--steps", str(last + 3)]
    monkeypatch.setattr(sys, "argv", arguments)
    train.main()
    curve = json.loads((tmp_path / train.CURVE).read_text())
    assert curve[: len(shipped)] == shipped
    assert [point["step"] for point in curve[len(shipped) :]] == [last + 1, last + 2, last + 3]
    # One that knows nothing guesses among more than a hundred words.
    assert curve[-1]["loss"] < 1
    assert curve[-1]["tokens"] == shipped[-1]["tokens"]


def test_whole_answers_are_right_only_if_every_word_is() -> None:
    targets = torch.tensor([[[-100, 3, 4], [-100, -100, 5]]])
    batch = network.Batch(torch.empty(0), torch.empty(0), torch.empty(0), targets, [["", ""]])
    said = torch.nn.functional.one_hot(torch.tensor([3, 2, 5]), 6).float()
    assert network.whole_answers(batch, said).tolist() == [[False, True]]


def test_accuracy_tells_the_model_that_ships_from_an_untrained_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CLUTTER", 64)
    for arguments, expected in (([], 1.0), (["--model", str(folder)], 0.0)):
        out = tmp_path / "model.json"
        arguments += ["--tokens", "128", "--answers", "20", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
        accuracy.main()
        found = json.loads(out.read_text())["accuracy"]
        assert list(found) == list(TASKS)
        values = [by_length["128"]["value"] for by_length in found.values()]
        assert sum(values) / len(values) == pytest.approx(expected, abs=0.05)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--answers", "30"])
    with pytest.raises(SystemExit, match="2"):
        accuracy.main()
