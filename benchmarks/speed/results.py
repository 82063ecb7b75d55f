"""What a run of `benchmarks/kernels.py` says: its records, ratios within the run, files and plot."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hybridkv_quality.environment import Environment
from pydantic import BaseModel, Field

from speed.prefill import LAYERS

# The rivals' attention over everything is the same work as ours; other operations have no rival.
DENSE = "dense"
GATHER, OFFLOAD, PREFILL, PREFILL_END = "gather", "offload", "prefill", "prefill_end"
STEP, STEP_IN_PLACE, STEP_BETWEEN = "step", "step_in_place", "step_between"
SHIPS = "triton"
MOST_CHARACTERS = 800
COLUMNS = ("operation", "by", "size", "MiB read", "ms", "GB/s", "relative error")


class Record(BaseModel):
    """One operation of one backend at one size."""

    op: str
    backend: str
    case: dict[str, Any]
    num_bytes: int = Field(description="Least bytes that the operation has to read.")
    ms: float | None = Field(default=None, description="Median of a launch; null on a CPU.")
    link_ms: float | None = Field(
        default=None,
        description="Of a pinned copy of as many bytes the same way, where they cross the link to the host.",
    )
    cached: bool = Field(
        default=False,
        description="Whether the data of all sets may stay in the device's cache: the time is not of memory.",
    )
    error: float | None = Field(
        default=None, description="Relative to the torch reference; null if unchecked."
    )
    right: bool | None = Field(
        default=None,
        description="Whether the error is small; null if unchecked. False too where `missing` is a fault.",
    )
    missing: str | None = Field(default=None, description="Why there are no figures.")

    @property
    def gb_per_s(self) -> float | None:
        """Bytes over time."""
        return None if self.ms is None else self.num_bytes / self.ms / 1e6

    def cells(self) -> list[str]:
        """A row of a table under `COLUMNS`."""
        checked = "unchecked" if self.error is None else f"{self.error:.0e}"
        return [
            self.op,
            self.backend,
            size(self.case),
            f"{self.num_bytes / 2**20:.2f}",
            "-" if self.ms is None else f"{self.ms:.3f}",
            "-" if self.gb_per_s is None else f"{self.gb_per_s:.0f}{' cached' if self.cached else ''}",
            f"{checked} WRONG" if self.right is False else checked,
        ]


class Ratio(BaseModel):
    """A quotient of two figures of the same run."""

    what: str
    case: dict[str, Any]
    value: float


class Results(BaseModel):
    """A whole run."""

    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    environment: Environment
    copy_bandwidth: float | None = Field(
        description="Bytes a second of a copy on the device, read and write."
    )
    pinned_bandwidth: float | None = Field(description="Bytes a second of a copy from pinned host memory.")
    records: list[Record] = []
    ratios: list[Ratio] = []


def find_ratios(results: Results) -> Iterator[Ratio]:
    """Bytes saved, and where there are times, shares of the card's limits and speed-ups.

    Times count only where the operation was checked and right, and its data came from memory.
    """
    for record in results.records:
        if record.backend != SHIPS or record.missing:
            continue
        whole = _best(results, DENSE, record.case, _ships)
        if record.op == "decode" and whole is not None:
            yield _ratio("bytes of the full cache / of decode", record, whole.num_bytes / record.num_bytes)
        if record.ms is None or not record.right or record.cached:
            continue
        limit = results.copy_bandwidth
        if record.link_ms is not None:
            limit = record.num_bytes / (record.link_ms * 1e-3)
        if limit is not None and record.op != PREFILL_END:
            of_limit = record.num_bytes / (record.ms * 1e-3) / limit
            yield _ratio(f"{record.op}: bytes over time / bandwidth of a copy", record, of_limit)
        if record.op in (DENSE, "decode", STEP):
            for rival in _like(results, DENSE, record.case, _is_rival):
                if rival.ms is not None:
                    what = f"{record.op}: speed against {rival.backend} on all"
                    yield _ratio(what, record, rival.ms / record.ms)
        forward = _best(results, PREFILL, record.case, _is_right)
        if record.op == PREFILL_END and forward is not None and forward.ms is not None:
            yield _ratio("prefill_end: share of that prefill", record, record.ms / (LAYERS * forward.ms))
        if record.op == STEP:
            yield from _shares_of_recall(results, record, record.ms)


def _shares_of_recall(results: Results, step: Record, step_ms: float) -> Iterator[Ratio]:
    """What scoring and choosing add to attention, of a step's time; of several where each few choose once."""
    parts = [_find(results, op, step) for op in ("decode", STEP_IN_PLACE, STEP_BETWEEN)]
    counts = [part for part in parts if part is not None and part.right and not part.cached]
    times = [part.ms for part in counts if part.ms is not None]
    if len(times) < len(parts):
        return
    attention, in_place, between = times
    for interval in (1, 4):
        others = interval - 1
        own = (in_place - attention) + others * (between - attention)
        value = own / (step_ms + others * between)
        yield _ratio(f"step: share of recall, interval {interval}", step, value)


def crosses_link(record: Record) -> bool:
    """Whether its bytes come from or go to the host."""
    return record.op == OFFLOAD or (record.op == GATHER and bool(record.case["tier"] == "host"))


def explained(error: Exception) -> str:
    """An error in one line; what a library refuses comes at the end of a long list of its own."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:MOST_CHARACTERS]


def _ratio(what: str, record: Record, value: float) -> Ratio:
    return Ratio(what=what, case=record.case, value=value)


def _find(results: Results, op: str, like: Record) -> Record | None:
    return next(
        (r for r in results.records if (r.op, r.backend, r.case) == (op, like.backend, like.case)), None
    )


def _ships(record: Record) -> bool:
    return record.backend == SHIPS


def _is_rival(record: Record) -> bool:
    return record.backend not in (SHIPS, "torch") and _is_right(record)


def _is_right(record: Record) -> bool:
    return record.right is True


def _like(results: Results, op: str, case: dict[str, Any], counts: Callable[[Record], bool]) -> list[Record]:
    """Records that count, of a case's batch and prompt."""
    return [
        record
        for record in results.records
        if record.op == op
        and record.missing is None
        and all(record.case[name] == case[name] for name in ("batch", "prompt"))
        and counts(record)
    ]


def _best(results: Results, op: str, case: dict[str, Any], counts: Callable[[Record], bool]) -> Record | None:
    """The fastest of them."""
    return min(_like(results, op, case, counts), key=lambda record: record.ms or 0.0, default=None)


def size(case: dict[str, Any]) -> str:
    """A case in words."""
    recalling = f", {case['dynamic']:.0%} recall from {case['tier']}" if case["dynamic"] else ""
    return f"{case['batch']} x {case['prompt']}, {case['budget']:.0%}, skew {case['skew']:g}{recalling}"


def write(results: Results, out: Path) -> None:
    """`kernels.json` and `kernels.csv`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(results.model_dump_json(indent=1) + "\n")
    with (out / "kernels.csv").open("w", newline="") as file:
        cases = list(results.records[0].case) if results.records else []
        writer = csv.writer(file)
        figures = ("num_bytes", "ms", "gb_per_s", "cached", "error", "right", "missing")
        writer.writerow(["op", "backend", *cases, *figures])
        for r in results.records:
            sizes = [r.case[name] for name in cases]
            writer.writerow([r.op, r.backend, *sizes, *(getattr(r, figure) for figure in figures)])


def plot(results: Results, out: Path) -> None:
    """`kernels.png`, where there are times: each operation's bandwidth, against that of a copy."""
    timed = [r for r in results.records if r.gb_per_s is not None and r.right and not r.cached]
    if not timed:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    series = sorted({(record.op, record.backend) for record in timed})
    for op, backend in series:
        of_series = [r for r in timed if (r.op, r.backend) == (op, backend)]
        axes.plot(
            [r.num_bytes / 2**20 for r in of_series],
            [r.gb_per_s for r in of_series],
            "o",
            label=f"{op}, {backend}",
        )
    if results.copy_bandwidth is not None:
        axes.axhline(results.copy_bandwidth / 1e9, color="grey", label="copy on the device")
    axes.set(
        xscale="log", yscale="log", xlabel="MiB read, least", ylabel="GB/s", title=results.environment.device
    )
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(out / "kernels.png", dpi=150)
    pyplot.close(figure)


def not_measured(results: Results) -> list[str]:
    """A line for each backend that is not there and for each case that failed."""
    missing = [record for record in results.records if record.missing is not None]
    told = [f"left out: {r.op} by {r.backend}: {r.missing}" for r in missing if r.right is None]
    told += [
        f"failed: {r.op} by {r.backend}, {size(r.case)}: {r.missing}" for r in missing if r.right is False
    ]
    return list(dict.fromkeys(told))
