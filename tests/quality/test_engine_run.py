"""`hybridkv eval` with real engines: records, memory at the block pool, resuming, failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hybridkv_quality.records import AnswerKey, HeadsExample, JsonLines, Record
from hybridkv_quality.report import Results
from quality_cases import write_lines

from hybridkv_vllm.cli import main
from hybridkv_vllm.plan import PAGE_TOKENS, arena_blocks, ceil_pages
from hybridkv_vllm.tiny_model import sample_picture

pytestmark = pytest.mark.slow

BUDGETS = (0.25, 0.5)
SCENE = "The old lighthouse stood above the harbour and the boats came home before the storm. "


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions about parts of the photograph and about text; one is too short to be compressed."""
    folder = tmp_path_factory.mktemp("questions")
    photograph = sample_picture()
    for number in range(2):
        photograph.crop((0, 40 * number, 448, 336 + 40 * number)).save(folder / f"{number}.png")
    common = {"question": "What does <image> show?", "answer": "a woman", "metric": "words"}
    lines = [{"id": number, "task": "photo", "images": [f"{number}.png"], **common} for number in range(2)]
    lines.append({"id": 0, "task": "text", "question": SCENE * 12, "answer": "storm"})
    lines.append({"id": 1, "task": "text", "question": "Hi", "answer": "hello"})
    write_lines(folder / "questions.jsonl", lines)
    return folder


def arguments(questions: Path, model: Path, out: Path, *more: str) -> list[str]:
    given = [
        "eval",
        "--out",
        str(out),
        "--model",
        str(model),
        "--samples",
        str(questions),
        "--format",
        "jsonl",
    ]
    given += [
        "--policies",
        "hybridkv,snapkv",
        "--budgets",
        "0.25,0.5,1.0",
        "--option",
        "min_prompt_tokens=64",
    ]
    # Few rows at once, so that requests come and go.
    return [*given, "--max-model-len", "2048", "--concurrency", "3", "--json", *more]


@pytest.fixture(scope="module")
def out(questions: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two policies, two budgets and the full cache."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert main(arguments(questions, tiny_model, folder)) == 0
    return folder


def records(folder: Path) -> list[Record]:
    return list(JsonLines(folder / "records.jsonl", Record).read())


def test_every_question_is_answered_once_under_every_condition(out: Path) -> None:
    conditions = [("full", 1.0)] + [(policy, b) for policy in ("hybridkv", "snapkv") for b in BUDGETS]
    expected = {
        AnswerKey(task, name, *condition)
        for condition in conditions
        for task in ("photo", "text")
        for name in "01"
    }
    keys = [record.key for record in records(out)]
    assert set(keys) == expected
    assert len(keys) == len(expected)


def test_blocks_held_are_the_arena_and_the_partial_block(out: Path) -> None:
    seen = 0
    for record in records(out):
        tokens = record.prompt_tokens
        assert record.blocks_full == ceil_pages(tokens)
        assert record.budget is not None
        if record.compressed:
            tail = tokens % PAGE_TOKENS > 0
            assert record.blocks_held == arena_blocks(record.budget, tokens) + tail
            seen += 1
        else:
            assert tokens < 64
            assert record.blocks_held == ceil_pages(tokens)
    assert seen == 15
    # Four layers of two KV heads of 64, K and V in bf16.
    assert {record.block_bytes for record in records(out)} == {4 * 2 * 16 * 64 * 2 * 2}


def test_only_heads_that_recall_hold_host_memory(out: Path) -> None:
    for record in records(out):
        if not record.compressed:
            continue
        recalls = record.policy == "hybridkv" and record.task == "photo"
        # Four of the eight heads are dynamic, and a quarter of the cache holds the landmarks of all four.
        heads = 4 if recalls else 0
        assert (record.recalled_share or 0) == heads / 8
        pages = record.prompt_tokens // PAGE_TOKENS
        assert record.host_bytes == pages * (record.block_bytes or 0) // 8 * heads


def test_later_budgets_find_the_prompt_in_the_prefix_cache(out: Path) -> None:
    later = [r for r in records(out) if r.budget == 0.5 and r.task == "photo"]
    assert len(later) == 4
    for record in later:
        assert record.cached_tokens is not None
        assert record.cached_tokens > record.prompt_tokens / 2


def test_results_heads_and_plots_are_written(out: Path) -> None:
    results = Results.model_validate_json((out / "results.json").read_text())
    assert [(c.policy, c.budget, c.n) for c in results.conditions] == [
        ("full", 1.0, 4),
        ("hybridkv", 0.5, 4),
        ("hybridkv", 0.25, 4),
        ("snapkv", 0.5, 4),
        ("snapkv", 0.25, 4),
    ]
    assert results.configuration["options"] == {"min_prompt_tokens": 64}
    examples = list(JsonLines(out / "heads.jsonl", HeadsExample).read())
    assert {(e.task, e.budget) for e in examples if e.policy == "hybridkv"} == {
        (task, budget) for task in ("photo", "text") for budget in BUDGETS
    }
    assert (out / "plots" / "accuracy_by_memory.png").exists()
    assert (out / "plots" / "heads_photo.png").exists()


def test_a_second_run_asks_nothing(out: Path, questions: Path, tiny_model: Path) -> None:
    before = (out / "records.jsonl").read_bytes(), (out / "engine-full.log").stat().st_mtime_ns
    assert main(arguments(questions, tiny_model, out)) == 0
    assert ((out / "records.jsonl").read_bytes(), (out / "engine-full.log").stat().st_mtime_ns) == before


def test_a_killed_run_goes_on_where_it_stopped(
    out: Path, questions: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Only what is missing is asked again, and the same is answered."""
    resumed = tmp_path / "out"
    resumed.mkdir()
    (resumed / "configuration.json").write_bytes((out / "configuration.json").read_bytes())
    lines = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["policy"] != "snapkv"]
    gone = [line for line in lines if json.loads(line)["policy"] == "snapkv"]
    (resumed / "records.jsonl").write_bytes(b"".join(kept + gone[:3]) + gone[3][:40])
    assert main(arguments(questions, tiny_model, resumed)) == 0
    assert [path.name for path in resumed.glob("engine-*.log")] == ["engine-snapkv.log"]
    answers = {record.key: record.output for record in records(out)}
    assert {record.key: record.output for record in records(resumed)} == answers
    assert len(records(resumed)) == len(answers)


def test_another_configuration_is_refused(
    out: Path, questions: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(questions, tiny_model, out, "--option", "theta=0.5")) == 2
    assert "another configuration: options" in capsys.readouterr().err


def test_an_engine_that_cannot_start_is_one_error_with_its_log(
    questions: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(questions, tiny_model, out, "--max-model-len", "100")) == 1
    said = capsys.readouterr().err
    assert "the engine of policy full stopped with exit code" in said
    assert "engine-full.log ends with" in said
    assert records(out) == []
