"""Counters that engine and worker processes write and the API server shows on its own /metrics.

Scheduler and workers are processes of their own, without an exporter. They write prometheus_client's
multi-process files; the API server merges them with prometheus_client's own collector. Nothing is sent,
nothing waits, and replicas and ranks on one node add up by themselves.
"""

from __future__ import annotations

import functools
import glob
import os
import tempfile
from collections.abc import Mapping
from typing import Literal, NamedTuple

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from hybridkv_vllm.plan import PromptPlan

DIRECTORY_VARIABLE = "HYBRIDKV_METRICS_DIR"
# Set by vLLM when several API servers share one set of files; its registry then reads ours there.
VLLM_DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class Description(NamedTuple):
    """A metric's Prometheus type and help text."""

    kind: Literal["counter", "gauge"]
    help: str


METRICS: Mapping[str, Description] = {
    "hybridkv_requests_compressed": Description(
        "counter", "Prompts compressed; once more where a preempted one starts again."
    ),
    "hybridkv_prompt_tokens": Description("counter", "Tokens of the compressed prompts."),
    "hybridkv_kept_tokens": Description(
        "counter", "Prompt tokens kept per KV head, mean over layers and heads, summed over prompts."
    ),
    "hybridkv_blocks_freed": Description("counter", "Prompt blocks given back to the pool by compression."),
    "hybridkv_blocks_arena": Description("gauge", "Blocks that hold compressed prompts now."),
    "hybridkv_heads": Description("gauge", "KV heads classified so far, over all compressed prompts."),
    "hybridkv_fallbacks": Description("counter", "Requests or heads served without compression, by reason."),
}


def prepare_directory() -> None:
    """Gives this process and its children a directory for the files, and the API server its collector.

    Called by the plugin in every process, first in the API server, whose environment the others inherit.
    """
    if DIRECTORY_VARIABLE not in os.environ:
        os.environ[DIRECTORY_VARIABLE] = _own_directory().name
    _register_collector(os.environ[DIRECTORY_VARIABLE])


@functools.cache
def _own_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hybridkv-metrics-")


@functools.cache
def _register_collector(directory: str) -> None:
    MultiProcessCollector(REGISTRY, path=directory)


def metrics_directory() -> str:
    """Where the files lie: vLLM's own directory where it has one."""
    return os.environ.get(VLLM_DIRECTORY_VARIABLE) or os.environ[DIRECTORY_VARIABLE]


class MetricsWriter:
    """One process's share of the metrics."""

    def __init__(self, directory: str) -> None:
        # The suffix keeps clear of the file of the same process that prometheus_client itself may write.
        suffix = f"{os.getpid()}-hybridkv.db"
        self._files = {
            "counter": MmapedDict(os.path.join(directory, f"counter_{suffix}")),
            "gauge": MmapedDict(os.path.join(directory, f"gauge_livesum_{suffix}")),
        }
        self._values: dict[str, float] = {}
        for name in METRICS:
            if name not in ("hybridkv_heads", "hybridkv_fallbacks"):
                self.add(name, 0.0)

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Adds to a metric (for a gauge too)."""
        self._write(name, labels, amount, accumulate=True)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self._write(name, labels, value, accumulate=False)

    def _write(self, name: str, labels: Mapping[str, str], value: float, *, accumulate: bool) -> None:
        description = METRICS[name]
        sample = f"{name}_total" if description.kind == "counter" else name
        key = mmap_key(name, sample, list(labels), list(labels.values()), description.help)
        if accumulate:
            value += self._values.get(key, 0.0)
        self._values[key] = value
        self._files[description.kind].write_value(key, value, 0.0)


class EngineMetrics:
    """What the scheduler counts."""

    def __init__(self, writer: MetricsWriter) -> None:
        self._writer = writer

    def compressed(self, plan: PromptPlan, blocks_freed: int) -> None:
        """A prompt's compression was processed, and that many blocks went back because of it."""
        self._writer.add("hybridkv_requests_compressed", 1)
        self._writer.add("hybridkv_prompt_tokens", plan.num_tokens)
        self._writer.add("hybridkv_blocks_freed", blocks_freed)

    def set_arena_blocks(self, num_blocks: int) -> None:
        """Blocks that arenas hold now."""
        self._writer.set("hybridkv_blocks_arena", num_blocks)

    def fallback(self, reason: str) -> None:
        """A request is served uncompressed."""
        self._writer.add("hybridkv_fallbacks", 1, reason=reason)


class WorkerMetrics:
    """What a worker counts for its own KV heads."""

    def __init__(self, writer: MetricsWriter, num_ranks: int) -> None:
        self._writer = writer
        self._num_ranks = num_ranks

    def compressed(self, kept_per_head: float, num_static: int, num_dynamic: int) -> None:
        """A prompt was compressed on this rank; the ranks' means add up to the mean over all heads."""
        self._writer.add("hybridkv_kept_tokens", kept_per_head / self._num_ranks)
        self._writer.add("hybridkv_heads", num_static, type="static")
        self._writer.add("hybridkv_heads", num_dynamic, type="dynamic")


@functools.cache
def _writer(pid: int, directory: str) -> MetricsWriter:
    del pid  # Part of the cache key: a forked child must not write its parent's files.
    return MetricsWriter(directory)


def engine_metrics() -> EngineMetrics:
    """The scheduler process's metrics."""
    return EngineMetrics(_writer(os.getpid(), metrics_directory()))


def worker_metrics(num_ranks: int) -> WorkerMetrics:
    """A worker process's metrics; `num_ranks` ranks share the model's KV heads."""
    return WorkerMetrics(_writer(os.getpid(), metrics_directory()), num_ranks)


class Sample(NamedTuple):
    """One value of a metric, summed over the processes of this node."""

    name: str
    labels: Mapping[str, str]
    value: float


def read_samples() -> list[Sample]:
    """Reads what all processes of this server have written so far."""
    files = glob.glob(os.path.join(metrics_directory(), "*-hybridkv.db"))
    return [
        Sample(sample.name, dict(sample.labels), sample.value)
        for metric in MultiProcessCollector.merge(files)
        for sample in metric.samples
    ]
