"""Trains the small Qwen2.5-VL that the quality suite and `make demo` use, on a CPU.

python benchmarks/quality/training/train.py --out FOLDER [--minutes 60] [--seed 0] [--resume | --shipped]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from batches import Batches, Drawings, kinds_of
from export import write_folder
from hybridkv_quality.lexicon import GLYPHS
from hybridkv_quality.model_path import model_folder
from hybridkv_quality.questions import TASKS
from hybridkv_quality.scenes import ALL_NAMES, KINDS, Kind, Shape, shape_for
from network import (
    HIDDEN,
    Batch,
    Found,
    answer_logits,
    build_config,
    build_model,
    see,
    to_patches,
    whole_answers,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from vocabulary import build_tokenizer

# How long scenes are at each level of the curriculum, in tokens.
LEVELS = (48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# Scenes longer than this come the less often, the longer they are. Looking things up is learnt in short
# scenes; getting exact in long ones takes practice there (`--often`).
OFTEN = 768
# A level is left when this share of the whole answers about boards is right, over its last batches.
MASTERED, BATCHES_TO_MASTER = 0.93, 12
# High rates until copying and looking up have formed, above all for biases (heads for neighbours need large
# ones); lower ones from then on, or nothing gets exact.
FORMING_STEPS, WARMUP = 1500, 200
FORMING_RATE, FORMING_BOOST = 1.2e-3, 10.0
RATE, BOOST = 5e-4, 3.0
# Tokens a step; a long scene makes a step of its own.
STEP_TOKENS = 1800
COPIES, REPORT_EVERY, REDRAW_EVERY = 64, 50, 25
CURVE = "curve.json"
SHIPPED_CURVE = Path(__file__).resolve().parents[2] / "results" / "quality" / CURVE
WEIGHTS = {
    "recall": 0.3,
    "multi_recall": 0.7,
    "chain": 1.0,
    "second_question": 0.5,
    "index": 1.5,
    "order": 1.5,
    "count": 0.5,
    "text_needle": 1.0,
    "picture_needle": 1.5,
    "video": 0.6,
}
# Once its head looks at what it has to count, some steps practise counting alone, in scenes of so many
# tokens: reading off how many takes more examples than anything else, and looking at all of them alike.
COUNTING_FROM, COUNTING_CHANCE = 7000, 0.3
COUNTING_TOKENS = (64, 96, 128, 192, 256, 384, 512, 1024)
# So long, heads are shown which dominoes to look at; left to themselves they find out too, but in hours.
# What to count is shown whenever counting is practised.
POINTING_STEPS, POINTING_WEIGHT = 10_000, 0.5
# In scenes of so many tokens they always are: a step has one scene, and a head that looks elsewhere learns
# nothing from it. Not in videos, whose frames show the same thing at several places.
POINTED_TOKENS = 2048
# Share of the scenes, where they are small enough, in which all names have one colour.
ONE_COLOUR = 0.25
VISION_STEPS, VISION_BATCH, VISION_CLUTTER = 1000, 224, 32


def learn_to_see(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, drawings: Drawings, seed: int
) -> float:
    """Aligns the vision tower with the words; returns the share of cells read right.

    A domino's feature becomes the sum of its left half's words, as the language model embeds them, and of
    its right half's, rotated, so that the two can be told apart; clutter becomes the placeholder's embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = model.model.language_model.embed_tokens.weight.detach()
    ids = tokenizer.get_vocab()
    words = torch.stack([embedding[[ids["Ġ" + word] for word in name]].sum(0) for name in ALL_NAMES])
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator)).Q
    clutter_target = embedding[ids["<|image_pad|>"]].expand(VISION_CLUTTER, -1)
    tower = model.model.visual
    optimizer = torch.optim.AdamW(tower.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=VISION_STEPS)
    right: list[float] = []
    for step in range(VISION_STEPS):
        left, other = torch.randint(len(ALL_NAMES), (2, VISION_BATCH), generator=generator)
        picked = torch.randint(len(drawings.clutter), (VISION_CLUTTER,), generator=generator)
        cells = torch.cat([drawings.dominoes(left, other, generator), drawings.clutter[picked]])
        features = see(model, to_patches(cells))
        targets = torch.cat([(words[left] + words[other] @ rotation.T) / 2, clutter_target])
        loss = F.mse_loss(features, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        dominoes = features[:VISION_BATCH].detach()
        read = (dominoes @ words.T).argmax(-1) == left
        read &= (dominoes @ rotation @ words.T).argmax(-1) == other
        right.append(read.float().mean().item())
        if step % 100 == 0 or step == VISION_STEPS - 1:
            print(f"vision {step} loss {loss.item():.4f} right {np.mean(right[-50:]):.4f}", flush=True)
    return float(np.mean(right[-50:]))


class Curriculum:
    """Chooses each step's scenes: each kind grows longer on its own, whenever its length is mastered.

    The highest level that a kind has reached comes most often, but long scenes, which take long, seldom.
    """

    def __init__(self, seed: int, levels: Mapping[Kind, int] | None = None, often: int = OFTEN) -> None:
        self.levels: dict[Kind, int] = dict.fromkeys(KINDS, 0) | {
            kind: min(level, len(LEVELS) - 1) for kind, level in (levels or {}).items()
        }
        self.rng = np.random.default_rng(seed)
        self._often = often
        self._copied = 0.0
        self._right: dict[Kind, list[float]] = {kind: [] for kind in KINDS}

    def kind(self) -> Kind:
        """What kind the next scenes are."""
        kinds = kinds_of(WEIGHTS)
        # Those that lag behind come more often.
        highest = max(self.levels.values())
        chances = np.array([weight * (1 + highest - self.levels[kind]) for kind, weight in kinds.items()])
        return list(kinds)[int(self.rng.choice(len(kinds), p=chances / chances.sum()))]

    def tokens(self, kind: Kind) -> int:
        """Length of the next scenes."""
        reached = LEVELS[max(0, self.levels[kind] - 8) : self.levels[kind] + 1]
        chances = np.array([1.0] * (len(reached) - 1) + [max(2.0, len(reached) - 2.0)])
        chances *= np.minimum(1, self._often / np.array(reached))
        return int(self.rng.choice(reached, p=chances / chances.sum()))

    def note(self, kind: Kind, tokens: int, right: float) -> None:
        """Takes in the share of whole answers right; moves up where the level is mastered."""
        level = self.levels[kind]
        if tokens != LEVELS[level]:
            return
        recent = [*self._right[kind], right][-BATCHES_TO_MASTER:]
        self._right[kind] = recent
        enough = len(recent) == BATCHES_TO_MASTER and np.mean(recent) >= MASTERED
        if enough and level < len(LEVELS) - 1:
            self.levels[kind] = level + 1
            self._right[kind] = []

    def note_copies(self, right: float) -> None:
        """Takes in the share of words that were said again without a mistake."""
        self._copied += 0.1 * (right - self._copied)

    def copies(self) -> bool:
        """Whether the next step practises copying: often until that is learnt."""
        return bool(self.rng.random() < (0.4 if self._copied < 0.98 else 0.05))

    def shape(self, kind: Kind, tokens: int) -> Shape:
        """The next scenes' shape."""
        most = min(256, tokens // 6)
        dominoes = int(self.rng.integers(max(2, most // 4), most + 1))
        shape = shape_for(kind, tokens, self.rng, dominoes)
        if self.rng.random() < ONE_COLOUR and shape.dominoes <= len(GLYPHS) and kind != "gallery":
            return replace(shape, colours=1)
        return shape


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--rate", type=float, default=RATE, help="of learning, once looking up has formed")
    parser.add_argument(
        "--settling", type=float, default=0.3, help="last share of the time, in which rates fall"
    )
    parser.add_argument(
        "--often",
        type=int,
        default=OFTEN,
        help="longer scenes come less often, in proportion",
    )
    parser.add_argument("--steps", type=int, help="stop there, whatever the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument("--resume", action="store_true", help="go on from FOLDER/state.pt")
    going_on.add_argument(
        "--shipped", action="store_true", help="go on from the model that ships, with a new optimizer"
    )
    return parser.parse_args()


class Training:
    """The language model's training: its state, its steps, and what it reports."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        batches: Batches,
        curriculum: Curriculum,
        curve: list[dict[str, Any]],
        first: int,
        rate: float,
        settling: float,
    ) -> None:
        self.model = model
        self.curve = curve
        self.curriculum = curriculum
        self.optimizer = torch.optim.AdamW(_groups(model), betas=(0.9, 0.98))
        self._batches = batches
        self._first = first
        self._rate = rate
        self._settling = settling
        self._right: dict[str, list[float]] = {name: [] for name in (*TASKS, "copy")}
        self._losses: list[float] = []

    def step(self, number: int, spent: float) -> None:
        """One batch.

        Args:
            number: of the step, from 1.
            spent: share of the time that has gone.
        """
        self._set_rates(number, spent)
        kind, tokens, batch = self._draw(number)
        shown = number <= POINTING_STEPS or (tokens >= POINTED_TOKENS and kind != "video")
        found = Found() if shown or _only_counts(batch) else None
        # Half of fp32's time on a CPU with bfloat16 instructions; weights and optimizer stay in fp32.
        with torch.autocast("cpu", torch.bfloat16):
            logits = answer_logits(self.model, batch, found).float()
        wanted = batch.targets[batch.targets != -100]
        loss = F.cross_entropy(logits, wanted)
        self._losses.append(loss.item())
        for looked in (found.lookups, found.tallies) if found is not None else ():
            if looked is not None and looked.numel():
                loss = loss - POINTING_WEIGHT * looked.mean()
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        self._note(kind, tokens, batch, whole_answers(batch, logits))

    def _set_rates(self, number: int, spent: float) -> None:
        settling = min(1.0, (number - self._first + 1) / WARMUP)
        settling *= min(1.0, (1 - spent) / self._settling + 0.02)
        rate, boost = (FORMING_RATE, FORMING_BOOST) if number <= FORMING_STEPS else (self._rate, BOOST)
        weights, biases = self.optimizer.param_groups
        weights["lr"], biases["lr"] = rate * settling, rate * settling * boost

    def _draw(self, number: int) -> tuple[Kind | None, int, Batch]:
        """The batch of a step, with its scenes' kind (None for copies) and length."""
        if self.curriculum.copies():
            return None, 0, self._batches.draw_copies(COPIES)
        weights: Mapping[str, float] = WEIGHTS
        if number >= COUNTING_FROM and self.curriculum.rng.random() < COUNTING_CHANCE:
            kind, weights = "gallery", {"count": 1.0}
            tokens = int(self.curriculum.rng.choice(COUNTING_TOKENS))
        else:
            kind = self.curriculum.kind()
            tokens = self.curriculum.tokens(kind)
        questions = 8 if tokens < 512 else 16 if tokens < POINTED_TOKENS else 32
        scenes = max(1, STEP_TOKENS // (tokens + questions * 30))
        shape = self.curriculum.shape(kind, tokens)
        return kind, tokens, self._batches.draw(shape, scenes, questions, weights)

    def _note(self, kind: Kind | None, tokens: int, batch: Batch, whole: Tensor) -> None:
        """Takes in which answers were right, `[B, Q]`."""
        for row, names in enumerate(batch.tasks):
            for place, name in enumerate(names):
                self._right[name].append(float(whole[row, place]))
        if kind is None:
            self.curriculum.note_copies(whole.float().mean().item())
            return
        # Counting is learnt last, from long scenes too: it holds no level up.
        judged = torch.tensor([[name != "count" for name in names] for names in batch.tasks])
        if judged.any():
            self.curriculum.note(kind, tokens, whole[judged].float().mean().item())

    def report(self, number: int, seconds: float) -> None:
        """Adds a point to the curve and prints it."""
        point = {
            "step": number,
            "seconds": round(seconds),
            "tokens": {kind: LEVELS[level] for kind, level in self.curriculum.levels.items()},
            "loss": round(float(np.mean(self._losses[-REPORT_EVERY:])), 4),
            "right": {
                name: round(float(np.mean(values[-200:])), 3)
                for name, values in self._right.items()
                if values
            },
        }
        self.curve.append(point)
        print(json.dumps(point), flush=True)

    def save(self, out: Path) -> None:
        """Writes the state from which `--resume` goes on."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
            "levels": self.curriculum.levels,
        }
        torch.save(state, out / "state.pt.part")
        (out / "state.pt.part").replace(out / "state.pt")


def main() -> None:
    """Trains and writes the model and its curve."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(build_config(tokenizer))
    drawings = Drawings.draw(np.random.default_rng(args.seed))
    state: dict[str, Any] | None = None
    levels: Mapping[Kind, int] | None = None
    if args.resume:
        state = torch.load(args.out / "state.pt", weights_only=False)
        model.load_state_dict(state["model"])
        curve = state["curve"]
        levels = state["levels"]
    elif args.shipped:
        shipped = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder(), dtype=torch.float32)
        model.load_state_dict(shipped.state_dict())
        curve = json.loads(SHIPPED_CURVE.read_text())
        levels = {kind: LEVELS.index(tokens) for kind, tokens in curve[-1]["tokens"].items()}
    else:
        curve = [{"vision_right": learn_to_see(model, tokenizer, drawings, args.seed)}]
    model.model.visual.requires_grad_(False)
    first = int(curve[-1].get("step", 0)) + 1
    batches = Batches(model, tokenizer, drawings, args.seed + first)
    curriculum = Curriculum(args.seed + first, levels, args.often)
    training = Training(model, batches, curriculum, curve, first, args.rate, args.settling)
    if state is not None:
        training.optimizer.load_state_dict(state["optimizer"])
    began = time.monotonic()
    for step in itertools.count(first):
        seconds = time.monotonic() - began
        if seconds >= 60 * args.minutes or (args.steps is not None and step > args.steps):
            break
        if step % REDRAW_EVERY == 0:
            batches.draw_anew()
        training.step(step, seconds / (60 * args.minutes))
        if step % REPORT_EVERY == 0:
            training.report(step, seconds)
        if step % (5 * REPORT_EVERY) == 0:
            training.save(args.out)
    training.save(args.out)
    write_folder(model, tokenizer, args.out / "model")
    (args.out / CURVE).write_text(json.dumps(curve, indent=1) + "\n")


def _only_counts(batch: Batch) -> bool:
    return all(name == "count" for names in batch.tasks for name in names)


def _groups(model: Qwen2_5_VLForConditionalGeneration) -> list[dict[str, Any]]:
    """Weights, then biases."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": 0.02},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]


if __name__ == "__main__":
    main()
