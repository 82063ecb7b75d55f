"""A metrics directory for each test, and worker processes that write into it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridkv_vllm.observe.metrics import DIRECTORY_VARIABLE, VLLM_DIRECTORY_VARIABLE

SPAWN = multiprocessing.get_context("spawn")
SECONDS = 60


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty directory that this process and its children use; its name is no pattern."""
    folder = tmp_path / "metrics [1]"
    folder.mkdir()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(folder))
    monkeypatch.delenv(VLLM_DIRECTORY_VARIABLE, raising=False)
    return folder


class Worker:
    """A process of its own that runs `body(connection, *arguments)`."""

    def __init__(self, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=body, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, message: object) -> None:
        """Sends a message."""
        self._connection.send(message)

    def hear(self) -> object:
        """Waits for a message."""
        assert self._connection.poll(SECONDS), "the worker said nothing"
        return self._connection.recv()

    def kill(self) -> None:
        """Ends the process at once, as a crash would."""
        self.process.kill()
        self.process.join(SECONDS)
        assert self.process.exitcode is not None


@pytest.fixture
def start_worker(directory: Path) -> Iterator[Callable[..., Worker]]:
    """Starts workers; those still there at the test's end are killed."""
    workers: list[Worker] = []

    def start(body: Callable[..., None], *arguments: Any) -> Worker:
        workers.append(Worker(body, arguments))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()
