"""Draws the suite's pictures: boards of cells, some of them dominoes, the others clutter.

A cell is 28 x 28 pixels, what Qwen2.5-VL turns into one visual token. A domino's left half is its name, a
letter on a colour; its right half is what it points to, another domino's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hybridkv_quality.lexicon import COLOURS

CELL = 28
HALF = CELL // 2
LETTER_SIZE = 18
# How far a letter strays from the middle, a colour from its value, a pixel from its colour.
STRAY, COLOUR_JITTER, NOISE = 1, 10, 8.0

Pixels = NDArray[np.uint8]


class Name(NamedTuple):
    """What a domino is called: the colour and the letter of its left half."""

    colour: str
    glyph: str


class Domino(NamedTuple):
    """A fact on a picture: `name` points to `target`."""

    name: Name
    target: Name


Board = Sequence[Sequence[Domino | None]]


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(LETTER_SIZE)


@cache
def _letter(glyph: str) -> Pixels:
    """`[CELL, HALF]` uint8, how much ink each pixel of a letter has, in the middle of half a cell."""
    canvas = Image.new("L", (HALF, CELL), 0)
    ImageDraw.Draw(canvas).text((HALF / 2, CELL / 2), glyph, fill=255, font=_font(), anchor="mm")
    return np.asarray(canvas)


def draw_half(name: Name, rng: np.random.Generator) -> Pixels:
    """`[CELL, HALF, 3]` uint8: a letter, black or white, on its colour, a little off each time."""
    paper = np.array(COLOURS[name.colour]) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    ink = 255.0 if COLOURS[name.colour][0] * 0.3 + COLOURS[name.colour][1] * 0.6 < 110 else 0.0
    shift = rng.integers(-STRAY, STRAY + 1, 2)
    cover = np.roll(_letter(name.glyph), shift, axis=(0, 1))[..., None] / 255.0
    drawn = paper * (1 - cover) + ink * cover + rng.normal(0, NOISE, (CELL, HALF, 1))
    return drawn.clip(0, 255).astype(np.uint8)


def draw_domino(domino: Domino, rng: np.random.Generator) -> Pixels:
    """`[CELL, CELL, 3]` uint8."""
    return np.concatenate([draw_half(domino.name, rng), draw_half(domino.target, rng)], axis=1)


def draw_clutter(rng: np.random.Generator) -> Pixels:
    """`[CELL, CELL, 3]` uint8: grey with a gradient, stains and noise; never a letter."""
    slope = rng.normal(0, 0.8, 2)
    rows, columns = np.mgrid[:CELL, :CELL]
    grey = rng.uniform(90, 190) + slope[0] * rows + slope[1] * columns
    canvas = Image.fromarray(np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 3))):
        left, top = rng.integers(-4, CELL - 4, 2).tolist()
        width, height = rng.integers(4, 20, 2).tolist()
        draw.ellipse((left, top, left + width, top + height), fill=tuple(rng.integers(60, 220, 3).tolist()))
    return (np.asarray(canvas) + rng.normal(0, NOISE, (CELL, CELL, 1))).clip(0, 255).astype(np.uint8)


def draw_board(board: Board, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of `rows x columns` cells, each drawn anew."""
    rows = [
        np.concatenate(
            [draw_clutter(rng) if cell is None else draw_domino(cell, rng) for cell in row], axis=1
        )
        for row in board
    ]
    return Image.fromarray(np.concatenate(rows, axis=0))
