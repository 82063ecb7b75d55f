"""Approximations that are one instruction of a GPU, for the recall kernels."""

import triton
import triton.language as tl


@triton.jit
def by_hardware(x: tl.tensor, OP: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """2^x for `ex2`, log2 of x for `lg2`: one instruction, which takes denormal numbers for 0."""
    if INTERPRETED:
        return tl.exp2(x) if OP == "ex2" else tl.log2(x)
    return tl.inline_asm_elementwise(
        f"{OP}.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
