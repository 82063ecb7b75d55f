"""Signals that end a command from outside end it as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Besides Ctrl-C: `timeout`, systemd, a CI job, a terminal that closes.
STOPS = (signal.SIGTERM, signal.SIGHUP)


def _stop(number: int, frame: FrameType | None) -> None:
    """Stops as Ctrl-C does; once, because `timeout` says it twice, and the first must end the servers."""
    del number, frame
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def orderly_stops() -> Iterator[None]:
    """Within the block `STOPS` do as Ctrl-C does, so that servers are not left behind with their GPU.

    Only the main thread may set handlers; what is ignored, as by `nohup`, stays so.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {stop: signal.getsignal(stop) for stop in STOPS if in_main}
    before = {stop: handler for stop, handler in handlers.items() if handler != signal.SIG_IGN}
    for stop in before:
        signal.signal(stop, _stop)
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
