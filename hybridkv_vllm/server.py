"""Starts `vllm serve` as a user would and waits until it answers (for the demo, tests and benchmarks)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from hybridkv_vllm.observe.metrics import DIRECTORY_VARIABLE

PLUGINS = "hybridkv,hybridkv_api"
# The first is set here by an engine of this process for its children: a server would count on top of them.
# Who starts a server here asks it without a key.
NOT_INHERITED = (DIRECTORY_VARIABLE, "VLLM_API_KEY")


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        log: what it has printed so far.
    """

    url: str
    log: Path

    def get(self, path: str) -> httpx.Response:
        """GET with an error for any status but 2xx."""
        return httpx.get(self.url + path, timeout=60, trust_env=False).raise_for_status()


class ServerFailed(RuntimeError):
    """The server ended, or did not answer in time; carries the end of its log."""

    def __init__(self, reason: str, log: Path) -> None:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        super().__init__(f"{reason}; {log} ends with:\n{tail}")


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    model: Path | str,
    arguments: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Iterator[Server]:
    """Runs `vllm serve MODEL ARGUMENTS` until the block ends.

    Args:
        log: file for the server's output.
        environment: added to the current one; the HTTP routes are switched on unless it says otherwise.
        timeout: seconds to wait for `/health`.

    Raises:
        ServerFailed: it stopped or did not answer in time.
    """
    port = free_port()
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    command = [
        # Not the script `vllm`, which an installation into a folder of one's own does not have.
        *(sys.executable, "-m", "vllm.entrypoints.cli.main"),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *arguments,
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, "VLLM_PLUGINS": PLUGINS, **(environment or {})},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_healthy(server, process, timeout)
        yield server
    finally:
        _stop(process)


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"the server stopped with exit code {process.returncode}", server.log)
        try:
            # Not by way of a proxy that the environment names.
            health = httpx.get(server.url + "/health", timeout=2, trust_env=False)
            if health.status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise ServerFailed(f"the server did not answer within {timeout:.0f} s", server.log)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the server to end; after a while, or at another Ctrl-C, ends its whole process group."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
