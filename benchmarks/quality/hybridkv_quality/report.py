"""From records to results: accuracy with intervals, and the memory that it took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from pydantic import BaseModel, Field
from rich.table import Table
from rich.text import Text

from hybridkv_quality.environment import Environment
from hybridkv_quality.intervals import Estimate, Scored, suite_mean, wilson
from hybridkv_quality.records import Record
from hybridkv_quality.settings import FULL

MIB = 2**20


class Memory(BaseModel):
    """What prompts held while their answers were decoded; means over the answers where it was seen."""

    seen: int = Field(description="Answers where it was seen.")
    held_share: float | None = Field(description="Blocks held / blocks that the prompt takes uncompressed.")
    held_bytes: float | None = Field(description="Bytes of the blocks held.")
    host_bytes: float | None = Field(description="Bytes of the prompts' chunks in host memory.")
    uncompressed: int = Field(description="Answers whose prompt was seen to stay uncompressed.")


class TaskResult(BaseModel):
    """One task under one policy and budget."""

    n: int
    accuracy: Estimate
    hops: list[float] | None = Field(
        description="Share of answers right at each word, where answers have several words."
    )
    memory: Memory


class ConditionResult(BaseModel):
    """All tasks under one policy and budget."""

    policy: str
    budget: float | None
    n: int
    mean: Estimate = Field(description="Mean of the tasks' accuracies; bootstrap over contexts.")
    memory: Memory
    tasks: dict[str, TaskResult]

    @property
    def name(self) -> str:
        """As tables and plots call it."""
        return self.policy if self.budget is None else f"{self.policy} {self.budget:g}"


class Results(BaseModel):
    """Everything that a folder's records say."""

    created_at: datetime
    environment: Environment
    configuration: dict[str, Any]
    seed: int
    conditions: list[ConditionResult]

    def tasks(self) -> list[str]:
        """All tasks, in the order of their first appearance."""
        return list(dict.fromkeys(task for condition in self.conditions for task in condition.tasks))


def summarise(
    records: Iterable[Record], environment: Environment, configuration: Mapping[str, Any], seed: int
) -> Results:
    """Results of all records; the full cache first, then policies by name and budgets downwards."""
    groups: dict[tuple[str, float | None], list[Record]] = defaultdict(list)
    # One answer each, the last: a folder that two runs wrote at once has some twice.
    for record in {record.key: record for record in records}.values():
        groups[record.policy, record.budget].append(record)
    order = sorted(groups, key=lambda key: (key[0] != FULL, key[0], -(key[1] or 0)))
    return Results(
        created_at=datetime.now(UTC),
        environment=environment,
        configuration=dict(configuration),
        seed=seed,
        conditions=[_condition(*key, groups[key], seed) for key in order],
    )


def _condition(policy: str, budget: float | None, records: Sequence[Record], seed: int) -> ConditionResult:
    tasks: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        tasks[record.task].append(record)
    return ConditionResult(
        policy=policy,
        budget=budget,
        n=len(records),
        mean=suite_mean([_scored(record) for record in records], seed=seed),
        memory=_memory(records),
        tasks={task: _task(tasks[task], seed) for task in sorted(tasks)},
    )


def _scored(record: Record) -> Scored:
    return Scored(record.task, record.context, record.score)


def _task(records: Sequence[Record], seed: int) -> TaskResult:
    if records[0].metric == "rouge":
        # No count of successes: the same bootstrap as for the mean.
        accuracy = suite_mean([_scored(record) for record in records], seed=seed)
    else:
        accuracy = wilson(sum(record.score for record in records), len(records))
    return TaskResult(n=len(records), accuracy=accuracy, hops=_hops(records), memory=_memory(records))


def _hops(records: Sequence[Record]) -> list[float] | None:
    longest = max(len(record.word_hits) for record in records)
    if longest < 2:
        return None
    # At a word that only some answers have, those count.
    at = [
        [record.word_hits[hop] for record in records if hop < len(record.word_hits)] for hop in range(longest)
    ]
    return [float(np.mean(hits)) for hits in at]


def _memory(records: Sequence[Record]) -> Memory:
    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return Memory(
        seen=sum(record.blocks_held is not None for record in records),
        held_share=mean(record.held_share for record in records),
        held_bytes=mean(record.held_bytes for record in records),
        host_bytes=mean(record.host_bytes for record in records),
        uncompressed=sum(record.compressed is False for record in records),
    )


def summary_table(results: Results) -> Table:
    """A row for each policy and budget: mean accuracy and the memory held."""
    table = Table(title="Accuracy in %, mean over tasks; memory while decoding, mean a prompt")
    table.add_column("policy")
    for heading in ("budget", "answers", "accuracy (95%)", "KV held", "GPU MiB", "host MiB"):
        table.add_column(heading, justify="right")
    for condition in results.conditions:
        memory = condition.memory
        table.add_row(
            Text(condition.policy),
            "" if condition.budget is None else f"{condition.budget:g}",
            str(condition.n),
            _percent(condition.mean),
            "?" if memory.held_share is None else f"{memory.held_share:.1%}",
            _mib(memory.held_bytes),
            _mib(memory.host_bytes),
        )
    return table


def task_tables(results: Results) -> Iterator[Table]:
    """A table for each budget: a row for each task, a column for each policy, the full cache beside them."""
    budgets = dict.fromkeys(c.budget for c in results.conditions if c.policy != FULL)
    for budget in budgets or {1.0: None}:
        conditions = [c for c in results.conditions if c.policy == FULL or c.budget == budget]
        title = "Tasks" if budget is None else f"Tasks at budget {budget:g}"
        table = Table(title=f"{title}: accuracy in % (95%)")
        table.add_column("task")
        table.add_column("n", justify="right")
        for condition in conditions:
            table.add_column(Text(condition.policy), justify="right")
        for task in results.tasks():
            shown = [c.tasks.get(task) for c in conditions]
            counts = sorted({result.n for result in shown if result is not None})
            cells = ("-" if result is None else _percent(result.accuracy) for result in shown)
            table.add_row(Text(task), "-".join(map(str, dict.fromkeys(counts[:1] + counts[-1:]))), *cells)
        yield table


def remarks(results: Results) -> list[str]:
    """What a reader of the table must know besides."""
    found = []
    for condition in results.conditions:
        if condition.policy != FULL and condition.memory.uncompressed:
            found.append(
                f"{condition.name}: {condition.memory.uncompressed} of {condition.n} prompts stayed whole "
                "(shorter than min_prompt_tokens, or the cache is too small for prompt and arena)"
            )
        if condition.memory.seen < condition.n:
            found.append(
                f"{condition.name}: memory was seen for {condition.memory.seen} of {condition.n} answers; "
                "the others ended with their first token, or could not be told from the server's counters"
            )
    return found


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"


def _mib(num_bytes: float | None) -> str:
    return "?" if num_bytes is None else f"{num_bytes / MIB:.2f}"
