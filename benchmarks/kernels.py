"""Times the kernels at the sizes of a grid, against the card's limits and other libraries.

Results that are wrong get no speed-up, and what fails keeps nothing else from its turn. On a CPU everything
runs small, under Triton's interpreter, to check the harness: no times then, only bytes.

    python benchmarks/kernels.py --batch 8,32 --prompt 8192,32768 --out benchmarks/results/kernels
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch

# Without a GPU only the interpreter runs Triton's kernels; it is chosen before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hybridkv_kernels.recall.layout import LandmarkKind
from hybridkv_quality.environment import environment
from hybridkv_serving.arguments import whole_numbers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speed.clock import copy_bandwidth, is_lost, pinned_bandwidth, sets_needed, stays_cached
from speed.layer import Case, CaseError
from speed.operations import OPERATIONS, TOLERANCE
from speed.prepared import first_results, measure
from speed.results import (
    COLUMNS,
    OFFLOAD,
    Record,
    Results,
    crosses_link,
    explained,
    find_ratios,
    not_measured,
    plot,
    size,
    write,
)
from speed.rivals import RIVALS

SEED = 0
NEED_GPU = frozenset(RIVALS) - {"sdpa"}
PINNED_BYTES = 256 * 2**20


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


def _sizes(text: str) -> list[tuple[int, int]]:
    pairs = [part.split("x") for part in text.split(",")]
    return [(int(batch), int(prompt)) for batch, prompt in pairs]


def _arguments(on_gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted({name for operation in OPERATIONS.values() for name in operation.backends})
    parser.add_argument("--op", type=_names, default=list(OPERATIONS), help="what to time, of %(default)s")
    parser.add_argument(
        "--backends",
        type=_names,
        default=[backend for backend in known if backend != "torch"],
        help="who does it, of %(default)s and torch",
    )
    parser.add_argument("--no-refcheck", action="store_true", help="check nothing, and report no speed-up")
    parser.add_argument("--batch", type=whole_numbers, default=[8, 32] if on_gpu else [2])
    parser.add_argument("--prompt", type=whole_numbers, default=[8192, 32768] if on_gpu else [512])
    parser.add_argument("--budget", type=_numbers, default=[0.1] if on_gpu else [0.5])
    parser.add_argument(
        "--large-budget",
        type=_numbers,
        default=[0.6] if on_gpu else [],
        help="more budgets for `decode` of pruned heads, so that a launch reads a gigabyte",
    )
    parser.add_argument(
        "--dense-sizes",
        type=_sizes,
        default=_sizes("8x8192,8x32768,64x8192,64x32768") if on_gpu else [],
        help="more sizes, BATCHxPROMPT, for `dense`",
    )
    parser.add_argument("--skew", type=_numbers, default=[1.0, 16.0] if on_gpu else [4.0])
    parser.add_argument("--dynamic", type=_numbers, default=[0.0, 0.5], help="share of heads that recall")
    parser.add_argument("--tier", type=_names, default=["gpu"], help="gpu, host")
    parser.add_argument("--missed", type=float, default=0.03, help="share of chosen chunks fetched in a step")
    parser.add_argument("--landmark", choices=get_args(LandmarkKind), default="sketch2")
    parser.add_argument("--out", type=Path, help="folder for kernels.json, kernels.csv and kernels.png")
    args = parser.parse_args()
    unknown = [name for name in args.op if name not in OPERATIONS]
    unknown += [name for name in args.backends if name not in known]
    if unknown:
        choice = f"operations: {', '.join(OPERATIONS)}; backends: {', '.join(known)}"
        parser.error(f"unknown: {', '.join(unknown)} ({choice})")
    return args


def _cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Operations and their cases."""
    grid = itertools.product(args.batch, args.prompt, args.budget, args.skew, args.dynamic, args.tier)
    for batch, prompt, budget, skew, dynamic, tier in grid:
        for op in args.op:
            yield op, Case(batch, prompt, budget, skew, dynamic, tier, args.missed, args.landmark)
    if "decode" in args.op:
        for batch, prompt, budget, skew in itertools.product(
            args.batch, args.prompt, args.large_budget, args.skew
        ):
            yield "decode", Case(batch, prompt, budget, skew)
    if "dense" in args.op:
        for batch, prompt in args.dense_sizes:
            yield "dense", Case(batch, prompt)


def _todo(args: argparse.Namespace) -> list[tuple[str, str, Case]]:
    """Operation, backend and case of each record, once.

    Raises:
        CaseError: a case cannot be, or there is none.
    """
    todo = dict.fromkeys(
        (op, backend, OPERATIONS[op].case(case))
        for op, case in _cases(args)
        for backend in args.backends
        if backend in OPERATIONS[op].backends and OPERATIONS[op].applies(case)
    )
    if not todo:
        raise CaseError(
            "nothing to measure: none of these backends does any of these operations at these sizes"
        )
    return list(todo)


def _measure(op: str, backend: str, case: Case, device: torch.device, check: bool) -> Record:
    """One record; a backend that is not there, or does not take the size, says so in it."""
    record = Record(op=op, backend=backend, case=asdict(case), num_bytes=0)
    if backend in NEED_GPU and device.type != "cuda":
        record.missing = "needs a GPU"
        return record
    try:
        _fill(record, case, device, check)
    except Exception as error:
        record.missing = explained(error)
        # Rivals come in many versions, and some operations are of vLLM's worker: absence is no fault.
        absent = isinstance(error, ImportError) or (backend in RIVALS and not isinstance(error, CaseError))
        record.right = None if absent else False
    return record


def _fill(record: Record, case: Case, device: torch.device, check: bool) -> None:
    """Runs, checks and times."""
    make, prepare = OPERATIONS[record.op].make, OPERATIONS[record.op].prepare
    made = make(case, device, SEED)
    expected = first_results(prepare(made.copy(), "torch")) if check else None
    sets = [prepare(made, record.backend)]
    record.num_bytes = sets[0].num_bytes
    others = range(SEED + 1, SEED + sets_needed(record.num_bytes, device))
    sets += [prepare(make(case, device, seed), record.backend) for seed in others]
    record.ms, record.error = measure(sets, device, expected)
    record.right = None if record.error is None else record.error <= TOLERANCE
    if not crosses_link(record):
        record.cached = stays_cached(record.num_bytes, device)
        return
    bandwidth = pinned_bandwidth(record.num_bytes, device, to_host=record.op == OFFLOAD)
    if bandwidth is not None:
        record.link_ms = record.num_bytes / bandwidth * 1e3


def _print(results: Results, console: Console) -> None:
    table = Table(*COLUMNS, title=results.environment.device)
    for record in results.records:
        if record.missing is None:
            table.add_row(*record.cells())
    console.print(table)
    for line in not_measured(results):
        console.print(line, markup=False, soft_wrap=True)
    ratios = Table("ratio", "size", "value")
    for ratio in results.ratios:
        ratios.add_row(ratio.what, size(ratio.case), f"{ratio.value:.2f}")
    console.print(ratios)


def main() -> int:
    """Measures and reports; 1 where a result is wrong or something failed, 2 where there is nothing to do."""
    on_gpu = torch.cuda.is_available()
    args = _arguments(on_gpu)
    device = torch.device("cuda" if on_gpu else "cpu")
    console = Console()
    try:
        todo = _todo(args)
    except CaseError as error:
        print(f"kernels.py: {error}", file=sys.stderr)
        return 2
    results = Results(
        environment=environment(),
        copy_bandwidth=copy_bandwidth(device),
        pinned_bandwidth=pinned_bandwidth(PINNED_BYTES, device),
    )
    for op, backend, case in track(todo, console=console, disable=not console.is_terminal):
        record = _measure(op, backend, case, device, not args.no_refcheck)
        lost = record.missing is not None and is_lost(device)
        if lost:
            record.right = False
        results.records.append(record)
        results.ratios = list(find_ratios(results))
        if args.out is not None:
            # After each: a lent machine's time may end before the grid does.
            write(results, args.out)
        if lost:
            print(f"kernels.py: {op} by {backend} has lost the device; the rest is left out", file=sys.stderr)
            break
    _print(results, console)
    if args.out is not None:
        plot(results, args.out)
    return int(any(record.right is False for record in results.records))


if __name__ == "__main__":
    sys.exit(main())
