"""What a Triton launch is tuned by, in one form for the wrappers and for the compile check."""

from typing import Any, NamedTuple

import torch
from triton import knobs

FULL_PRECISION = "tf32x3"
"""A dot of fp32 operands on the tensor cores, in three parts: nearly exact, and it needs few registers."""


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


def widen_dots(dtype: torch.dtype) -> bool:
    """Whether dots need fp32 operands: Triton's interpreter multiplies the bits of bf16 as integers."""
    return bool(knobs.runtime.interpret) and dtype == torch.bfloat16


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`: Triton's tiles need one."""
    return 1 << max(value - 1, 0).bit_length()
