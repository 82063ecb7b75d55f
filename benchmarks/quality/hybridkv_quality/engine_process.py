"""Runs one child process a policy and takes its messages, so that one process writes the run's files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hybridkv_quality.messages import Message
from hybridkv_quality.settings import EngineJob, EvalError
from hybridkv_vllm.observe.metrics import DIRECTORY_VARIABLE

LOG_LINES = 15
STOP_SECONDS = 20


def run_engine(job: EngineJob, log: Path) -> Iterator[Message]:
    """Starts the child for a job and yields what it says, until it has answered everything.

    Args:
        log: file for the child's output, replaced.

    Raises:
        EvalError: the child failed; carries the end of its log. Or that cannot be written.
    """
    try:
        log.touch()
    except OSError as error:
        raise EvalError(f"--out {log.parent} cannot be written: {error}; correct it and go on") from None
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "hybridkv_quality.engine_child", str(writing)]
    # An engine of this process, if any, must not be counted with the child's.
    environment = {name: value for name, value in os.environ.items() if name != DIRECTORY_VARIABLE}
    with log.open("wb") as output, os.fdopen(reading, "rb") as messages:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            env=environment,
            start_new_session=True,
        )
        os.close(writing)
        try:
            assert child.stdin is not None
            # A child that has died already says why in its log.
            with suppress(BrokenPipeError), child.stdin as job_input:
                job_input.write(job.model_dump_json().encode())
            for line in messages:
                yield Message.model_validate_json(line)
            code = child.wait()
        finally:
            _stop(child)
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise EvalError(
            f"the engine of policy {job.policy} stopped with exit code {code}; answers so far are kept, the "
            f"same command goes on. {log} ends with:\n{tail}"
        )


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
    # Its own helpers too, where it could not stop them.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
