"""Times device work by replaying it as a CUDA graph, over more data than the cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

# Even: calls may take turns between two states.
WARMUP, REPEATS = 4, 30
# Sets of data that are taken in turn hold this many times the cache together.
CACHE_FACTOR, MOST_SETS = 3, 16
# With fewer times the cache than this, some data may still be there when its turn comes again.
LEAST_FACTOR = 2
# Calls of a graph, at least: launching it takes microseconds that are not the calls'.
GRAPH_CALLS = 16
COPY_BYTES = 8 * 2**30


def sets_needed(num_bytes: int, device: torch.device) -> int:
    """How many sets of data of `num_bytes` must take turns so that none is found in the cache."""
    if device.type != "cuda":
        return 1
    return max(1, min(MOST_SETS, -(-CACHE_FACTOR * _cache_bytes(device) // max(num_bytes, 1))))


def stays_cached(num_bytes: int, device: torch.device) -> bool:
    """Whether `sets_needed` sets are too few for the cache, so that it answers in place of memory."""
    if device.type != "cuda":
        return False
    return sets_needed(num_bytes, device) * num_bytes < LEAST_FACTOR * _cache_bytes(device)


def _cache_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def is_lost(device: torch.device) -> bool:
    """Whether nothing can be run on the device any more: one kernel's fault ends the process's context."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def milliseconds(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    eager: bool = False,
    spoil: Callable[[], object] = lambda: None,
    restore: Callable[[], object] | None = None,
) -> float | None:
    """Median time of one of `calls`, which are captured together and replayed; None on a CPU.

    On a CPU each runs twice: the interpreter's time says nothing.

    Args:
        eager: launch them from Python each time instead, which counts the launches too.
        spoil: called once before the runs that count, so that what is found afterwards was written by them.
        restore: brings back the state that each call starts from; called before all of them, not timed.
    """
    begin = restore or (lambda: None)

    def once() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        spoil()
        for _ in range(2):
            begin()
            once()
        return None
    if eager:
        spoil()
        return _median(once, begin) / len(calls)
    # What prepares the calls may still be under way on another stream.
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            begin()
            once()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # An even number of times each, as above, unless they start from a state that one call ends.
    rounds = 1 if restore is not None else 2 * -(-GRAPH_CALLS // (2 * len(calls)))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            once()
    spoil()
    return _median(graph.replay, begin) / (rounds * len(calls))


def _median(run: Callable[[], object], prepare: Callable[[], object]) -> float:
    """Median milliseconds of a run, from an idle device to the last of its work, each time prepared."""
    for _ in range(WARMUP):
        prepare()
        run()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepare()
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


def pinned_bandwidth(num_bytes: int, device: torch.device, *, to_host: bool = False) -> float | None:
    """Bytes a second of one contiguous copy of `num_bytes` from or to pinned host memory; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if to_host:
        source, target = target, source
    time = milliseconds([lambda: target.copy_(source, non_blocking=True)], device)
    return None if time is None else num_bytes / time * 1e3
