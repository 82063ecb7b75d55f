"""Prepares every Python process of a CPU-only environment for vLLM (loaded by a .pth file; keep it light)."""

import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

# Defaults, not orders: whatever the user has set wins.
ENVIRONMENT = {
    # Triton kernels run under Triton's interpreter, so the GPU's code path runs here too.
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    # The worker shares the engine core's process, as with one GPU: one process fewer to import vLLM.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # GiB of KV cache; without it vLLM's CPU worker asks for a share of all memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM's thread binding wants one core set per rank; small machines have no cores to spare.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Skip the Inductor compilation and warm-up, which cost minutes and buy nothing for small models.
    "VLLM_CPU_CI_ENV": "1",
    # Nothing is compiled ahead of time then, yet a key of the whole configuration is made in every step.
    "VLLM_USE_AOT_COMPILE": "0",
    # Nor is a model traced, seconds at each start, only for the trace to run one operation after another.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class TorchvisionSchemas(importlib.abc.MetaPathFinder):
    """Defines the two operator schemas that a CUDA build of torchvision expects, just before it is imported.

    The package index carries torchvision only as a CUDA build; with CPU torch its import stops at
    `torchvision::nms`, although the image processors never call it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library = library  # A collected Library takes its schemas with it.
            torch._hybridkv_torchvision_schemas = self  # type: ignore[attr-defined]
        return None


class AdaptedAfterImport(importlib.abc.MetaPathFinder):
    """Adapts a module once it is imported: `adapter` is the module whose `adapt` does it."""

    def __init__(self, name: str, adapter: str) -> None:
        self._name, self._adapter = name, adapter

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(self._adapter).adapt(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# Importing vLLM makes millions of objects that stay: by default a fifth of its time goes into looking for
# garbage among them.
gc.set_threshold(100_000, 50, 100)
sys.meta_path[:0] = [
    TorchvisionSchemas(),
    AdaptedAfterImport("triton.runtime.interpreter", "hybridkv_cpu_harness.interpreter"),
    AdaptedAfterImport("vllm.model_executor.layers.utils", "hybridkv_cpu_harness.matmul"),
    AdaptedAfterImport("vllm.v1.worker.cpu_worker", "hybridkv_cpu_harness.warm_up"),
]
