"""Where samples come from: the suite, or a folder; what they are called before any picture is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from hybridkv_quality.formats import FolderSamples, open_folder
from hybridkv_quality.sample import Sample
from hybridkv_quality.settings import Source, SuiteSource, UsageError


class SampleName(NamedTuple):
    """What is known of a sample without its pictures.

    Attributes:
        pictures: how many its prompt shows.
    """

    task: str
    name: str
    pictures: int


class Samples(Protocol):
    """Samples that can be gone through again and again, in the same order."""

    def names(self) -> list[SampleName]: ...

    def __iter__(self) -> Iterator[Sample]: ...

    def identity(self) -> dict[str, Any]:
        """What decides a sample's content, as far as its name does not."""
        ...


class SuiteSamples:
    """The suite's samples."""

    def __init__(self, source: SuiteSource) -> None:
        """Checks the tasks' names.

        Raises:
            UsageError: unknown task, or a length that no task can fill.
        """
        self._source = source
        try:
            next(iter(self))
        except ValueError as error:
            raise UsageError(f"--tasks, --tokens, --contexts: {error}") from None

    def names(self) -> list[SampleName]:
        return [SampleName(sample.task, sample.name, _count_pictures(sample)) for sample in self]

    def __iter__(self) -> Iterator[Sample]:
        from hybridkv_quality.tasks import suite_samples

        source = self._source
        return iter(
            suite_samples(source.tasks, tokens=source.tokens, contexts=source.contexts, seed=source.seed)
        )

    def identity(self) -> dict[str, Any]:
        return {"tokens": self._source.tokens, "seed": self._source.seed, "suite": _suite_digest()}


def open_samples(source: Source) -> Samples:
    """The samples that a source describes.

    Raises:
        UsageError: a task, file or picture that is not there, before any is asked about.
    """
    if isinstance(source, SuiteSource):
        return SuiteSamples(source)
    return _NamedFolder(open_folder(source.kind, source.folder, source.tasks))


class _NamedFolder:
    def __init__(self, samples: FolderSamples) -> None:
        self._samples = samples

    def names(self) -> list[SampleName]:
        return [SampleName(entry.task, entry.name, len(entry.pictures)) for entry in self._samples.entries]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def identity(self) -> dict[str, Any]:
        return {"folder": str(self._samples.folder.resolve()), "annotations": self._samples.digest}


def by_context(samples: Samples) -> Iterator[list[Sample]]:
    """Samples in groups that begin alike, in their order."""
    for _, group in groupby(samples, key=lambda sample: sample.context):
        yield list(group)


def _count_pictures(sample: Sample) -> int:
    return sum(isinstance(part, Image.Image) for message in sample.messages for part in message.parts)


def _suite_digest() -> str:
    """Changes with the code that makes the suite: names alone do not say what a sample shows."""
    content = hashlib.sha256()
    folder = Path(__file__).parent
    for name in ("lexicon.py", "pictures.py", "scenes.py", "questions.py", "tasks.py"):
        content.update((folder / name).read_bytes())
    return content.hexdigest()[:16]
