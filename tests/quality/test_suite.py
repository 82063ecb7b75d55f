"""The suite's scenes and questions: seeded, self-consistent, of the length asked for."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hybridkv_quality.lexicon import COLOURS, COUNTS, NUMBERS, ORDINALS, spaced_words
from hybridkv_quality.pictures import CELL, Domino, Name, draw_board, draw_half
from hybridkv_quality.questions import HOPS, KEYS, TASKS
from hybridkv_quality.sample import Sample
from hybridkv_quality.scenes import KINDS, Kind, Scene, Shape, build_scene, shape_for
from hybridkv_quality.tasks import suite_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def scene_of(kind: Kind, tokens: int, seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    return build_scene(shape_for(kind, tokens, rng), rng)


def shown(scene: Scene) -> list[Domino]:
    """The dominoes that are really on the pictures, in reading order."""
    boards = [part for part in scene.parts if not isinstance(part, str)]
    return [cell for board in boards for row in board for cell in row if cell is not None]


def answer(scene: Scene, task: str, seed: int) -> list[str]:
    return TASKS[task].ask(scene, np.random.default_rng(seed))[-1].answer.split()


@settings(max_examples=60, deadline=None, database=None)
@given(st.sampled_from(KINDS), st.integers(48, 9000), st.integers(0, 10**6))
def test_every_fact_is_on_a_picture(kind: Kind, tokens: int, seed: int) -> None:
    scene = scene_of(kind, tokens, seed)
    found = Counter(shown(scene))
    assert set(found) == set(scene.dominoes)
    assert set(found.values()) == {scene.shape.frames}
    names = [domino.name for domino in scene.dominoes]
    assert len(set(names)) == len(names)
    assert [domino.target for domino in scene.dominoes] == [*names[1:], names[0]]


@settings(max_examples=60, deadline=None, database=None)
@given(st.sampled_from(KINDS), st.integers(400, 9000), st.integers(0, 10**6))
def test_a_scene_is_about_as_long_as_asked(kind: Kind, tokens: int, seed: int) -> None:
    scene = scene_of(kind, tokens, seed)
    texts = sum(len(part.split()) for part in scene.parts if isinstance(part, str))
    pictures = [part for part in scene.parts if not isinstance(part, str)]
    length = texts + sum(len(board) * len(board[0]) + 2 for board in pictures)
    assert 0.7 * tokens <= length <= 1.15 * tokens


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(0, 10**6))
def test_answers_follow_from_the_pictures(seed: int) -> None:
    boards = scene_of("boards", 600, seed)
    pointer = {domino.name: domino.target for domino in shown(boards)}

    def hop(words: list[str]) -> list[str]:
        return list(pointer[Name(words[0], words[1])])

    recalled = answer(boards, "recall", seed)
    assert recalled[2:] == hop(recalled[:2])
    multi = " ".join(answer(boards, "multi_recall", seed)).split(" , ")
    assert len(multi) == KEYS
    assert all(part.split()[2:] == hop(part.split()[:2]) for part in multi)
    for task in ("chain", "second_question"):
        chain = answer(boards, task, seed)
        pairs = [chain[i : i + 2] for i in range(0, len(chain), 2)]
        assert len(pairs) == HOPS + 1
        assert all(hop(first) == second for first, second in pairwise(pairs))

    gallery = scene_of("gallery", 600, seed)
    pictures = shown(gallery)
    index = answer(gallery, "index", seed)
    picture = pictures[ORDINALS.index(index[0])]
    assert index[1:] == [*picture.name, *picture.target]
    order = answer(gallery, "order", seed)
    before, after = ORDINALS.index(order[2]), ORDINALS.index(order[4])
    assert (after - before, Name(*order[:2])) == (1, pictures[before].name)
    assert order[5:] == [*pictures[after].name, *pictures[after].target]
    colour, number = answer(gallery, "count", seed)
    occurs = sum(picture.name.colour == colour for picture in pictures)
    assert (occurs in COUNTS, NUMBERS[occurs - 1]) == (True, number)

    notes = scene_of("notes", 600, seed)
    recited = answer(notes, "text_needle", seed)
    assert f" note {' '.join(recited)}" in [part for part in notes.parts if isinstance(part, str)]


def test_samples_depend_on_nothing_but_their_own_name() -> None:
    def texts(samples: list[Sample]) -> list[tuple[str, str, str, bytes]]:
        return [
            (
                s.task,
                s.name,
                s.answer,
                b"".join(p.tobytes() for p in s.messages[0].parts if isinstance(p, Image.Image)),
            )
            for s in samples
        ]

    few = texts(list(suite_samples(["recall", "video"], tokens=300, contexts=1, seed=3)))
    many = texts(list(suite_samples(["video", "chain", "recall"], tokens=300, contexts=2, seed=3)))
    assert set(few) < set(many)
    assert len(many) == len(set(many)) == 6
    other = texts(list(suite_samples(["recall", "video"], tokens=300, contexts=1, seed=4)))
    assert not {sample[2:] for sample in other} & {sample[2:] for sample in few}


def test_second_questions_come_after_an_answered_one() -> None:
    (sample,) = suite_samples(["second_question"], tokens=300, contexts=1)
    assert [message.role for message in sample.messages] == ["user", "assistant", "user"]
    assert all(isinstance(part, str) for part in sample.messages[-1].parts)


def test_pictures_are_drawn_anew_and_legible() -> None:
    rng = np.random.default_rng(0)
    board = [[Domino(Name("red", "K"), Name("cyan", "n")), None]] * 2
    first, second = draw_board(board, rng), draw_board(board, rng)
    assert first.size == (2 * CELL, 2 * CELL)
    assert first.tobytes() != second.tobytes()
    for colour, value in COLOURS.items():
        drawn = draw_half(Name(colour, "K"), rng)
        # The paper covers more than the letter.
        assert np.abs(np.median(drawn, axis=(0, 1)) - np.array(value)).max() < 25


def test_words_are_unlike_each_other() -> None:
    assert len(set(spaced_words())) == len(spaced_words())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["nonsense"]}, "unknown tasks nonsense: choose among recall"),
        ({"contexts": 0}, "contexts must be at least 1"),
        ({"tokens": 20}, "at least 48 tokens"),
        ({"tokens": 14_000, "tasks": ["text_needle"]}, "notes has at most 12288 tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(suite_samples(**arguments))  # type: ignore[arg-type]


def test_more_facts_than_room_are_refused() -> None:
    with pytest.raises(ValueError, match="4 cells cannot have 5 dominoes"):
        build_scene(Shape("boards", ((2, 2),), 5), np.random.default_rng(0))
