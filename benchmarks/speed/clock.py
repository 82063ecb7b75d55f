"""Times device work by replaying it as a CUDA graph, over more data than the cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

WARMUP, REPEATS = 3, 30
# Sets of data that are taken in turn hold this many times the cache together.
CACHE_FACTOR, MOST_SETS = 3, 16
# Calls of a graph, at least: launching it takes microseconds that are not the calls'.
GRAPH_CALLS = 16
COPY_BYTES = 8 * 2**30


def sets_needed(num_bytes: int, device: torch.device) -> int:
    """How many sets of data of `num_bytes` must take turns so that none is found in the cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, -(-CACHE_FACTOR * cache // max(num_bytes, 1))))


def milliseconds(
    calls: Sequence[Callable[[], object]], device: torch.device, *, eager: bool = False
) -> float | None:
    """Median time of one of `calls`, which are captured together and replayed; None on a CPU.

    On a CPU each runs once: the interpreter's time says nothing.

    Args:
        eager: launch them from Python each time instead, which counts the launches too.
    """
    if device.type != "cuda":
        for call in calls:
            call()
        return None
    if eager:
        return _median(lambda: [call() for call in calls]) / len(calls)
    # What prepares the calls may still be under way on another stream.
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for call in calls:
            for _ in range(WARMUP):
                call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # An even number of times each: calls may take turns between two states.
    rounds = 2 * -(-GRAPH_CALLS // (2 * len(calls)))
    with torch.cuda.graph(graph, stream=stream):
        for call in [*calls] * rounds:
            call()
    return _median(graph.replay) / (rounds * len(calls))


def _median(run: Callable[[], object]) -> float:
    """Median milliseconds of a run, from an idle device to the last of its work."""
    for _ in range(WARMUP):
        run()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes a second of a large copy on the device, read and written; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.randn(COPY_BYTES // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # Launched, not replayed: in a graph the copy engine does it, which is slower than the multiprocessors.
    time = milliseconds([lambda: target.copy_(source)], device, eager=True)
    return None if time is None else COPY_BYTES / time * 1e3


def pinned_bandwidth(num_bytes: int, device: torch.device) -> float | None:
    """Bytes a second of one contiguous copy of `num_bytes` from pinned host memory; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    time = milliseconds([lambda: target.copy_(source, non_blocking=True)], device)
    return None if time is None else num_bytes / time * 1e3
