"""Products of bf16 matrices in float32 where the CPU has no bf16 arithmetic (read in vLLM 0.32)."""

from types import ModuleType

import torch


def adapt(utils: ModuleType) -> None:
    """Changes `vllm.model_executor.layers.utils`, right after its import.

    torch falls back to loops there that take five to ten times as long. Both sum in float32 and round once.
    """
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    multiply = utils.cpu_unquantized_gemm

    def cpu_unquantized_gemm(
        layer: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
            return multiply(layer, x, weight, bias)
        wide = None if bias is None else bias.float()
        return torch.nn.functional.linear(x.float(), weight.float(), wide).to(x.dtype)

    utils.cpu_unquantized_gemm = cpu_unquantized_gemm
