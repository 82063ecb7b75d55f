"""Seeded scenes: what a model is shown before it is asked, and the facts that questions can ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hybridkv_quality.lexicon import COLOURS, COUNTS, FILLER, GLYPHS, NAMES, NOTE, ORDINALS
from hybridkv_quality.pictures import Board, Domino, Name

Kind = Literal["boards", "gallery", "notes", "book", "video"]
KINDS: tuple[Kind, ...] = ("boards", "gallery", "notes", "book", "video")

ALL_NAMES = tuple(Name(colour, glyph) for colour in COLOURS for glyph in GLYPHS)
NOTE_WORDS = 4
# Cells; the small model's processor would shrink pictures of more than 1,280.
LARGEST_PICTURE = 1024
# Of a book in all; what is longer has larger pictures. Words' positions go up by one each, unlike a picture's
# tokens', and the more of them, the less the small model's rotary base lets it find by content.
MOST_WORDS = 2048


@dataclass(frozen=True)
class Shape:
    """How a scene is built, apart from what it says: all scenes of a shape have equally many tokens.

    Attributes:
        kind: `boards`: pictures full of dominoes; `gallery`: an ordinal before each picture, which has one
            domino; `notes`: boards with notes in words between them; `book`: long text with some boards in
            it; `video`: each board `frames` times in a row, drawn anew.
        grids: rows and columns of cells of each picture (of each shot of a video).
        dominoes: how many facts there are, at most the number of cells.
        frames: near-duplicate pictures of each board.
        words: words of text before each picture of a book.
        colours: how many colours the names have; with fewer, letters have to be told apart.
    """

    kind: Kind
    grids: tuple[tuple[int, int], ...]
    dominoes: int
    frames: int = 1
    words: int = 0
    colours: int = len(COLOURS)


@dataclass(frozen=True)
class Scene:
    """What is shown, and what it says.

    Attributes:
        parts: text and boards in their order.
        dominoes: all facts; each target is the name of the next one, the last one's that of the first.
        gallery: the pictures' dominoes in order; empty but for galleries.
        notes: the words of each note by its name; empty but for notes.
    """

    shape: Shape
    parts: tuple[str | Board, ...]
    dominoes: tuple[Domino, ...]
    gallery: tuple[Domino, ...] = ()
    notes: tuple[tuple[str, tuple[str, ...]], ...] = ()


def build_scene(shape: Shape, rng: np.random.Generator) -> Scene:
    """A scene of this shape.

    Raises:
        ValueError: more dominoes than names or cells.
    """
    cells = sum(rows * columns for rows, columns in shape.grids)
    if not 2 <= shape.dominoes <= min(len(GLYPHS) * shape.colours, cells):
        raise ValueError(f"a scene of {cells} cells cannot have {shape.dominoes} dominoes")
    if shape.kind == "gallery":
        names = _gallery_names(len(shape.grids), rng)
    else:
        colours = rng.permutation(list(COLOURS))[: shape.colours]
        possible = [name for name in ALL_NAMES if name.colour in colours]
        names = [possible[i] for i in rng.permutation(len(possible))[: shape.dominoes]]
    dominoes = tuple(Domino(name, names[(i + 1) % len(names)]) for i, name in enumerate(names))
    if shape.kind == "gallery":
        return _gallery(shape, dominoes, rng)
    boards = _fill(shape.grids, dominoes, rng)
    if shape.kind == "notes":
        return _with_notes(shape, boards, dominoes, rng)
    parts: list[str | Board] = []
    for board in boards:
        if shape.words:
            parts.append(_sentence(shape.words, rng))
        parts.extend([board] * shape.frames)
    return Scene(shape, tuple(parts), dominoes)


def _fill(
    grids: Sequence[tuple[int, int]], dominoes: Sequence[Domino], rng: np.random.Generator
) -> list[Board]:
    """Boards with the dominoes anywhere on them."""
    cells = [
        (p, r, c) for p, (rows, columns) in enumerate(grids) for r in range(rows) for c in range(columns)
    ]
    boards: list[list[list[Domino | None]]] = [
        [[None] * columns for _ in range(rows)] for rows, columns in grids
    ]
    for cell, domino in zip(rng.permutation(len(cells))[: len(dominoes)], dominoes, strict=True):
        picture, row, column = cells[cell]
        boards[picture][row][column] = domino
    return list(boards)


def _gallery_names(pictures: int, rng: np.random.Generator) -> list[Name]:
    """Names of which some colours occur as often as can be asked for, so that counting has an answer."""
    colours = list(COLOURS)
    rng.shuffle(colours)
    counts: list[str] = []
    for colour in colours:
        left = pictures - len(counts)
        counts += [colour] * int(rng.choice([count for count in COUNTS if count <= left] or [0]))
    counts += [colours[-1]] * (pictures - len(counts))
    rng.shuffle(counts)
    glyphs = {colour: iter(rng.permutation(len(GLYPHS)).tolist()) for colour in COLOURS}
    return [Name(colour, GLYPHS[next(glyphs[colour])]) for colour in counts]


def _gallery(shape: Shape, dominoes: Sequence[Domino], rng: np.random.Generator) -> Scene:
    parts: list[str | Board] = []
    shown = [dominoes[i] for i in rng.permutation(len(dominoes))]
    for ordinal, grid, domino in zip(ORDINALS, shape.grids, shown, strict=False):
        parts += [f" {ordinal}", *_fill([grid], [domino], rng)]
    return Scene(shape, tuple(parts), tuple(dominoes), gallery=tuple(shown))


def _with_notes(
    shape: Shape, boards: Sequence[Board], dominoes: Sequence[Domino], rng: np.random.Generator
) -> Scene:
    """A note before each board."""
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[: len(boards)]]
    words = [FILLER[i] for i in rng.permutation(len(FILLER))]
    notes = []
    parts: list[str | Board] = []
    for i, (name, board) in enumerate(zip(names, boards, strict=True)):
        said = tuple(words[NOTE_WORDS * i : NOTE_WORDS * (i + 1)])
        notes.append((name, said))
        parts += [" " + " ".join((NOTE, name, *said)), board]
    return Scene(shape, tuple(parts), tuple(dominoes), notes=tuple(notes))


def _sentence(words: int, rng: np.random.Generator) -> str:
    return "".join(f" {FILLER[i]}" for i in rng.integers(0, len(FILLER), words))


def shape_for(kind: Kind, tokens: int, rng: np.random.Generator, dominoes: int | None = None) -> Shape:
    """A shape of about `tokens` tokens.

    Args:
        dominoes: at most so many; by default one in eight tokens, at most 256.

    Raises:
        ValueError: fewer than 48 tokens, or more than the pictures of `notes` have names for.
    """
    if tokens < 48:
        raise ValueError(f"a scene has at least 48 tokens, got {tokens}")
    most = dominoes or min(256, tokens // 8)
    if kind == "gallery":
        pictures = int(np.clip(min(most, tokens // 7), 2, len(ORDINALS)))
        grid = _grid(tokens // pictures - 3, rng)
        return Shape(kind, (grid,) * pictures, pictures)
    if kind == "book":
        boards = int(np.clip(tokens // 128, 1, 6))
        cells = max(4, min(24, tokens // (6 * boards)), (tokens - MOST_WORDS) // boards)
        grids = tuple(_grid(cells, rng) for _ in range(boards))
        shown = sum(rows * columns + 2 for rows, columns in grids)
        facts = max(2, min(most, 24, sum(rows * columns for rows, columns in grids) // 2))
        return Shape(kind, grids, facts, words=max(1, (tokens - shown) // boards))
    frames = 4 if kind == "video" else 1
    each = int(rng.integers(4, 9)) if tokens >= 512 else int(rng.integers(1, 4))
    each = max(each, -(-tokens // (frames * LARGEST_PICTURE)))
    if kind == "notes" and each > len(NAMES):
        raise ValueError(f"a scene of notes has at most {len(NAMES) * LARGEST_PICTURE} tokens, got {tokens}")
    grids = tuple(_grid(max(4, tokens // (each * frames) - 8 * (kind == "notes")), rng) for _ in range(each))
    cells = sum(rows * columns for rows, columns in grids)
    return Shape(kind, grids, max(2, min(most, cells // 2 if kind != "boards" else cells)), frames=frames)


def _grid(cells: int, rng: np.random.Generator) -> tuple[int, int]:
    """Rows and columns of about so many cells, at least 2 x 2 (the processor enlarges smaller pictures)."""
    rows = int(np.clip(round(cells**0.5 * rng.uniform(0.7, 1.4)), 2, max(2, cells // 2)))
    return rows, max(2, cells // rows)
