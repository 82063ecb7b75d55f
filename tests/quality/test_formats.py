"""Questions in others' layouts: what is read, and what each mistake is called."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hybridkv_quality.formats import open_folder
from hybridkv_quality.sample import Sample
from hybridkv_quality.settings import FolderSource, UsageError
from hybridkv_quality.sources import SampleName, by_context, open_samples
from PIL import Image
from quality_cases import save_picture, write_lines

Change = Callable[[dict[str, Any]], object]


def write_milebench(
    folder: Path,
    task: str = "ActionLocalization",
    *,
    question_type: str = "multi-choice",
    change: Change = lambda content: None,
) -> None:
    """One task with two samples, as MileBench lays it out."""
    content = {
        "meta_data": {
            "dataset": task,
            "num_sample": 2,
            "task_instruction": ["Look at the pictures.", "Find the moment."],
            "question_type": question_type,
        },
        "data": [
            {
                "sample_id": number,
                "task_instruction_id": number % 2,
                "task_instance": {
                    "context": "First {image#1} then {table#2} and {image#1} again: which?",
                    "images_path": ["a.png", "deep/b.png"],
                    "choice_list": ["red", "dark red"],
                },
                "response": "dark red",
            }
            for number in range(2)
        ],
    }
    change(content)
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / f"{task}.json").write_text(json.dumps(content))
    save_picture(folder / task / "images" / "a.png", colour="red")
    save_picture(folder / task / "images" / "deep" / "b.png", colour="blue")


def shown(sample: Sample) -> list[str]:
    """The prompt's parts; pictures by their colour."""
    (message,) = sample.messages
    names = {(255, 0, 0): "<red>", (0, 0, 255): "<blue>"}
    return [
        names[part.getpixel((0, 0))] if isinstance(part, Image.Image) else part  # type: ignore[index]
        for part in message.parts
    ]


def test_milebench_puts_pictures_where_the_context_names_them(tmp_path: Path) -> None:
    write_milebench(tmp_path)
    first, second = open_folder("milebench", tmp_path, None)
    assert shown(first) == [
        "Look at the pictures.\n",
        "First ",
        "<red>",
        " then ",
        "<blue>",
        " and ",
        "<red>",
        " again: which?\nChoice list:\nA. red\nB. dark red\nYour answer is: ",
    ]
    assert shown(second)[0] == "Find the moment.\n"
    assert (first.task, first.name, first.answer, first.metric) == (
        "ActionLocalization",
        "0",
        "dark red",
        "choice",
    )
    assert first.context != second.context


@pytest.mark.parametrize(
    ("task", "question_type", "metric"),
    [
        ("Captions", "open-ended", "rouge"),
        ("TextNeedleInAHaystack", "open-ended", "contains"),
        ("MMCoQA", "open-ended", "contains"),
    ],
)
def test_milebench_tasks_are_scored_as_there(
    tmp_path: Path, task: str, question_type: str, metric: str
) -> None:
    write_milebench(tmp_path, task, question_type=question_type)
    assert {sample.metric for sample in open_folder("milebench", tmp_path, None)} == {metric}


def test_more_options_than_letters_are_listed_without(tmp_path: Path) -> None:
    def many(content: dict[str, Any]) -> None:
        for entry in content["data"]:
            entry["task_instance"]["choice_list"] = [f"item{n}" for n in range(30)]
            entry["response"] = "item7"

    write_milebench(tmp_path, change=many)
    sample = next(iter(open_folder("milebench", tmp_path, None)))
    assert "\nitem0\nitem1\n" in shown(sample)[-1]


def _drop(*path: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        target: Any = content
        for step in path[:-1]:
            target = target[step]
        del target[path[-1]]

    return change


def _set(value: Any, *path: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        target: Any = content
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("meta_data"), "'meta_data' is missing; is this the layout"),
        (_drop("data", 1, "response"), "sample 1: 'response' is missing"),
        (_drop("data", 0, "task_instance", "images_path"), "sample 0: 'images_path' is missing"),
        (
            _set(["a.png", "c.png"], "data", 1, "task_instance", "images_path"),
            r"sample 1: picture .*c\.png is m",
        ),
        (_set(["a.png"], "data", 0, "task_instance", "images_path"), "names picture 2, images_path has 1"),
        (_set(5, "data", 0, "task_instruction_id"), "task_instruction_id 5 is not in meta_data"),
        (_set("green", "data", 0, "response"), "none of its choices; correct the answer"),
        (_set(0, "data", 1, "sample_id"), "two samples of task ActionLocalization are called 0"),
        (_set("x", "data", 0, "task_instance"), "'images_path' is missing"),
        (_set(5, "data"), r"ActionLocalization\.json: 'data' is no list"),
        (_set(None, "data", 0, "task_instance", "images_path"), "sample 0: 'images_path' is no list"),
        (_set(5, "data", 1, "task_instance", "choice_list"), "sample 1: 'choice_list' is no list"),
    ],
)
def test_mistakes_in_milebench_name_file_sample_and_remedy(
    tmp_path: Path, change: Change, message: str
) -> None:
    write_milebench(tmp_path, change=change)
    with pytest.raises(UsageError, match=message):
        open_folder("milebench", tmp_path, None)


def test_tasks_are_chosen_by_name(tmp_path: Path) -> None:
    write_milebench(tmp_path, "A")
    write_milebench(tmp_path, "B")
    assert {entry.task for entry in open_folder("milebench", tmp_path, None).entries} == {"A", "B"}
    assert {entry.task for entry in open_folder("milebench", tmp_path, ["B"]).entries} == {"B"}
    with pytest.raises(UsageError, match=r"--tasks C: .* has A, B"):
        open_folder("milebench", tmp_path, ["C"])


@pytest.mark.parametrize("kind", ["milebench", "lmms-eval", "jsonl"])
def test_a_folder_without_the_layout_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match=r"docs/eval\.md"):
        open_folder(kind, tmp_path, None)
    with pytest.raises(UsageError, match="is no folder"):
        open_folder(kind, tmp_path / "absent", None)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    write_milebench(tmp_path, "A")
    (tmp_path / "A" / "A.json").write_text("{")
    with pytest.raises(UsageError, match=r"A\.json is no JSON"):
        open_folder("milebench", tmp_path, None)


def lmms_line(document: int, **changes: Any) -> dict[str, Any]:
    line = {"doc_id": document, "input": "What is <image> here?", "target": "a boat", "filtered_resps": ["x"]}
    return {**line, **changes}


def test_lmms_eval_logs_find_their_pictures_by_number(tmp_path: Path) -> None:
    log = tmp_path / "model" / "20250101_000000_samples_mme_x.jsonl"
    write_lines(log, [lmms_line(1), lmms_line(12, input="Compare.", target="B")])
    save_picture(tmp_path / "images" / "mme_x" / "1.png", colour="red")
    # Ten after two: by number, not by name.
    for part in (0, 2, 10):
        save_picture(tmp_path / "images" / "mme_x" / f"12-{part}.png", colour="blue" if part == 2 else "red")
    first, second = open_folder("lmms-eval", tmp_path, None)
    assert shown(first) == ["What is ", "<red>", " here?"]
    assert (first.task, first.name, first.answer, first.metric) == ("mme_x", "1", "a boat", "contains")
    assert shown(second) == ["<red>", "<blue>", "<red>", "Compare."]
    assert second.metric == "choice"


def test_lmms_eval_logs_may_name_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "x_samples_t.jsonl", [lmms_line(0, input_media=["p/q.png"])])
    with pytest.raises(UsageError, match=r"line|sample 0: picture .*q\.png is missing"):
        open_folder("lmms-eval", tmp_path, None)
    save_picture(tmp_path / "p" / "q.png", colour="blue")
    (sample,) = open_folder("lmms-eval", tmp_path, None)
    assert "<blue>" in shown(sample)


def test_an_lmms_eval_log_without_pictures_says_where_they_belong(tmp_path: Path) -> None:
    write_lines(tmp_path / "x_samples_t.jsonl", [lmms_line(3)])
    with pytest.raises(UsageError, match=r"lmms-eval logs none, so put document 3's into .*images/t/3\.png"):
        open_folder("lmms-eval", tmp_path, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_id": "/x"}, "line 1: 'doc_id' '/x' cannot be a picture's name"),
        ({"doc_id": "**"}, "line 1: no picture; lmms-eval logs none"),
        ({"input_media": 5}, "line 1: 'input_media' is no list"),
    ],
)
def test_mistakes_in_lmms_eval_logs_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_lines(tmp_path / "x_samples_t.jsonl", [lmms_line(0, **changes)])
    save_picture(tmp_path / "images" / "t" / "9.png")
    with pytest.raises(UsageError, match=re.escape(message)):
        open_folder("lmms-eval", tmp_path, None)


def test_only_line_feeds_end_a_plain_line(tmp_path: Path) -> None:
    line = {"id": 1, "task": "t", "question": "one\u2028two\u0085three", "answer": "x"}
    (tmp_path / "q.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (sample,) = open_folder("jsonl", tmp_path, None)
    assert shown(sample) == ["one\u2028two\u0085three"]


def test_plain_lines_have_questions_pictures_and_choices(tmp_path: Path) -> None:
    save_picture(tmp_path / "p.png")
    lines = [
        {"id": "a", "task": "t", "question": "What? <image>", "images": ["p.png"], "answer": "red"},
        {"id": 2, "task": "u", "question": "Which?", "answer": "B", "choices": ["x", "y"]},
        {"id": 3, "task": "u", "question": "Say it.", "answer": "x y", "metric": "words"},
    ]
    write_lines(tmp_path / "q.jsonl", lines)
    first, second, third = open_folder("jsonl", tmp_path, None)
    assert shown(first) == ["What? ", "<red>"]
    assert first.metric == "contains"
    assert shown(second) == ["Which?\nA. x\nB. y\nAnswer with the letter only."]
    assert (second.name, second.metric) == ("2", "choice")
    assert third.metric == "words"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": 1, "task": "t", "answer": "x"}, r"line 1: 'question' is missing"),
        ({"id": 1, "task": "t", "question": "q", "answer": "?"}, "has no words"),
        (
            {"id": 1, "task": "t", "question": "q", "answer": "x", "metric": "bleu"},
            "metric 'bleu' is none of",
        ),
        ({"id": 1, "task": "t", "question": "q", "answer": "x", "images": ["no.png"]}, "no.png is missing"),
        ({"id": 1, "task": "t", "question": "q", "answer": "0", "choices": list(range(30))}, "30 choices"),
        (["a"], "'task' is missing"),
        (
            {"id": 1, "task": "t", "question": "q", "answer": "x", "choices": 5},
            r"line 1: 'choices' is no list",
        ),
        ({"id": 1, "task": "t", "question": "q", "answer": "x", "images": 5}, r"line 1: 'images' is no list"),
        (
            {"id": 1, "task": "t", "question": "q", "answer": "x", "metric": ["words"]},
            r"line 1: metric \['words'\] is none of",
        ),
    ],
)
def test_mistakes_in_plain_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    write_lines(tmp_path / "q.jsonl", [line])
    with pytest.raises(UsageError, match=message):
        open_folder("jsonl", tmp_path, None)


def test_a_file_that_is_no_picture_is_found_when_its_turn_comes(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_text("no picture")
    write_lines(
        tmp_path / "q.jsonl", [{"id": 1, "task": "t", "question": "q", "answer": "x", "images": ["p.png"]}]
    )
    samples = open_folder("jsonl", tmp_path, None)
    with pytest.raises(UsageError, match=r"t/1: .*p\.png is no readable picture"):
        list(samples)


def test_a_picture_too_large_to_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save_picture(tmp_path / "p.png")
    line = {"id": 1, "task": "t", "question": "q", "answer": "x", "images": ["p.png"]}
    write_lines(tmp_path / "q.jsonl", [line])
    with pytest.raises(UsageError, match=r"t/1: .*p\.png is no readable picture \(Image size"):
        list(open_folder("jsonl", tmp_path, None))


def test_a_changed_annotation_is_another_identity(tmp_path: Path) -> None:
    write_milebench(tmp_path)
    source = FolderSource(kind="milebench", folder=tmp_path)
    before = open_samples(source)
    assert before.names() == [
        SampleName("ActionLocalization", "0", 3),
        SampleName("ActionLocalization", "1", 3),
    ]
    assert [len(group) for group in by_context(before)] == [1, 1]
    assert open_samples(source).identity() == before.identity()
    write_milebench(tmp_path, change=_set("red", "data", 0, "response"))
    assert open_samples(source).identity() != before.identity()
