"""The compiler half of the backend: it refuses, because nothing is compiled for this target."""

from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class CpuBackend(BaseBackend):
    """Says what to do if a kernel is compiled instead of interpreted."""

    binary_ext = "cpu"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "cpu-interpreted"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise RuntimeError("the cpu backend runs interpreted: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, *language: Any) -> None:
        raise RuntimeError("the cpu backend runs interpreted: set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        return None

    def get_module_map(self) -> dict[str, Any]:
        return {}
