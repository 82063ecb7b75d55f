"""Conversations about pictures that nobody has seen before, of about the sizes asked for."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from hybridkv_serving.kinds import Kind

# A visual token of Qwen2.5-VL, in pixels each way.
CELL = 28
# Larger pictures are shrunk by the small model's processor.
LARGEST_PICTURE = 1024
SHAPES = 12


@dataclass(frozen=True)
class Turn:
    """What a user says: pictures as data URLs, then a question."""

    pictures: tuple[str, ...]
    text: str

    def message(self) -> dict[str, Any]:
        """The turn as OpenAI clients send it."""
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in self.pictures]
        return {"role": "user", "content": [*pictures, {"type": "text", "text": self.text}]}


@dataclass(frozen=True)
class Conversation:
    """Turns of which each is asked when the one before has been answered."""

    kind: Kind
    turns: tuple[Turn, ...]


def make_trace(kind: Kind, count: int, tokens: int, seed: int | str) -> Iterator[Conversation]:
    """`count` conversations whose first turn has about `tokens` visual tokens.

    `images` are several pictures, `video` is near-duplicate ones, `chat` is pictures with a second question.
    Those of another kind or seed are others.
    """
    random_numbers = random.Random(f"{seed} {kind}")
    each = _picture_tokens(tokens)
    for number in range(count):
        side = max(2, round(each**0.5))
        size = (side * CELL, max(2, each // side) * CELL)
        first = _draw(size, random_numbers)
        shown = [first]
        for _ in range(pictures_of(tokens) - 1):
            if kind == "video":
                shown.append(_change(shown[-1], random_numbers))
            else:
                shown.append(_draw(size, random_numbers))
        turns = [Turn(tuple(_data_url(picture) for picture in shown), f"{number} : what was found first ?")]
        if kind == "chat":
            turns.append(Turn((), "and what was behind the window then ?"))
        yield Conversation(kind, tuple(turns))


def pictures_of(tokens: int) -> int:
    """Pictures of a first turn of about `tokens` visual tokens."""
    return max(1, round(tokens / _picture_tokens(tokens)))


def _picture_tokens(tokens: int) -> int:
    return min(LARGEST_PICTURE, max(4, tokens // 4))


def _draw(size: tuple[int, int], random_numbers: random.Random) -> Image.Image:
    picture = Image.new("RGB", size, _colour(random_numbers))
    for _ in range(SHAPES):
        picture = _change(picture, random_numbers)
    return picture


def _change(picture: Image.Image, random_numbers: random.Random) -> Image.Image:
    """The picture with one more rectangle."""
    changed = picture.copy()
    columns = sorted(random_numbers.sample(range(picture.width), 2))
    rows = sorted(random_numbers.sample(range(picture.height), 2))
    box = (columns[0], rows[0], columns[1], rows[1])
    ImageDraw.Draw(changed).rectangle(box, fill=_colour(random_numbers))
    return changed


def _colour(random_numbers: random.Random) -> tuple[int, int, int]:
    red, green, blue = (random_numbers.randrange(256) for _ in range(3))
    return red, green, blue


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
