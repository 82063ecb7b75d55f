"""Every kernel compiles for GPUs without one, no pool offset is computed in 32 bits, and launches wait."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hybridkv_kernels import compile_check

pytestmark = pytest.mark.slow

CHECK = ("-m", "hybridkv_kernels.compile_check", "--quick")
# Triton 3.6 writes the wait as assembly.
WAIT = re.compile(r"grid_dependency_wait|griddepcontrol\.wait")
PRINT_CODE = """
import triton
from triton.backends.compiler import GPUTarget
from hybridkv_kernels import compile_check
for case in compile_check.cases([90], quick=True):
    source = compile_check.source(case)
    if {"pool", "OVERLAP"} & set(source.signature):
        options = case.options.compiler_options()
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(f"// kernel {case.kernel} {case.shape}")
        print(compiled.asm["ttir"], "// ptx", compiled.asm["ptx"], sep="\\n")
"""


def run_python(interpret: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with Triton's interpreter on or off, whatever it is in this process."""
    package = Path(compile_check.__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": str(package)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_quick_check_passes() -> None:
    done = run_python(False, *CHECK, "--caps", "80", "89", "90", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases may ship" in done.stdout


def test_interpreter_is_refused() -> None:
    done = run_python(True, *CHECK)
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stderr


@pytest.fixture(scope="module")
def kernels() -> list[str]:
    """TTIR and PTX of the kernels that have a pool or overlap, for Hopper; each begins with its name."""
    done = run_python(False, "-c", PRINT_CODE)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("// kernel ")[1:]


def test_a_launch_that_overlaps_waits_before_it_ends_or_writes(kernels: list[str]) -> None:
    waiting = [text for text in kernels if WAIT.search(text)]
    assert {text.split()[0] for text in waiting} == {
        "bound_kernel",
        "cache_write_kernel",
        "chunk_gather_kernel",
        "chunk_select_kernel",
        "decode_kernel",
        "merge_kernel",
        "prepare_kernel",
        "sketch_kernel",
    }
    for text in waiting:
        name = text.split("\n", 1)[0]
        body = text[text.index("{", text.index("tt.func public")) :]
        before = WAIT.split(body, maxsplit=1)[0]
        # Nothing conditional, nothing written: so every program gets there, and has changed nothing.
        assert not re.search(r"\b(?:s?cf|tt\.(?:return|store|atomic))", before), name
        ptx = text.partition("// ptx")[2]
        before, *rest = WAIT.split(ptx[ptx.index(".entry") :])
        assert len(rest) == 1, name
        # Nor did the compiler move a write there, or take memory that others write for constant.
        assert not re.search(r"\b(?:st|red|atom)\.\S*global|\bret;", before), name
        assert not re.search(r"\bld\.global\S*\.nc", ptx), name


def test_pool_offsets_are_64_bit(kernels: list[str]) -> None:
    kernels = [text for text in kernels if "%pool" in text]
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
