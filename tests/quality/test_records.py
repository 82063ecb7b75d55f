"""Files of records: whole lines only, torn ones dropped, folders of one configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from hybridkv_quality.records import AnswerKey, JsonLines, Record
from hybridkv_quality.settings import LinesDamaged, UsageError, claim_folder
from quality_cases import record


def test_lines_come_back_as_they_were(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "r.jsonl", Record)
    assert list(lines.read()) == []
    with lines:
        lines.append(record(sample="a"))
        # Read while it is open: each line is written through.
        assert [line.sample for line in lines.read()] == ["a"]
        lines.append(record(sample="b", output="two\nlines \N{SNOWMAN}", budget=None))
    assert list(lines.read()) == [
        record(sample="a"),
        record(sample="b", output="two\nlines \N{SNOWMAN}", budget=None),
    ]


@pytest.mark.parametrize("torn", ['{"task": "ch', "\x00\x00", '{"task": "chain"}'])
def test_a_torn_last_line_is_dropped_and_its_place_used_again(tmp_path: Path, torn: str) -> None:
    lines = JsonLines(tmp_path / "r.jsonl", Record)
    with lines:
        lines.append(record(sample="a"))
    with lines.path.open("a") as file:
        file.write(torn)
    assert [line.sample for line in lines.read()] == ["a"]
    with lines:
        lines.append(record(sample="b"))
    assert [line.sample for line in lines.read()] == ["a", "b"]


def test_a_damaged_whole_line_is_named(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "r.jsonl", Record)
    with lines:
        lines.append(record())
    with lines.path.open("a") as file:
        file.write('{"task": "chain"}\n')
    with pytest.raises(LinesDamaged, match=r"r\.jsonl, line 2, is no record .* delete the line"):
        list(lines.read())


def test_writing_needs_an_open_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not open"):
        JsonLines(tmp_path / "r.jsonl", Record).append(record())


def test_a_record_knows_its_key_and_memory() -> None:
    one = record(blocks_full=40, blocks_held=10, block_bytes=100)
    assert one.key == AnswerKey("chain", "s0", "hybridkv", 0.25)
    assert one.held_share == 0.25
    assert one.held_bytes == 1000
    unseen = record(blocks_held=None)
    assert unseen.held_share is None
    assert unseen.held_bytes is None
    assert record(block_bytes=None).held_bytes is None


def test_a_folder_belongs_to_one_configuration(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    first = claim_folder(out, {"model": "a", "options": {"theta": 0.9}})
    assert claim_folder(out, {"options": {"theta": 0.9}, "model": "a"}) == first
    with pytest.raises(UsageError, match=r"another configuration: options \(there .*0\.9.*, now .*0\.8"):
        claim_folder(out, {"model": "a", "options": {"theta": 0.8}})
    assert claim_folder(tmp_path / "other", {"model": "b"}) != first


def test_a_folder_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        claim_folder(tmp_path / "file", {})
    with pytest.raises(UsageError, match="something else than an evaluation"):
        claim_folder(tmp_path, {})
    (tmp_path / "run").mkdir()
    for content in ("{", "[]"):
        (tmp_path / "run" / "configuration.json").write_text(content)
        with pytest.raises(UsageError, match="damaged"):
            claim_folder(tmp_path / "run", {})
    (tmp_path / "run" / "configuration.json").unlink()
    (tmp_path / "run" / "configuration.json").mkdir()
    with pytest.raises(UsageError, match="damaged"):
        claim_folder(tmp_path / "run", {})
