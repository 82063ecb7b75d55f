"""A run's folder: answers as they come, and what is made of them in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from hybridkv_quality.environment import Environment
from hybridkv_quality.messages import Message
from hybridkv_quality.plots import plot_all
from hybridkv_quality.records import HeadsExample, JsonLines, Record
from hybridkv_quality.report import Results, summarise
from hybridkv_quality.settings import claim_folder


class RunFolder:
    """A run's files: records and heads, appended as they come, and what is made of them."""

    def __init__(self, out: Path, configuration: dict[str, Any]) -> None:
        """Claims the folder for the configuration and reads which answers it has.

        Raises:
            UsageError: it is another configuration's.
            LinesDamaged: a line of records that no run has written.
        """
        self.out = out
        self.configuration = configuration
        self.digest = claim_folder(out, configuration)
        self._records = JsonLines(out / "records.jsonl", Record)
        self._heads = JsonLines(out / "heads.jsonl", HeadsExample)
        self.done = {record.key for record in self._records.read()}

    def __enter__(self) -> Self:
        self._records.__enter__()
        self._heads.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._records.__exit__(*details)
        self._heads.__exit__(*details)

    def take(self, message: Message) -> None:
        """Writes down an answer, or a prompt's heads."""
        if message.record is not None:
            self._records.append(message.record)
            self.done.add(message.record.key)
        if message.heads is not None:
            self._heads.append(message.heads)

    def finish(self, where: Environment, seed: int) -> Results:
        """Makes results and plots of everything that the folder holds.

        Raises:
            LinesDamaged: see `JsonLines.read`.
        """
        results = summarise(self._records.read(), where, self.configuration, seed)
        (self.out / "results.json").write_text(results.model_dump_json(indent=2) + "\n")
        plot_all(results, list(self._heads.read()), self.out / "plots")
        return results
