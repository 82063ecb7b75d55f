"""A run's folder: answers as they come, and what is made of them in the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hybridkv_quality.environment import Environment
from hybridkv_quality.messages import Message
from hybridkv_quality.plots import plot_all
from hybridkv_quality.records import HeadsExample, JsonLines, Record
from hybridkv_quality.report import Results, summarise
from hybridkv_quality.settings import EvalError, UsageError, claim_folder, locked, make_folder, writing

GO_ON = "answers so far are kept; make room or correct it, and run the same command to go on"


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
        self.records = JsonLines(out / "records.jsonl", Record)
        self.heads = JsonLines(out / "heads.jsonl", HeadsExample)
        self.done = {record.key for record in self.records.read()}

    def take(self, message: Message) -> None:
        """Writes down an answer, or a prompt's heads.

        Raises:
            EvalError: the disk is full, or the like.
        """
        with writing(self.out, EvalError, GO_ON):
            if message.record is not None:
                self.records.append(message.record)
                self.done.add(message.record.key)
            if message.heads is not None:
                self.heads.append(message.heads)

    def finish(self, where: Environment, seed: int) -> Results:
        """Makes results and plots of everything that the folder holds.

        Raises:
            EvalError: the disk is full, or the like.
            LinesDamaged: see `JsonLines.read`.
        """
        with writing(self.out, EvalError, GO_ON):
            results = summarise(self.records.read(), where, self.configuration, seed)
            (self.out / "results.json").write_text(results.model_dump_json(indent=2) + "\n")
            plot_all(results, list(self.heads.read()), self.out / "plots")
        return results


@contextmanager
def run_folder(out: Path, configuration: dict[str, Any]) -> Iterator[RunFolder]:
    """The folder, made if missing, and this run's alone until the end.

    Raises:
        UsageError: it is another configuration's or run's, or cannot be written.
        LinesDamaged: a line of records that no run has written.
    """
    make_folder(out)
    with ExitStack() as held:
        with writing(out, UsageError, "correct it, or name another folder"):
            held.enter_context(locked(out))
            folder = RunFolder(out, configuration)
            held.enter_context(folder.records)
            held.enter_context(folder.heads)
        yield folder
