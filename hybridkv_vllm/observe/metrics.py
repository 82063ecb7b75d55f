"""Counters that engine and worker processes write and the API server shows on its own /metrics.

Scheduler and workers are processes of their own, without an exporter. They write prometheus_client's
multi-process files; the API server merges them as prometheus_client's own collector does. Nothing is sent,
nothing waits, and replicas and ranks on one node add up by themselves.
"""

from __future__ import annotations

import functools
import glob
import math
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

from prometheus_client import REGISTRY, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.plan import PromptPlan

DIRECTORY_VARIABLE = "HYBRIDKV_METRICS_DIR"
# Set by vLLM when several API servers share one set of files; its registry then reads ours there.
VLLM_DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

FallbackReason = Literal[
    "bad_request_options", "streaming_input", "pool_too_small", "landmarks_do_not_fit", "host_pool_full"
]


class Description(NamedTuple):
    """A metric's type and help text.

    Attributes:
        kind: how the first part of prometheus_client's file names says it. Of a `gauge_livesum` only what
            living processes say counts; of the others also what dead ones have left.
        help: Prometheus help text.
    """

    kind: Literal["counter", "gauge_sum", "gauge_livesum", "histogram"]
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
    "hybridkv_blocks_arena": Description("gauge_livesum", "Blocks that hold compressed prompts now."),
    "hybridkv_blocks_replaced": Description(
        "gauge_livesum",
        "Prompt blocks that running requests have given back and would hold now without compression.",
    ),
    "hybridkv_heads": Description("gauge_sum", "KV heads classified so far, over all compressed prompts."),
    "hybridkv_chunks_recalled": Description(
        "counter", "Chunks copied from their tier into a hot slot while decoding."
    ),
    "hybridkv_chunks_hit": Description("counter", "Chosen chunks that were in a hot slot already."),
    "hybridkv_host_bytes": Description(
        "gauge_livesum", "Bytes of host memory that hold chunks of dynamic heads."
    ),
    "hybridkv_compress_seconds": Description(
        "histogram",
        "Time that the device spends on compressing a prompt; one observation for each prompt and pipeline "
        "rank, of that rank's layers.",
    ),
    "hybridkv_fallbacks": Description(
        "counter",
        "Requests served uncompressed, or KV heads pruned although they were found dynamic, by reason.",
    ),
}
# All samples show 0 from the start: what Prometheus first sees above 0 has not increased, to its mind.
LABELS: Mapping[str, tuple[dict[str, str], ...]] = {
    "hybridkv_heads": tuple({"type": kind} for kind in ("static", "dynamic")),
    "hybridkv_fallbacks": tuple({"reason": reason} for reason in get_args(FallbackReason)),
}
# Upper limits of the histogram's buckets, s.
COMPRESS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, math.inf)


def prepare_directory() -> None:
    """Gives this process and its children a directory for the files, and the API server its collector.

    Called by the plugin in every process, first in the API server, whose environment the others inherit.

    Raises:
        HybridKVConfigError: the directory that was named cannot be made or written to.
    """
    if DIRECTORY_VARIABLE not in os.environ:
        os.environ[DIRECTORY_VARIABLE] = _own_directory().name
    directory = os.environ[DIRECTORY_VARIABLE]
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise HybridKVConfigError(
            f"{DIRECTORY_VARIABLE}={directory} cannot be written to ({error.strerror}); "
            "name another folder, or unset it"
        ) from None
    _register_collector(directory)


@functools.cache
def _own_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hybridkv-metrics-")


@functools.cache
def _register_collector(directory: str) -> None:
    REGISTRY.register(LiveCollector(directory))


class LiveCollector(Collector):
    """Shows what all processes have written, less what dead ones left in gauges of living ones.

    prometheus_client's own expects a parent to delete the files of its dead children; nobody does here.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        """The metrics, each summed over the processes of this node."""
        files = glob.glob(os.path.join(glob.escape(self._directory), "*-hybridkv.db"))
        return MultiProcessCollector.merge([path for path in files if _counts(path)])


def _counts(path: str) -> bool:
    """Whether a file is to be counted, by its name `KIND_PID-hybridkv.db`."""
    kind, _, rest = os.path.basename(path).rpartition("_")
    return kind != "gauge_livesum" or is_alive(int(rest.split("-")[0]))


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def metrics_directory() -> str:
    """Where the files lie: vLLM's own directory where it has one."""
    return os.environ.get(VLLM_DIRECTORY_VARIABLE) or os.environ[DIRECTORY_VARIABLE]


class MetricsWriter:
    """One process's share of the metrics."""

    def __init__(self, directory: str) -> None:
        # The suffix keeps clear of the file of the same process that prometheus_client itself may write.
        suffix = f"{os.getpid()}-hybridkv.db"
        self._files = {
            kind: MmapedDict(os.path.join(directory, f"{kind}_{suffix}"))
            for kind in sorted({description.kind for description in METRICS.values()})
        }
        self._values: dict[str, float] = {}
        for name, description in METRICS.items():
            if description.kind == "histogram":
                for limit in COMPRESS_BUCKETS:
                    self._observe(name, limit, 0.0, times=0)
            else:
                for labels in LABELS.get(name, ({},)):
                    self.add(name, 0.0, **labels)

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Adds to a counter or a gauge."""
        sample = f"{name}_total" if METRICS[name].kind == "counter" else name
        self._write(name, sample, labels, amount, accumulate=True)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self._write(name, name, labels, value, accumulate=False)

    def observe(self, name: str, value: float) -> None:
        """Adds a value to a histogram."""
        self._observe(name, COMPRESS_BUCKETS[bisect_left(COMPRESS_BUCKETS, value)], value, times=1)

    def _observe(self, name: str, limit: float, value: float, *, times: int) -> None:
        # Buckets are written apart; the collector adds up those below, and counts.
        self._write(name, f"{name}_bucket", {"le": floatToGoString(limit)}, times, accumulate=True)
        self._write(name, f"{name}_sum", {}, value, accumulate=True)

    def _write(
        self, name: str, sample: str, labels: Mapping[str, str], value: float, *, accumulate: bool
    ) -> None:
        key = _key(name, sample, tuple(labels.items()))
        before = self._values.get(key)
        if accumulate:
            value += before or 0.0
        # Gauges are set at every step.
        if value != before:
            self._values[key] = value
            self._files[METRICS[name].kind].write_value(key, value, 0.0)


@functools.cache
def _key(name: str, sample: str, labels: tuple[tuple[str, str], ...]) -> str:
    """What the files call a value."""
    return str(mmap_key(name, sample, [n for n, _ in labels], [v for _, v in labels], METRICS[name].help))


class EngineMetrics:
    """What the scheduler counts."""

    def __init__(self, writer: MetricsWriter) -> None:
        self._writer = writer

    def compressed(self, plan: PromptPlan, blocks_freed: int) -> None:
        """A prompt's compression was processed, and that many blocks went back because of it."""
        self._writer.add("hybridkv_requests_compressed", 1)
        self._writer.add("hybridkv_prompt_tokens", plan.num_tokens)
        self._writer.add("hybridkv_blocks_freed", blocks_freed)

    def set_blocks(self, *, arena: int, replaced: int) -> None:
        """Blocks that arenas hold now, and prompt blocks that these requests have given back for them."""
        self._writer.set("hybridkv_blocks_arena", arena)
        self._writer.set("hybridkv_blocks_replaced", replaced)

    def fallback(self, reason: FallbackReason) -> None:
        """A request is served uncompressed."""
        self._writer.add("hybridkv_fallbacks", 1, reason=reason)


class WorkerMetrics:
    """What a worker counts for its own KV heads."""

    def __init__(self, writer: MetricsWriter, num_ranks: int, tp_rank: int) -> None:
        self._writer = writer
        self._num_ranks = num_ranks
        self._tp_rank = tp_rank

    def compressed(self, kept_per_head: float, num_static: int, num_dynamic: int, seconds: float) -> None:
        """A prompt was compressed on this rank; the ranks' means add up to the mean over all heads.

        Tensor ranks work in step: the first one's time stands for all.
        """
        if self._tp_rank == 0:
            self._writer.observe("hybridkv_compress_seconds", seconds)
        self._writer.add("hybridkv_kept_tokens", kept_per_head / self._num_ranks)
        self._writer.add("hybridkv_heads", num_static, type="static")
        self._writer.add("hybridkv_heads", num_dynamic, type="dynamic")

    def chunks(self, hit: int, recalled: int) -> None:
        """Chunks were chosen: so many were in a hot slot already, so many had to be copied into one."""
        self._writer.add("hybridkv_chunks_hit", hit)
        self._writer.add("hybridkv_chunks_recalled", recalled)

    def set_host_bytes(self, num_bytes: int) -> None:
        """Bytes of this rank's host tier that requests hold now."""
        self._writer.set("hybridkv_host_bytes", num_bytes)

    def heads_pruned(self, reason: FallbackReason, num_heads: int) -> None:
        """So many KV heads of this rank (not requests) were found dynamic and yet pruned."""
        self._writer.add("hybridkv_fallbacks", num_heads, reason=reason)


@functools.cache
def _writer(pid: int, directory: str) -> MetricsWriter:
    del pid  # Part of the cache key: a forked child must not write its parent's files.
    return MetricsWriter(directory)


def engine_metrics() -> EngineMetrics:
    """The scheduler process's metrics."""
    return EngineMetrics(_writer(os.getpid(), metrics_directory()))


def worker_metrics(num_ranks: int, tp_rank: int) -> WorkerMetrics:
    """A worker process's metrics; `num_ranks` ranks share the model's KV heads."""
    return WorkerMetrics(_writer(os.getpid(), metrics_directory()), num_ranks, tp_rank)


class Sample(NamedTuple):
    """One value of a metric, summed over the processes of this node."""

    name: str
    labels: Mapping[str, str]
    value: float


def read_samples() -> list[Sample]:
    """Reads what all processes of this server have written so far."""
    return [
        Sample(sample.name, dict(sample.labels), sample.value)
        for metric in LiveCollector(metrics_directory()).collect()
        for sample in metric.samples
    ]
