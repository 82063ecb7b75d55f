"""Times a layer's decode step under other tunings of the kernels, to see which constants a card wants.

Each variant changes one thing of what ships, is checked against the torch reference, and is timed in the same
run; one that fails, for want of shared memory say, keeps no other from its turn. On a CPU it runs small,
under Triton's interpreter, without times.

    python benchmarks/tune.py --out benchmarks/results/tune.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any
from unittest.mock import patch

import torch

# Without a GPU only the interpreter runs Triton's kernels; it is chosen before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hybridkv_kernels import chunk_gather, chunk_score, chunk_select, extent_decode, recall_decode
from hybridkv_kernels.chunk_recall import chunk_recall
from hybridkv_kernels.chunk_score import plan as score_planning
from hybridkv_kernels.extent_decode import plan
from hybridkv_kernels.launch import LaunchOptions, overlap
from hybridkv_kernels.recall.work import RecallWork
from hybridkv_quality.environment import environment
from rich.console import Console
from rich.table import Table
from speed.clock import is_lost
from speed.layer import HEAD_SIZE, KV_HEADS, QUERY_HEADS, Case, CaseError, Layer, make_layer
from speed.operations import OPERATIONS, TOLERANCE
from speed.prepared import first_results, measure
from speed.results import explained
from torch import Tensor

SEED = 0


@dataclass(frozen=True)
class Variant:
    """One change.

    Attributes:
        constants: (module, name) and the value that a module's constant has instead.
        options: (module, name) of a function that returns `LaunchOptions`, and what is replaced of them.
        layer: changes the layer.
    """

    constants: Mapping[tuple[ModuleType, str], Any] = field(default_factory=dict)
    options: Mapping[tuple[ModuleType, str], Mapping[str, int]] = field(default_factory=dict)
    layer: Callable[[Layer], Layer] = lambda layer: layer

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Makes the changes of modules for as long as it lasts."""
        with ExitStack() as stack:
            for (module, name), value in self.constants.items():
                stack.enter_context(patch.object(module, name, value))
            for (module, name), changes in self.options.items():
                # Past the cache, which knows nothing of changed constants.
                original = getattr(module, name).__wrapped__
                stack.enter_context(patch.object(module, name, _changed(original, changes)))
            yield


def _changed(
    original: Callable[..., LaunchOptions], changes: Mapping[str, int]
) -> Callable[..., LaunchOptions]:
    def options(*args: Any) -> LaunchOptions:
        return original(*args)._replace(**changes)

    return options


SCORE, SELECT, GATHER = chunk_score.fused, chunk_select.fused, chunk_gather.fused
DECODE = extent_decode.fused


def _in_order(layer: Layer) -> Layer:
    return replace(layer, recall_plan=replace(layer.recall_plan, beside=None))


def _among_longer(layer: Layer) -> Layer:
    """Where prompts four times as long may come, as where the model's full context is served."""
    case, device = layer.case, layer.pool.device
    work = RecallWork.create(
        case.batch, KV_HEADS, QUERY_HEADS, layer.landmarks, 4 * case.chunks, case.batch, device
    )
    return replace(layer, work=work)


def _score_beside(*args: Any, meanwhile: Callable[[], None], **kwargs: Any) -> None:
    meanwhile()
    chunk_recall(*args, **kwargs)


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "as it ships": Variant(),
        "no launch begins early": Variant(
            {
                (module, "overlap"): lambda device, early=False: overlap(device)
                for module in (SCORE, SELECT, GATHER, DECODE)
            }
        ),
        "where longer prompts may come": Variant(layer=_among_longer),
        "static heads between scores and choice": Variant(layer=_in_order),
        "static heads beside the scores too": Variant({(recall_decode, "chunk_recall"): _score_beside}),
        # Fewer programs of scores leave room for them.
        **{
            f"static heads beside scores by {number} programs": Variant(
                {
                    (recall_decode, "chunk_recall"): _score_beside,
                    (score_planning, "PROGRAMS_PER_MULTIPROCESSOR"): number,
                }
            )
            for number in (8, 12, 16)
        },
        **{f"{number} programs beside": Variant({(plan, "PROGRAMS_BESIDE"): number}) for number in (1, 3, 4)},
        **{
            f"{number} programs": Variant({(plan, "PROGRAMS_PER_MULTIPROCESSOR"): number})
            for number in (2, 4, 6)
        },
        **{
            f"scores by {number} programs": Variant({(score_planning, "PROGRAMS_PER_MULTIPROCESSOR"): number})
            for number in (12, 16, 32, 48, 96)
        },
        **{
            f"scores of {tile} chunks, {warps} warps, {stages} stages": Variant(
                {(SCORE, "TILE_CHUNKS"): tile},
                {(SCORE, "sketch_options"): {"num_warps": warps, "num_stages": stages}},
            )
            for tile, warps, stages in ((1, 1, 3), (2, 1, 2), (2, 1, 4), (4, 1, 3), (4, 2, 3), (8, 4, 3))
        },
        **{
            f"choice by {warps} warps": Variant(options={(SELECT, "launch_options"): {"num_warps": warps}})
            for warps in (4, 16)
        },
        **{
            f"{split} fetches at once": Variant({(GATHER, "SPLIT"): split}, {(GATHER, "launch_options"): {}})
            for split in (2, 4, 16)
        },
        **{
            f"attention of {warps} warps, {stages} stages": Variant(
                options={(DECODE, "launch_options"): {"num_warps": warps, "num_stages": stages}}
            )
            for warps, stages in ((2, 3), (2, 5), (4, 4))
        },
    }
)


@dataclass(frozen=True)
class Figures:
    """What came of a variant: milliseconds of a step, None on a CPU, and its error; or why there are none."""

    ms: float | None = None
    error: float | None = None
    failed: str | None = None

    @property
    def right(self) -> bool:
        """Whether it did what it should."""
        return self.error is not None and self.error <= TOLERANCE

    def cells(self) -> tuple[str, str]:
        """Columns of the table behind the variant's name."""
        us = "-" if self.ms is None else f"{self.ms * 1e3:.1f}"
        return us, self.failed or f"{self.error:.0e}"


def measure_variant(name: str, layer: Layer, expected: list[Tensor]) -> Figures:
    """Times a step, and checks it against the reference's results."""
    variant, device = VARIANTS[name], layer.pool.device
    with variant.applied():
        rows = layer.case.batch
        decode_plan = plan.DecodePlan.create(rows, 1, KV_HEADS, QUERY_HEADS, HEAD_SIZE, device)
        recall_plan = recall_decode.RecallPlan.create(
            rows, 1, KV_HEADS, QUERY_HEADS, layer.landmarks.layout, device
        )
    changed = variant.layer(replace(layer, plan=decode_plan, recall_plan=recall_plan))
    # Outside, so that all variants get the same queries.
    step = OPERATIONS["step"].prepare(changed, "triton")
    with variant.applied():
        return Figures(*measure([step], device, expected))


def main(arguments: list[str] | None = None) -> int:
    """Measures all variants and prints them, the fastest first; 1 where one is wrong or failed."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32 if on_gpu else 2)
    parser.add_argument("--prompt", type=int, default=32768 if on_gpu else 512)
    parser.add_argument("--budget", type=float, default=0.1 if on_gpu else 0.5)
    parser.add_argument("--skew", type=float, default=16.0)
    parser.add_argument("--dynamic", type=float, default=0.5, help="share of heads that recall")
    parser.add_argument("--tier", choices=("gpu", "host"), default="gpu")
    parser.add_argument("--out", type=Path, help="JSON file, written after each variant")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        case = Case(args.batch, args.prompt, args.budget, args.skew, args.dynamic, args.tier)
        layer = make_layer(case, device, SEED)
        expected = first_results(OPERATIONS["step"].prepare(layer.copy(), "torch"))
    except CaseError as error:
        print(f"tune.py: {error}", file=sys.stderr)
        return 2
    found: dict[str, Figures] = {}
    for name in VARIANTS:
        try:
            found[name] = measure_variant(name, layer, expected)
        except Exception as error:
            found[name] = Figures(failed=explained(error))
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            variants = {name: asdict(figures) for name, figures in found.items()}
            report = {"environment": environment().model_dump(), "case": asdict(case), "variants": variants}
            args.out.write_text(json.dumps(report, indent=1) + "\n")
        if found[name].failed is not None and is_lost(device):
            print(f"tune.py: the device is lost after {name!r}; the rest is left out", file=sys.stderr)
            break
    table = Table("variant", "us", "relative error", title=f"a step of a layer: {case}")
    for name, figures in sorted(found.items(), key=lambda item: item[1].ms or math.inf):
        table.add_row(name, *figures.cells())
    Console().print(table)
    return int(not all(figures.right for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
