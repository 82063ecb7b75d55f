"""The suite: samples of every task at a length, the same for the same seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from hybridkv_quality.pictures import draw_board
from hybridkv_quality.questions import TASKS, Question
from hybridkv_quality.sample import Message, Sample
from hybridkv_quality.scenes import Scene, build_scene, shape_for

__all__ = ["TASKS", "suite_samples"]

# The chat's own tokens, question and answer.
BESIDE_SCENE = 40


def suite_samples(
    tasks: Sequence[str] | None = None, *, tokens: int = 2048, contexts: int = 20, seed: int = 0
) -> Iterator[Sample]:
    """Samples grouped by scene: every task of a scene's kind asks one question about it.

    A scene depends only on kind, tokens, seed and its number: more contexts or fewer tasks change no sample.

    Args:
        tasks: names in `TASKS`; None for all.
        tokens: about the prompt's length.
        contexts: scenes of each kind.

    Raises:
        ValueError: unknown task, too short a length, no contexts.
    """
    chosen = list(TASKS) if tasks is None else list(dict.fromkeys(tasks))
    unknown = [name for name in chosen if name not in TASKS]
    if unknown or not chosen:
        raise ValueError(f"unknown tasks {', '.join(unknown)}: choose among {', '.join(TASKS)}")
    if contexts < 1:
        raise ValueError(f"contexts must be at least 1, got {contexts}")
    for kind in dict.fromkeys(TASKS[name].kind for name in chosen):
        for number in range(contexts):
            context = f"{kind}-{tokens}-{seed}-{number}"
            rng = _generator(context)
            scene = build_scene(shape_for(kind, tokens - BESIDE_SCENE, rng), rng)
            message = Message(
                "user",
                tuple(part if isinstance(part, str) else draw_board(part, rng) for part in scene.parts),
            )
            for name in chosen:
                if TASKS[name].kind == kind:
                    yield _sample(name, context, message, scene)


def _sample(task: str, context: str, shown: Message, scene: Scene) -> Sample:
    question: Question = TASKS[task].ask(scene, _generator(f"{context}-{task}"))
    messages: list[Message] = []
    for turn in question:
        before = shown.parts if not messages else ()
        messages += [Message("user", (*before, turn.ask)), Message("assistant", (turn.answer,))]
    answer = question[-1].answer.strip()
    return Sample(
        task=task,
        name=context,
        messages=tuple(messages[:-1]),
        answer=answer,
        context=context,
        max_tokens=len(answer.split()) + 2,
    )


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))
