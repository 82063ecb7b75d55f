"""A progress bar on stderr with rate and remaining time; nothing where stderr is no terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class AnswerBar:
    """One bar over all answers of a run, labelled with what is under way."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bars.add_task("preparing questions", total=None, rate="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def expect(self, answers: int) -> None:
        """How many answers there will be; until then the bar only shows that something goes on."""
        self._bars.update(self._task, total=answers)

    def say(self, what: str) -> None:
        """Changes the label."""
        self._bars.update(self._task, description=what)

    def advance(self) -> None:
        """One more answer."""
        speed = self._bars.tasks[0].speed
        self._bars.update(self._task, advance=1, rate="" if speed is None else f"{speed:.1f}/s")
