"""What is asked about a scene, and the right answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from hybridkv_quality.lexicon import (
    COLOURS,
    COMMA,
    COUNT,
    COUNTS,
    FIND,
    FOLLOW,
    NEXT,
    NUMBERS,
    ORDINALS,
    RECITE,
    SHOW,
)
from hybridkv_quality.pictures import Domino
from hybridkv_quality.scenes import Kind, Scene

HOPS = 8
KEYS = 3


class Turn(NamedTuple):
    """What the user asks and what the assistant answers, words with one space before each."""

    ask: str
    answer: str


Question = tuple[Turn, ...]


def say(*words: str) -> str:
    """The words, a space before each."""
    return "".join(f" {word}" for word in words)


def _any(scene: Scene, rng: np.random.Generator) -> int:
    return int(rng.integers(len(scene.dominoes)))


def _read(domino: Domino) -> tuple[str, ...]:
    return (*domino.name, *domino.target)


def recall(scene: Scene, rng: np.random.Generator) -> Question:
    """Which domino does this one point to? The answer begins with the name asked for."""
    domino = scene.dominoes[_any(scene, rng)]
    return (Turn(say(FIND, *domino.name), say(*_read(domino))),)


def multi_recall(scene: Scene, rng: np.random.Generator) -> Question:
    """Three names in one question."""
    chosen = rng.permutation(len(scene.dominoes))[:KEYS]
    dominoes = [scene.dominoes[i] for i in chosen]
    ask: list[str] = [FIND]
    answer: list[str] = []
    for i, domino in enumerate(dominoes):
        comma = [COMMA] if i else []
        ask += [*comma, *domino.name]
        answer += [*comma, *_read(domino)]
    return (Turn(say(*ask), say(*answer)),)


def chain(scene: Scene, rng: np.random.Generator) -> Question:
    """Eight hops: each domino names the next one, so later ones cannot be foreseen."""
    start = _any(scene, rng)
    count = len(scene.dominoes)
    names = [scene.dominoes[(start + hop) % count].name for hop in range(HOPS + 1)]
    return (Turn(say(FOLLOW, *names[0]), say(*(word for name in names for word in name))),)


def second_question(scene: Scene, rng: np.random.Generator) -> Question:
    """A recall, then a chain that has nothing to do with it."""
    return (*recall(scene, rng), *chain(scene, rng))


def index(scene: Scene, rng: np.random.Generator) -> Question:
    """What is on the picture of this ordinal?"""
    place = int(rng.integers(len(scene.gallery)))
    return (Turn(say(SHOW, ORDINALS[place]), say(ORDINALS[place], *_read(scene.gallery[place]))),)


def order(scene: Scene, rng: np.random.Generator) -> Question:
    """Which picture comes after the one with this name, and what is on it?"""
    place = int(rng.integers(len(scene.gallery) - 1))
    name, following = scene.gallery[place].name, scene.gallery[place + 1]
    answer = say(*name, ORDINALS[place], COMMA, ORDINALS[place + 1], *_read(following))
    return (Turn(say(NEXT, *name), answer),)


def count(scene: Scene, rng: np.random.Generator) -> Question:
    """How many names have this colour?"""
    occurring = Counter(domino.name.colour for domino in scene.gallery)
    countable = [colour for colour in COLOURS if occurring[colour] in COUNTS]
    colour = countable[int(rng.integers(len(countable)))]
    return (Turn(say(COUNT, colour), say(colour, NUMBERS[occurring[colour] - 1])),)


def recite(scene: Scene, rng: np.random.Generator) -> Question:
    """What does the note of this name say?"""
    name, words = scene.notes[int(rng.integers(len(scene.notes)))]
    return (Turn(say(RECITE, name), say(name, *words)),)


class Task(NamedTuple):
    """A kind of scene and what is asked about it."""

    kind: Kind
    ask: Callable[[Scene, np.random.Generator], Question]


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "recall": Task("boards", recall),
        "multi_recall": Task("boards", multi_recall),
        "chain": Task("boards", chain),
        "second_question": Task("boards", second_question),
        "index": Task("gallery", index),
        "order": Task("gallery", order),
        "count": Task("gallery", count),
        "text_needle": Task("notes", recite),
        "picture_needle": Task("book", recall),
        "video": Task("video", chain),
    }
)
