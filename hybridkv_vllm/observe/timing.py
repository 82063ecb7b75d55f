"""How long a prompt's compression keeps the device busy, found out without ever waiting for the device."""

from __future__ import annotations

import time

import torch


class DeviceTimer:
    """Adds up stretches of work.

    On a GPU a stretch lies between two events in the current stream; elsewhere the host does the work itself
    and its clock tells.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Begins a stretch, or ends the one that has begun."""
        if not self._on_gpu:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def seconds(self) -> float:
        """Sum of the stretches so far, s.

        Raises:
            RuntimeError: the GPU has not come to the last mark yet.
        """
        if self._on_gpu:
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            return sum(start.elapsed_time(end) for start, end in pairs) / 1000
        return sum(end - start for start, end in zip(self._times[::2], self._times[1::2], strict=True))
