"""Every kernel compiles for GPUs without one, and no pool offset is computed in 32 bits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hybridkv_kernels import compile_check

pytestmark = pytest.mark.slow

CHECK = ("-m", "hybridkv_kernels.compile_check", "--quick")
PRINT_TTIR = """
import triton
from triton.backends.compiler import GPUTarget
from hybridkv_kernels import compile_check
for case in compile_check.cases([90], quick=True):
    source = compile_check.source(case)
    if "pool" in source.signature:
        options = case.options.compiler_options()
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(f"// kernel {case.kernel} {case.shape}")
        print(compiled.asm["ttir"])
"""


def run_python(interpret: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with Triton's interpreter on or off, whatever it is in this process."""
    package = Path(compile_check.__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": str(package)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_quick_check_passes() -> None:
    done = run_python(False, *CHECK, "--caps", "80", "90", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases may ship" in done.stdout


def test_interpreter_is_refused() -> None:
    done = run_python(True, *CHECK)
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stderr


def test_pool_offsets_are_64_bit() -> None:
    done = run_python(False, "-c", PRINT_TTIR)
    assert done.returncode == 0, done.stderr
    kernels = done.stdout.split("// kernel ")[1:]
    assert {text.split()[0] for text in kernels} == {
        "bound_kernel",
        "cache_write_kernel",
        "chunk_gather_kernel",
        "chunk_offload_kernel",
        "chunk_select_kernel",
        "column_kernel",
        "compact_kernel",
        "decode_kernel",
        "landmark_kernel",
        "sketch_kernel",
        "statistics_kernel",
    }
    for text in kernels:
        pointers = {"%pool", "%store"}
        # The whole text each time: a pool seen as int32, and then as many of it.
        for _ in range(2):
            names = "|".join(re.escape(pointer) for pointer in pointers)
            pointers |= set(re.findall(rf"(%\S+) = tt\.(?:splat|bitcast) (?:{names})(?![\w#])", text))
        additions = re.findall(r"tt\.addptr (%[^\s,]+), %\S+ : [^,]+, (.+?)(?: loc|$)", text, re.M)
        offsets = [offset for pointer, offset in additions if pointer in pointers]
        assert offsets, text.split("\n")[0]
        assert all("i64" in offset for offset in offsets), (text.split("\n")[0], offsets)
