"""Results from records: accuracy, memory, hops, tables, remarks and plots."""

from __future__ import annotations

from pathlib import Path

import pytest
from hybridkv_quality.environment import environment, model_digest
from hybridkv_quality.plots import plot_all, smallest_budgets
from hybridkv_quality.records import Record
from hybridkv_quality.report import Results, remarks, summarise, summary_table, task_tables
from hybridkv_quality.settings import UsageError
from quality_cases import heads_example, record
from rich.console import Console


def records() -> list[Record]:
    """Two tasks, the full cache and one policy at two budgets, four contexts."""
    made = []
    for policy, budget, held in (("full", 1.0, 39), ("hybridkv", 0.25, 11), ("hybridkv", 0.5, 20)):
        for context in range(4):
            right = policy == "full" or context < 2
            common = {
                "policy": policy,
                "budget": budget,
                "sample": f"s{context}",
                "context": f"k{context}",
                "blocks_held": held,
            }
            made.append(record(task="chain", score=float(right), word_hits=[True, right], **common))
            made.append(record(task="count", answer="one", score=1.0, word_hits=[True], **common))
    return made


def summary(made: list[Record]) -> Results:
    return summarise(made, environment(), {"model": "m"}, seed=0)


def test_accuracy_and_memory_are_kept_by_policy_budget_and_task() -> None:
    results = summary(records())
    assert [(c.policy, c.budget, c.n) for c in results.conditions] == [
        ("full", 1.0, 8),
        ("hybridkv", 0.5, 8),
        ("hybridkv", 0.25, 8),
    ]
    full, half, quarter = results.conditions
    assert full.mean.value == 1.0
    assert quarter.mean.value == 0.75
    assert quarter.mean.low < 0.75 < quarter.mean.high
    chain = quarter.tasks["chain"]
    assert (chain.n, chain.accuracy.value, chain.hops) == (4, 0.5, [1.0, 0.5])
    assert quarter.tasks["count"].hops is None
    assert half.memory.held_share == pytest.approx(20 / 38)
    assert quarter.memory.held_bytes == 11_000
    assert quarter.memory.host_bytes == 18_500
    assert Results.model_validate_json(results.model_dump_json()) == results


def test_answers_whose_memory_was_not_seen_are_counted_and_said() -> None:
    made = [record(), record(sample="s1", blocks_held=None, compressed=None)]
    made.append(record(sample="s2", blocks_held=38, compressed=False, host_bytes=None))
    results = summary(made)
    memory = results.conditions[0].memory
    assert (memory.seen, memory.uncompressed) == (2, 1)
    assert memory.held_share == pytest.approx((11 + 38) / 2 / 38)
    said = "\n".join(remarks(results))
    assert "1 of 3 prompts stayed whole" in said
    assert "memory was seen for 2 of 3 answers" in said
    assert not remarks(summary(records()))


def test_a_server_without_counters_has_no_memory() -> None:
    served = record(policy="as served", budget=None, blocks_held=None, block_bytes=None, host_bytes=None)
    condition = summary([served]).conditions[0]
    assert condition.name == "as served"
    assert condition.memory.held_share is None
    assert condition.memory.held_bytes is None


def test_rouge_has_the_bootstraps_interval() -> None:
    made = [
        record(metric="rouge", sample=f"s{n}", context=f"k{n}", score=n / 4, word_hits=[]) for n in range(5)
    ]
    condition = summary(made).conditions[0]
    assert condition.tasks["chain"].accuracy == condition.mean
    assert condition.tasks["chain"].hops is None


def test_an_answer_written_twice_counts_once_and_the_last_one_wins() -> None:
    condition = summary([record(score=0.0), record(sample="s1", score=0.0), record(score=1.0)]).conditions[0]
    assert (condition.n, condition.mean.value) == (2, 0.5)


def test_tables_show_every_condition_and_task() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    results = summary(records())
    for table in (summary_table(results), *task_tables(results)):
        console.print(table)
    text = console.export_text()
    assert "hybridkv" in text
    assert "Tasks at budget 0.25" in text
    assert "Tasks at budget 0.5" in text
    assert "52.6%" in text


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    heads = [heads_example("chain", 0.5), heads_example("chain", 0.25), heads_example("count", 0.5, "quest")]
    plot_all(summary(records()), heads, tmp_path / "plots")
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == [
        "accuracy_by_memory.png",
        "heads_chain.png",
        "hops_chain.png",
        "tasks_at_0.25.png",
        "tasks_at_0.5.png",
    ]


def test_plots_of_a_server_without_counters_and_of_the_full_cache_alone(tmp_path: Path) -> None:
    served = record(policy="as served", budget=None, blocks_held=None, block_bytes=None, host_bytes=None)
    plot_all(summary([served]), [], tmp_path / "served")
    assert {file.name for file in (tmp_path / "served").iterdir()} == {
        "accuracy_by_memory.png",
        "hops_chain.png",
    }
    plot_all(summary([record(policy="full", budget=1.0)]), [], tmp_path / "full")
    assert (tmp_path / "full" / "hops_chain.png").exists()


def test_the_smallest_budget_of_the_method_is_shown() -> None:
    heads = [heads_example("chain", 0.5), heads_example("chain", 0.1), heads_example("chain", 0.05, "quest")]
    assert [(example.task, example.budget) for example in smallest_budgets(heads)] == [("chain", 0.1)]


def test_a_model_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    before = model_digest(str(tmp_path))
    assert model_digest(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert model_digest(str(tmp_path)) != before
    assert model_digest("Qwen/Qwen2.5-VL-7B-Instruct") is None
    (tmp_path / "empty").mkdir()
    for wrong in ("/nowhere", "name", str(tmp_path / "empty"), str(tmp_path / "config.json")):
        with pytest.raises(UsageError, match="--model"):
            model_digest(wrong)
