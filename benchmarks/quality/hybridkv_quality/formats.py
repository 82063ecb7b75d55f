"""Reads questions that others have laid out: MileBench, lmms-eval's sample logs, and a plain JSONL."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hybridkv_quality.sample import Message, Sample
from hybridkv_quality.scoring import has_letters, letter, right_option, words
from hybridkv_quality.settings import UsageError

# Room for an answer; MileBench itself gives 512.
ANSWER_TOKENS = {"words": 64, "contains": 128, "choice": 64, "rouge": 512}
PICTURE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
# In MileBench's contexts; the number counts from 1 in `images_path`.
_MILEBENCH_PICTURE = re.compile(r"\{(?:image|table)#(\d+)\}")
_LOG_PICTURE = re.compile(r"<image(?:\s*\d+)?>")
_LOG_NAME = re.compile(r"(?:.*_)?samples_(.+)\.jsonl$")
# MileBench's own scoring looks for the answer anywhere in the output of these.
_MILEBENCH_CONTAINS = ("NeedleInAHaystack", "MMCoQA")


@dataclass(frozen=True)
class Entry:
    """A question as it lies in the folder: text with pictures by path, in the order of reading.

    Attributes:
        parts: text, and the paths of pictures.
    """

    task: str
    name: str
    parts: tuple[str | Path, ...]
    answer: str
    metric: Any
    choices: tuple[str, ...] = ()

    @property
    def pictures(self) -> list[Path]:
        return [part for part in self.parts if isinstance(part, Path)]

    def load(self) -> Sample:
        """The sample, its pictures decoded.

        Raises:
            UsageError: a file that is no picture.
        """
        parts = tuple(part if isinstance(part, str) else self._open(part) for part in self.parts)
        return Sample(
            task=self.task,
            name=self.name,
            messages=(Message("user", parts),),
            answer=self.answer,
            # Every question of a folder has a conversation of its own.
            context=f"{self.task}/{self.name}",
            metric=self.metric,
            max_tokens=ANSWER_TOKENS[self.metric],
            choices=self.choices,
        )

    def _open(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(
                f"{self.task}/{self.name}: {path} is no readable picture ({error}); fetch it again, or "
                "take the sample out"
            ) from None


@dataclass(frozen=True)
class FolderSamples:
    """All questions of a folder; pictures are read when their turn comes.

    Attributes:
        digest: of the annotation files.
    """

    folder: Path
    entries: Sequence[Entry]
    digest: str

    def __iter__(self) -> Iterator[Sample]:
        return (entry.load() for entry in self.entries)


@dataclass
class _Reader:
    """Collects entries of one folder, and problems in words that say where they are."""

    folder: Path
    entries: list[Entry] = field(default_factory=list)
    content: Any = field(default_factory=hashlib.sha256)

    def text(self, file: Path) -> str:
        try:
            content = file.read_bytes()
            self.content.update(content)
            return content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} cannot be read ({error}); fetch the data set again") from None

    def add(self, entry: Entry, file: Path) -> None:
        where = f"{file}, sample {entry.name}"
        for path in entry.pictures:
            if not path.is_file():
                raise UsageError(f"{where}: picture {path} is missing; fetch it, or take the sample out")
        if entry.metric != "choice" and not words(entry.answer):
            raise UsageError(f"{where}: the answer {entry.answer!r} has no words; take the sample out")
        if entry.metric == "choice":
            try:
                right_option(entry.load() if not entry.pictures else _without_pictures(entry))
            except ValueError as error:
                raise UsageError(f"{where}: {error}; correct the answer or the choices") from None
        self.entries.append(entry)

    def finish(self) -> FolderSamples:
        seen: set[tuple[str, str]] = set()
        for entry in self.entries:
            if (entry.task, entry.name) in seen:
                raise UsageError(f"{self.folder}: two samples of task {entry.task} are called {entry.name}")
            seen.add((entry.task, entry.name))
        return FolderSamples(self.folder, self.entries, self.content.hexdigest()[:16])


def open_folder(kind: str, folder: Path, tasks: Sequence[str] | None) -> FolderSamples:
    """Reads and checks a folder's annotations; every picture must be there.

    Args:
        kind: `milebench`, `lmms-eval` or `jsonl`.
        tasks: names to keep; None for all.

    Raises:
        UsageError: what is wrong, in which file and sample, and what to do.
    """
    if not folder.is_dir():
        raise UsageError(f"--samples {folder} is no folder; name the one that holds the data set")
    reader = _Reader(folder)
    {"milebench": _read_milebench, "lmms-eval": _read_lmms_eval, "jsonl": _read_jsonl}[kind](reader, tasks)
    return reader.finish()


def _without_pictures(entry: Entry) -> Sample:
    return Sample(entry.task, entry.name, (), entry.answer, "", "choice", choices=entry.choices)


def _choose(
    found: Mapping[str, Path], tasks: Sequence[str] | None, folder: Path, what: str
) -> dict[str, Path]:
    if not found:
        raise UsageError(f"--samples {folder} holds no {what}; see docs/eval.md for the layout")
    unknown = [task for task in tasks or () if task not in found]
    if unknown:
        raise UsageError(f"--tasks {', '.join(unknown)}: {folder} has {', '.join(sorted(found))}")
    return {task: found[task] for task in (tasks or sorted(found))}


def _field(record: Any, name: str, where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise UsageError(f"{where}: '{name}' is missing; is this the layout that --format says?")
    return record[name]


def _items(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{where}: '{name}' is no list; is this the layout that --format says?")
    return value


def _read_milebench(reader: _Reader, tasks: Sequence[str] | None) -> None:
    """`TASK/TASK.json` with `meta_data` and `data`, pictures in `TASK/images` (github.com/MileBench)."""
    found = {file.stem: file for file in reader.folder.glob("*/*.json") if file.stem == file.parent.name}
    for task, file in _choose(found, tasks, reader.folder, "TASK/TASK.json").items():
        try:
            content = json.loads(reader.text(file))
        except ValueError as error:
            raise UsageError(f"{file} is no JSON ({error}); fetch the data set again") from None
        meta = _field(content, "meta_data", str(file))
        instructions = _field(meta, "task_instruction", f"{file}, meta_data")
        for number, record in enumerate(_items(_field(content, "data", str(file)), "data", str(file))):
            where = (
                f"{file}, sample {record.get('sample_id', number) if isinstance(record, dict) else number}"
            )
            reader.add(_milebench_entry(task, record, instructions, meta, where), file)


def _milebench_entry(task: str, record: Any, instructions: Any, meta: Any, where: str) -> Entry:
    instance = _field(record, "task_instance", where)
    instruction_id = _field(record, "task_instruction_id", where)
    try:
        instruction = str(instructions[instruction_id])
    except (LookupError, TypeError):
        raise UsageError(f"{where}: task_instruction_id {instruction_id!r} is not in meta_data") from None
    file, _, _ = where.rpartition(", sample ")
    names = _items(_field(instance, "images_path", where), "images_path", where)
    images = [Path(file).parent / "images" / str(name) for name in names]
    listed_choices = _items(instance.get("choice_list") or [], "choice_list", where)
    choices = tuple(str(choice) for choice in listed_choices)
    answer = str(_field(record, "response", where)).strip()
    text = str(_field(instance, "context", where))
    if choices:
        # Some tasks have more options than letters: those are listed without.
        listed = (f"{letter(i)}. {c}" if has_letters(choices) else c for i, c in enumerate(choices))
        # Worded as MileBench does, so that results can be held against its own.
        text += "\nChoice list:\n" + "\n".join(listed) + "\nYour answer is: "
    parts: list[str | Path] = [instruction + "\n"]
    for index, piece in enumerate(_MILEBENCH_PICTURE.split(text)):
        if index % 2 == 0:
            parts += [piece] if piece else []
            continue
        if not 1 <= int(piece) <= len(images):
            raise UsageError(f"{where}: the context names picture {piece}, images_path has {len(images)}")
        parts.append(images[int(piece) - 1])
    if any(name in task for name in _MILEBENCH_CONTAINS):
        metric = "contains"
    else:
        metric = "choice" if _field(meta, "question_type", where) == "multi-choice" else "rouge"
    return Entry(task, str(_field(record, "sample_id", where)), tuple(parts), answer, metric, choices)


def _json_lines(reader: _Reader, file: Path) -> Iterator[tuple[str, Any]]:
    # Strings may hold other ends of lines, such as U+2028, as they are.
    for number, line in enumerate(reader.text(file).split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise UsageError(f"{where} is no JSON ({error}); correct the line") from None


def _read_lmms_eval(reader: _Reader, tasks: Sequence[str] | None) -> None:
    """`*_samples_TASK.jsonl` as `--log_samples` writes them, pictures in `images/TASK/DOC_ID[-N].png`.

    lmms-eval keeps no pictures. A log made with documents that name files has `input_media`; these paths,
    relative to the folder, are taken where there is no picture by number.
    """
    found = {
        match.group(1): file
        for file in sorted(reader.folder.rglob("*.jsonl"))
        if (match := _LOG_NAME.fullmatch(file.name))
    }
    for task, file in _choose(found, tasks, reader.folder, "*_samples_TASK.jsonl").items():
        for where, record in _json_lines(reader, file):
            document = str(_field(record, "doc_id", where))
            pictures = _logged_pictures(reader.folder, task, document, record, where)
            text = str(_field(record, "input", where))
            answer = str(_field(record, "target", where)).strip()
            metric = "choice" if re.fullmatch(r"[A-Z]", answer) else "contains"
            letters = tuple(letter(index) for index in range(26)) if metric == "choice" else ()
            reader.add(Entry(task, document, _interleave(text, pictures), answer, metric, letters), file)


def _logged_pictures(folder: Path, task: str, document: str, record: Any, where: str) -> list[Path]:
    if document.startswith("/"):
        raise UsageError(f"{where}: 'doc_id' {document!r} cannot be a picture's name; correct it")
    own = re.compile(rf"{re.escape(document)}(?:-(\d+))?")
    numbered = [
        (int(match.group(1) or 0), path)
        for path in (folder / "images" / task).glob(f"{glob.escape(document)}*")
        if path.suffix.lower() in PICTURE_TYPES and (match := own.fullmatch(path.stem))
    ]
    if numbered:
        return [path for _, path in sorted(numbered)]
    media = _items(record.get("input_media") or [], "input_media", where)
    if media:
        return [folder / str(path) for path in media]
    raise UsageError(
        f"{where}: no picture; lmms-eval logs none, so put document {document}'s into "
        f"{folder / 'images' / task}/{document}.png (several: {document}-0.png, {document}-1.png, ...)"
    )


def _interleave(text: str, pictures: Sequence[Path]) -> tuple[str | Path, ...]:
    """Pictures at their `<image>` marks where there is one for each, else all before the text."""
    pieces = _LOG_PICTURE.split(text)
    if len(pieces) != len(pictures) + 1:
        return (*pictures, "".join(pieces))
    parts: list[str | Path] = [pieces[0]]
    for picture, piece in zip(pictures, pieces[1:], strict=True):
        parts += [picture, piece]
    return tuple(part for part in parts if part != "")


def _read_jsonl(reader: _Reader, tasks: Sequence[str] | None) -> None:
    """Every `*.jsonl`: `{"id", "task", "question", "images": [paths], "answer", "choices"?, "metric"?}`."""
    files = sorted(reader.folder.glob("*.jsonl"))
    if not files:
        raise UsageError(f"--samples {reader.folder} holds no *.jsonl; see docs/eval.md for the layout")
    found: dict[str, Path] = {}
    for file in files:
        for where, record in _json_lines(reader, file):
            task = str(_field(record, "task", where))
            found[task] = file
            if tasks is None or task in tasks:
                reader.add(_jsonl_entry(reader.folder, task, record, where), file)
    _choose(found, tasks, reader.folder, "questions")


def _jsonl_entry(folder: Path, task: str, record: Any, where: str) -> Entry:
    choices = tuple(str(choice) for choice in _items(record.get("choices") or [], "choices", where))
    metric = record.get("metric", "choice" if choices else "contains")
    if not isinstance(metric, str) or metric not in ANSWER_TOKENS:
        raise UsageError(f"{where}: metric {metric!r} is none of {', '.join(ANSWER_TOKENS)}")
    question = str(_field(record, "question", where))
    if not has_letters(choices):
        raise UsageError(f"{where}: {len(choices)} choices are more than letters; split the question")
    if choices:
        question += "\n" + "\n".join(f"{letter(i)}. {choice}" for i, choice in enumerate(choices))
        question += "\nAnswer with the letter only."
    pictures = [folder / str(path) for path in _items(record.get("images") or [], "images", where)]
    answer = str(_field(record, "answer", where)).strip()
    parts = _interleave(question, pictures)
    return Entry(task, str(_field(record, "id", where)), parts, answer, metric, choices)
