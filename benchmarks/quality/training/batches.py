"""Random scenes with many questions each, as tensors for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hybridkv_quality.lexicon import COLOURS, COMMA, FILLER, GLYPHS, RECITE
from hybridkv_quality.pictures import Board, Name, draw_clutter, draw_half
from hybridkv_quality.questions import TASKS, Question, Turn, say
from hybridkv_quality.scenes import ALL_NAMES, Kind, Scene, Shape, build_scene
from network import Batch, Tally, see, to_patches
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

VARIANTS, CLUTTER = 24, 2048

Asked = tuple[str, list[int], list[tuple[int, int]]]
"""A question's task, its token ids behind the scene, and where its answers stand."""


@dataclass(frozen=True)
class Drawings:
    """Cells drawn beforehand, from which boards are put together.

    Attributes:
        halves: `[names, VARIANTS, 28, 14, 3]` uint8.
        clutter: `[CLUTTER, 28, 28, 3]` uint8.
    """

    halves: Tensor
    clutter: Tensor

    @staticmethod
    def draw(rng: np.random.Generator) -> Drawings:
        """Draws all of them."""
        halves = [[draw_half(name, rng) for _ in range(VARIANTS)] for name in ALL_NAMES]
        clutter = [draw_clutter(rng) for _ in range(CLUTTER)]
        return Drawings(torch.from_numpy(np.array(halves)), torch.from_numpy(np.array(clutter)))

    def dominoes(self, left: Tensor, right: Tensor, generator: torch.Generator) -> Tensor:
        """`[N, 28, 28, 3]` uint8 cells of names `left` and `right` `[N]`, any of their variants."""
        pick = torch.randint(VARIANTS, (2, left.numel()), generator=generator)
        return torch.cat([self.halves[left, pick[0]], self.halves[right, pick[1]]], dim=2)


class Batches:
    """Turns scenes into batches; keeps what the frozen vision tower says of clutter."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        drawings: Drawings,
        seed: int,
    ) -> None:
        self._model = model
        self._ids = tokenizer.get_vocab()
        self._rng = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._number = {name: number for number, name in enumerate(ALL_NAMES)}
        self._take(drawings)

    @torch.no_grad()
    def _take(self, drawings: Drawings) -> None:
        self._drawings = drawings
        self._clutter = see(self._model, to_patches(drawings.clutter))

    def draw_anew(self) -> None:
        """Replaces all drawings: a model that sees the same ones for long knows them, and errs on others."""
        self._take(Drawings.draw(self._rng))

    def draw(self, shape: Shape, scenes: int, questions: int, weights: Mapping[str, float]) -> Batch:
        """A batch of new scenes of one shape; tasks of its kind are drawn by weight."""
        built = [build_scene(shape, self._rng) for _ in range(scenes)]
        asked = [self._questions(scene, questions, weights) for scene in built]
        tokens, targets = self._pad(asked)
        context, positions = self._contexts(built)
        lookups = torch.full_like(tokens, -1)
        tallies = []
        for row, scene in enumerate(built):
            sources = self._sources(scene)
            for place, (task, ids, answers) in enumerate(asked[row]):
                if task == "count":
                    said = answers[0][0]
                    counted = [at for name, (at, *_) in sources.items() if name[0] == ids[said] and name[1:]]
                    tallies.append(Tally(row, place * tokens.shape[2] + said, counted))
                for last in range(1, len(ids)):
                    named = sources.get((ids[last - 1], ids[last]))
                    found = named or sources.get((ids[last],)) or []
                    here = slice(last, last + len(found))
                    lookups[row, place, here] = torch.tensor(found, dtype=torch.long)
        ends = torch.tensor([-100, self._ids["<|im_end|>"], *self._words(COMMA)])
        lookups[torch.isin(targets, ends) | (tokens == self._ids["Ġ" + COMMA])] = -1
        tasks = [[task for task, _, _ in scene] for scene in asked]
        return Batch(context, positions, tokens, targets, tasks, lookups, tallies)

    def _sources(self, scene: Scene) -> dict[tuple[int, ...], list[int]]:
        """Which of the scene's tokens the words behind a name come from, by the ids that end the name.

        A domino's name or its picture's ordinal: the domino, for two words. A note's name: its words.
        """
        sources: dict[tuple[int, ...], list[int]] = {}
        at, ordinal = 3, 0
        for part in scene.parts:
            if isinstance(part, str):
                ids = self._words(part)
                if scene.notes:
                    sources[ids[1],] = list(range(at + 2, at + len(ids)))
                at, ordinal = at + len(ids), ids[-1]
                continue
            cells = [cell for row in part for cell in row]
            for number, cell in enumerate(cells, start=at + 1):
                if cell is not None:
                    colour, glyph = self._words(" ".join(cell.name))
                    sources[colour, glyph] = [number] * 2
                    if scene.gallery:
                        sources[ordinal,] = [number] * 2
            at += len(cells) + 2
        return sources

    def draw_copies(self, count: int) -> Batch:
        """A batch without pictures: words to be said again. Cheap practice in copying from a question."""
        words = [*COLOURS, *GLYPHS, *FILLER]
        asked = []
        for _ in range(count):
            said = [words[i] for i in self._rng.integers(0, len(words), self._rng.integers(2, 9))]
            asked.append(("copy", *self._encode((Turn(say(RECITE, *said), say(*said)),))))
        tokens, targets = self._pad([asked])
        opening = torch.tensor([self._special("<|im_start|>", "user", "\n")])
        context = self._model.model.language_model.embed_tokens(opening).detach()
        return Batch(context, torch.arange(3).expand(3, -1), tokens, targets, [["copy"] * count])

    def _pad(self, asked: Sequence[Sequence[Asked]]) -> tuple[Tensor, Tensor]:
        """Token ids and targets `[B, Q, N]`."""
        width = max(len(ids) for scene in asked for _, ids, _ in scene)
        tokens = torch.full((len(asked), len(asked[0]), width), self._ids["<|endoftext|>"])
        targets = torch.full_like(tokens, -100)
        for row, scene in enumerate(asked):
            for place, (_, ids, answers) in enumerate(scene):
                tokens[row, place, : len(ids)] = torch.tensor(ids)
                for begin, end in answers:
                    targets[row, place, begin - 1 : end - 1] = torch.tensor(ids[begin:end])
        return tokens, targets

    def _questions(self, scene: Scene, count: int, weights: Mapping[str, float]) -> list[Asked]:
        names = [name for name in weights if TASKS[name].kind == scene.shape.kind]
        chances = np.array([weights[name] for name in names])
        chosen = self._rng.choice(len(names), count, p=chances / chances.sum())
        return [(names[i], *self._encode(TASKS[names[i]].ask(scene, self._rng))) for i in chosen]

    def _encode(self, question: Question) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids behind the scene, and where the answers (with their end) stand."""
        ids: list[int] = []
        answers: list[tuple[int, int]] = []
        for number, turn in enumerate(question):
            if number:
                ids += self._special("\n", "<|im_start|>", "user", "\n")
            ids += self._words(turn.ask)
            ids += self._special("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")
            begin = len(ids)
            ids += self._words(turn.answer) + self._special("<|im_end|>")
            answers.append((begin, len(ids)))
        return ids, answers

    def _special(self, *pieces: str) -> list[int]:
        return [self._ids["Ċ" if piece == "\n" else piece] for piece in pieces]

    def _words(self, text: str) -> list[int]:
        return [self._ids["Ġ" + word] for word in text.split()]

    @torch.no_grad()
    def _contexts(self, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, T, HIDDEN]` and M-RoPE positions `[3, T]` of scenes of one shape."""
        ids = [self._ids_of(scene) for scene in scenes]
        tokens = torch.tensor(ids)
        embedded = self._model.model.language_model.embed_tokens(tokens)
        pads = tokens == self._ids["<|image_pad|>"]
        embedded[pads] = self._seen([cell for scene in scenes for cell in _cells(scene)])
        return embedded, positions_of(scenes[0])

    def _ids_of(self, scene: Scene) -> list[int]:
        ids = self._special("<|im_start|>", "user", "\n")
        for part in scene.parts:
            if isinstance(part, str):
                ids += self._words(part)
            else:
                pads = [self._ids["<|image_pad|>"]] * (len(part) * len(part[0]))
                ids += [*self._special("<|vision_start|>"), *pads, *self._special("<|vision_end|>")]
        return ids

    def _seen(self, cells: Sequence[tuple[Name, Name] | None]) -> Tensor:
        """Features `[N, HIDDEN]` of cells."""
        features = self._clutter[torch.randint(CLUTTER, (len(cells),), generator=self._generator)]
        places = [place for place, cell in enumerate(cells) if cell is not None]
        dominoes = [cell for cell in cells if cell is not None]
        left = torch.tensor([self._number[name] for name, _ in dominoes])
        right = torch.tensor([self._number[target] for _, target in dominoes])
        drawn = self._drawings.dominoes(left, right, self._generator)
        features[places] = see(self._model, to_patches(drawn))
        return features


def _cells(scene: Scene) -> list[tuple[Name, Name] | None]:
    return [cell for part in scene.parts if not isinstance(part, str) for row in part for cell in row]


def positions_of(scene: Scene) -> Tensor:
    """M-RoPE positions `[3, T]` of the chat's opening (three tokens) and the scene's parts."""
    pieces = [torch.arange(3).expand(3, -1)]
    following = 3
    for part in scene.parts:
        if isinstance(part, str):
            count = len(part.split())
            pieces.append((following + torch.arange(count)).expand(3, -1))
            following += count
            continue
        begin = following + 1
        pieces.append(torch.full((3, 1), following))
        pieces.append(_grid_positions(part) + begin)
        following = begin + max(len(part), len(part[0]))
        pieces.append(torch.full((3, 1), following))
        following += 1
    return torch.cat(pieces, dim=1)


def _grid_positions(board: Board) -> Tensor:
    rows, columns = len(board), len(board[0])
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return torch.stack([torch.zeros_like(row), row, column])


def kinds_of(weights: Mapping[str, float]) -> dict[Kind, float]:
    """Weight of each kind of scene: that of its tasks together."""
    total: dict[Kind, float] = {}
    for name, weight in weights.items():
        kind = TASKS[name].kind
        total[kind] = total.get(kind, 0.0) + weight
    return total
