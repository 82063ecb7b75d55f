"""No warm-up of samplers, which vLLM 0.33 runs on a CPU too: seconds an engine under Triton's interpreter."""

import functools
from types import ModuleType
from typing import Any


def adapt(cpu_worker: ModuleType) -> None:
    """Changes `vllm.v1.worker.cpu_worker`, right after its import: here nothing is compiled."""
    worker = cpu_worker.CPUWorker
    original = worker.compile_or_warm_up_model

    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any) -> Any:
        self.vllm_config.kernel_config.enable_jit_warmup = False
        return original(self)

    worker.compile_or_warm_up_model = compile_or_warm_up_model
