"""The driver that Triton and vLLM ask for the device, the target and the benchmarker."""

from collections.abc import Callable
from typing import Any

import torch
from triton.backends import driver as triton_driver
from triton.backends.compiler import GPUTarget


class CpuDriver(triton_driver.DriverBase):
    """Reports the CPU as the one active device."""

    @staticmethod
    def is_active() -> bool:
        # A CUDA device, should there be one, keeps its own driver.
        return not torch.cuda.is_available()

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError("the cpu backend runs interpreted: set TRITON_INTERPRET=1")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        return None

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., Any]:
        from triton.testing import do_bench

        return do_bench

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1, dtype=torch.int)

    def clear_cache(self, cache: torch.Tensor) -> None:
        cache.zero_()
