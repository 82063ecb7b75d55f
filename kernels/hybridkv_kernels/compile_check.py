"""Compile every Triton kernel for the shapes that ship, without a GPU; refuse real spills and excess memory.

Run as `python -m hybridkv_kernels.compile_check`, in a process where TRITON_INTERPRET is unset or 0.
"""

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    cache_write,
    chunk_gather,
    chunk_offload,
    chunk_score,
    chunk_select,
    compact,
    extent_decode,
    landmark_build,
    window_scores,
)
from .extent_decode import work_list
from .extent_decode.plan import SPLIT_GRANULE
from .launch import OVERLAP_CAPABILITY, LaunchOptions
from .recall.layout import LandmarkKind, LandmarkLayout

KIB = 1024
SHARED_LIMIT = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Shared memory that one program may have, in bytes, by compute capability."""

SPILL_LIMIT = 80
"""Bytes of a thread that ptxas may spill: a few it gives up to fit one program more on a multiprocessor.

The most are landmarks of heads of 256 for sm_80 under Triton 3.6, once a prompt: 72.
"""

NUM_LAYERS, NUM_KV_HEADS = 28, 4
SHAPES: tuple[tuple[torch.dtype, int, tuple[int, ...]], ...] = (
    (torch.bfloat16, 64, (1, 7)),
    (torch.bfloat16, 128, (1, 4, 7, 8, 12, 16)),
    (torch.float16, 64, (7,)),
    (torch.float16, 128, (1, 7)),
    (torch.bfloat16, 80, (1, 8)),
    (torch.bfloat16, 96, (1, 8)),
    (torch.bfloat16, 256, (1, 4, 8)),
    (torch.float32, 64, (1, 7)),
    (torch.float32, 128, (1, 4, 7, 8)),
    (torch.float32, 256, (8,)),
)
"""(dtype, head size, query groups): tiles depend on the dtype and the head size, the group changes little."""

QUICK_SHAPES = ((torch.bfloat16, 128, (7,)), (torch.bfloat16, 80, (1,)), (torch.float32, 128, (7,)))

MAX_CHUNKS = (512, 2048, 8192)
"""Chunks of the longest prompt: chunk_select holds the keys of so many or, of more than 2048, of parts."""

TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNEL_MODULES = (
    "cache_write.triton",
    "chunk_gather.triton",
    "chunk_offload.triton",
    "chunk_score.triton",
    "chunk_select.triton",
    "compact.triton",
    "extent_decode.work_list",
    "extent_decode.triton",
    "landmark_build.triton",
    "window_scores.triton",
)

POOL_TYPED = {"query", "key", "value", "pool", "store", "out"}
FLOAT_POINTERS = {
    "log_weight",
    "mass",
    "votes",
    "split_max",
    "split_sum",
    "row_max",
    "row_weight",
    "partial_out",
    "partial_lse",
    "rotation",
    "terms",
}
INDEX_POINTERS = {
    "arena",
    "arena_blocks",
    "blocks",
    "chunk_first",
    "dest",
    "extents",
    "freed",
    "missing",
    "num_missing",
    "offsets",
    "prompt_len",
    "row_len",
    "row_slot",
    "source_blocks",
    "store_blocks",
    "tail_start",
    "work",
}
BYTE_POINTERS = {"digits"}
LONG_POINTERS = {"counters", "slot_mapping"}
FLOAT_SCALARS = {"scale_log2", "vote_log2"}
POINTER_ALIGNMENT = 16


@dataclass(frozen=True)
class Case:
    """One kernel at one shape, for one compute capability."""

    module: str
    kernel: str
    shape: str
    dtype: torch.dtype
    options: LaunchOptions
    capability: int

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for cases that compile to the same thing."""
        return (self.kernel, self.dtype, tuple(self.options.constexprs.items()), self.capability)


class Result(NamedTuple):
    """What became of a case: registers of a thread, bytes of shared memory, bytes spilled, or an error."""

    case: Case
    registers: int
    shared: int
    spilled: int
    error: str

    @property
    def failure(self) -> str:
        """Why the case may not ship, or the empty string."""
        limit = SHARED_LIMIT[self.case.capability]
        if self.error:
            return self.error
        if self.spilled > SPILL_LIMIT:
            return f"spills {self.spilled} bytes"
        return f"needs over {limit} bytes of shared memory" if self.shared > limit else ""


def cases(capabilities: list[int], quick: bool = False) -> list[Case]:
    """Every distinct case for these capabilities."""
    found: dict[tuple[object, ...], Case] = {}
    for capability in capabilities:
        for dtype, head_size, groups in QUICK_SHAPES if quick else SHAPES:
            for group in groups:
                shape = f"{TYPE_NAMES[dtype]} D={head_size} G={group}"
                for module, kernel, options in _kernels(dtype, head_size, group):
                    case = Case(module, kernel, shape, dtype, options, capability)
                    found.setdefault(case.key, case)
    return list(found.values())


def _kernels(dtype: torch.dtype, head_size: int, group: int) -> Iterator[tuple[str, str, LaunchOptions]]:
    heads = (NUM_LAYERS, NUM_KV_HEADS)
    window = window_scores.fused.launch_options(*heads, group, head_size, dtype)
    decode = extent_decode.fused.launch_options(*heads, group, head_size, dtype)
    merge = extent_decode.fused.merge_options(NUM_KV_HEADS, group, head_size)
    offload = chunk_offload.fused.launch_options(*heads, head_size, dtype.itemsize)
    # To chunk_gather and chunk_select other kinds of landmarks differ in numbers only.
    layout = LandmarkLayout("sketch", head_size, dtype.itemsize)
    yield "cache_write.triton", "cache_write_kernel", cache_write.fused.launch_options(*heads, head_size)
    for has_store in (True, False):
        gather = chunk_gather.fused.launch_options(*heads, layout, has_store)
        yield "chunk_gather.triton", "chunk_gather_kernel", gather
    yield "chunk_offload.triton", "chunk_offload_kernel", offload
    for max_chunks in MAX_CHUNKS:
        select = chunk_select.fused.launch_options(*heads, group, max_chunks, layout)
        yield "chunk_select.triton", "chunk_select_kernel", select
    yield from _landmark_kernels(dtype, head_size, group)
    yield "compact.triton", "compact_kernel", compact.fused.launch_options(*heads, head_size, dtype)
    for part in get_args(work_list.Part):
        split = (1, layout.places) if part == "selecting" else (SPLIT_GRANULE,)
        yield "extent_decode.work_list", "plan_kernel", work_list.launch_options(*heads, part, *split)
    yield "extent_decode.triton", "decode_kernel", decode
    yield "extent_decode.triton", "merge_kernel", merge
    yield "window_scores.triton", "statistics_kernel", window
    yield "window_scores.triton", "reduce_kernel", window_scores.fused.reduce_options()
    yield "window_scores.triton", "column_kernel", window


def _landmark_kernels(
    dtype: torch.dtype, head_size: int, group: int
) -> Iterator[tuple[str, str, LaunchOptions]]:
    """What builds and scores landmarks, by kind."""
    heads = (NUM_LAYERS, NUM_KV_HEADS)
    build, score = "landmark_build.triton", "chunk_score.triton"
    for kind in get_args(LandmarkKind):
        layout = LandmarkLayout(kind, head_size, dtype.itemsize)
        yield build, "landmark_kernel", landmark_build.fused.launch_options(*heads, layout)
        if layout.sketch_bits:
            yield score, "prepare_kernel", chunk_score.fused.prepare_options(*heads, group, layout, dtype)
            yield score, "sketch_kernel", chunk_score.fused.sketch_options(*heads, group, layout)
        else:
            yield score, "bound_kernel", chunk_score.fused.bound_options(*heads, group, layout, dtype)


def package_kernels() -> set[tuple[str, str]]:
    """(module, name) of every kernel that the package defines."""
    return {
        (module, name)
        for module in KERNEL_MODULES
        for name in vars(importlib.import_module(f"{__package__}.{module}"))
        if name.endswith("_kernel")
    }


def source(case: Case) -> ASTSource:
    """The kernel as Triton would specialise it at run time: aligned pointers, strides that divide by 16."""
    kernel = getattr(importlib.import_module(f"{__package__}.{case.module}"), case.kernel)
    signature = {}
    attributes = {}
    for index, param in enumerate(kernel.params):
        name = param.name
        signature[name] = _argument_type(name, case.dtype)
        aligned = not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        if aligned and (signature[name].startswith("*") or name.startswith("stride_")):
            attributes[(index,)] = [["tt.divisibility", POINTER_ALIGNMENT]]
    constexprs = dict(case.options.constexprs)
    if "OVERLAP" in signature:
        constexprs["OVERLAP"] = case.capability >= OVERLAP_CAPABILITY
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def _argument_type(name: str, dtype: torch.dtype) -> str:
    if name.isupper():
        return "constexpr"
    if name in POOL_TYPED:
        return f"*{TYPE_NAMES[dtype]}"
    if name in FLOAT_POINTERS:
        return "*fp32"
    if name in INDEX_POINTERS:
        return "*i32"
    if name in BYTE_POINTERS:
        return "*i8"
    if name in LONG_POINTERS:
        return "*i64"
    return "fp32" if name in FLOAT_SCALARS else "i32"


def compile_case(case: Case) -> Result:
    """Compile one case to a cubin and read what it uses."""
    target = GPUTarget("cuda", case.capability, 32)
    try:
        compiled = triton.compile(source(case), target=target, options=case.options.compiler_options())
        usage = resource_usage(compiled.asm["cubin"])
    # Whatever the compiler throws is this case's result, not the end of the run.
    except Exception as error:
        return Result(case, 0, 0, 0, f"{type(error).__name__}: {str(error).strip()[:400]}")
    return Result(case, usage["REG"], compiled.metadata.shared, usage["STACK"] + usage["LOCAL"], "")


def resource_usage(cubin: bytes) -> Mapping[str, int]:
    """What cuobjdump says of a cubin's only kernel, which has no stack of its own: STACK is spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def run(todo: list[Case], jobs: int) -> list[Result]:
    """Compile all cases in `jobs` processes, with a line for each as it is done."""
    results = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for future in as_completed([pool.submit(compile_case, case) for case in todo]):
            result = future.result()
            results.append(result)
            case = result.case
            print(
                f"[{len(results):3}/{len(todo)}] {case.kernel:20} {case.shape:16} sm_{case.capability:<4}"
                f"{case.options.num_warps:2} warps {result.registers:4} regs {result.shared:7} B shared"
                f" {result.spilled:5} B spilled"
                f"  {result.failure or 'ok'}",
                flush=True,
            )
    return results


def main(arguments: list[str] | None = None) -> int:
    """Compile, report, and return the process's exit status: 1 if a case may not ship."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--caps", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT)
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="three shapes only")
    chosen = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 1
    todo = cases(chosen.caps, chosen.quick)
    left_out = package_kernels() - {(case.module, case.kernel) for case in todo}
    results = run(todo, chosen.jobs)
    failures = [result for result in results if result.failure]
    print(f"{len(results) - len(failures)} of {len(results)} cases may ship")
    for name in sorted(left_out):
        print(f"never compiled: {'.'.join(name)}")
    return 1 if failures or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
