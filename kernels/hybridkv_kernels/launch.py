"""What a Triton launch is tuned by, for the wrappers and the compile check; and how launches overlap."""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

FULL_PRECISION = "tf32x3"
"""A dot of fp32 operands on the tensor cores, in three parts: nearly exact, and it needs few registers."""

OVERLAP_CAPABILITY = 90
"""The least compute capability that has programmatic dependent launch (Hopper)."""

OVERLAP_SWITCH = "HYBRIDKV_OVERLAP"
"""Environment variable: 0 launches kernels one after the other, as on older cards; read once."""


class LaunchOptions(NamedTuple):
    """The compile-time constants, warps and pipeline stages of one kernel for one shape."""

    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `kernel[grid](...)`."""
        return {**self.constexprs, **self.compiler_options()}

    def compiler_options(self) -> dict[str, Any]:
        """The options of `triton.compile`."""
        # Triton's default for fused multiply-add depends on its version; results should not.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@functools.cache
def overlap(device: torch.device, early: bool = False) -> dict[str, Any]:
    """Keyword arguments of a kernel with OVERLAP, so that it can overlap with the launch after it.

    Args:
        device: where it runs; launches overlap on NVIDIA GPUs from Hopper on.
        early: whether it overlaps with the launch before it, too: it begins once every program of that one
            has called `await_launch_before` or has ended. Ahead of its own call it reads the request tables,
            the step's rows and its plan, the rotation of queries and which chunks are hot. These must not be
            written by the last launch that was not early, nor since: within a layer nothing does so before
            the kernel that reads it.
    """
    can = device.type == "cuda" and torch.version.hip is None and os.environ.get(OVERLAP_SWITCH) != "0"
    can = can and 10 * torch.cuda.get_device_capability(device)[0] >= OVERLAP_CAPABILITY
    return {"OVERLAP": can, "launch_pdl": True} if can and early else {"OVERLAP": can}


@triton.jit
def await_launch_before(OVERLAP: tl.constexpr) -> None:
    """Let the launch after this one begin, and wait until the one before has ended, with all that it wrote.

    Every program must call it, before it ends or writes: else a launch could end before the one before it
    has, and the one after would not wait for that either.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def widen_dots(dtype: torch.dtype) -> bool:
    """Whether dots need fp32 operands: Triton's interpreter multiplies the bits of bf16 as integers."""
    return bool(knobs.runtime.interpret) and dtype == torch.bfloat16


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`: Triton's tiles need one."""
    return 1 << max(value - 1, 0).bit_length()
