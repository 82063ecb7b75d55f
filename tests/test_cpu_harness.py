"""What the CPU environment changes in Triton's interpreter and in vLLM: the same results, in less time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton
from triton import language as tl
from triton.runtime import interpreter

matmul = pytest.importorskip(
    "hybridkv_cpu_harness.matmul", reason="the harness is for environments without a GPU"
)


@triton.jit
def _twice(value):
    return value + tl.sum(value, axis=0) - tl.sum(value, axis=0) + value


@triton.jit
def _kernel(source, target, add, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = _twice(tl.load(source + at))
    tl.store(target + at, tl.where(value > 4, value + add, value))


@triton.jit
def _sum_up_to(target, end):
    total = tl.zeros((), dtype=tl.int64)
    for number in tl.range(1, end):
        total += number.to(tl.int64) * number
    tl.store(target, total)


def _run(values: list[int], add: int = 0) -> list[int]:
    source = torch.tensor(values, dtype=torch.int32)
    target = torch.full_like(source, -1)
    _kernel[(1,)](source, target, add, SIZE=len(values))
    return target.tolist()


def _language() -> dict[str, object]:
    owners = {"tl": tl, "math": tl.math, "tensor": tl.tensor, "dtype": tl.dtype}
    return {f"{name}.{key}": value for name, owner in owners.items() for key, value in vars(owner).items()}


def test_kernels_and_their_functions_run_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run looks for what is replaced in the language, later ones remember it."""
    assert _run([1, 2, 3, 4]) == [2, 4, 6, 8]
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *_: pytest.fail("looked again"))
    for add in (0, 1, 2):
        assert _run([1, 2, 3, 4], add) == [2, 4, 6 + add, 8 + add]


def test_shapes_seen_before_are_the_same_and_others_are_still_checked() -> None:
    for _ in range(2):
        for sizes in ([2, 8], [tl.constexpr(2), tl.constexpr(8)], tl.tuple([2, 8])):
            made = tl.block_type(tl.int64, sizes)
            assert (made.numel, tuple(made.shape), str(made)) == (16, (2, 8), "<['2', '8'], int64>")
            assert made.with_element_ty(tl.int8) == tl.block_type(tl.int8, [2, 8]) != made
            value = tl.tensor(None, made)
            assert (value.numel.value, [size.value for size in value.shape]) == (16, [2, 8])
            assert (value.type, value.dtype) == (made, tl.int64)
        for sizes, error in (([2.0, 8], TypeError), ([2, 6], ValueError), ([], TypeError)):
            with pytest.raises(error):
                tl.block_type(tl.int64, sizes)
    scalar = tl.tensor(None, tl.int32)
    assert (scalar.numel.value, len(scalar.shape), scalar.dtype) == (1, 0, tl.int32)


def test_a_kernel_leaves_the_language_as_it_was() -> None:
    """After a run that ended well, and after one that did not."""
    before = _language()
    _run([1, 2, 3, 4])
    assert all(tl.core.is_builtin(member) for member in (tl.load, tl.math.exp, tl.tensor.__add__))
    assert _language() == before
    with pytest.raises(interpreter.InterpreterError):
        _run([1, 2, 3])  # Not a power of two.
    assert _language() == before
    assert _run([1, 2, 3, 4]) == [2, 4, 6, 8]


def test_an_integer_that_leaves_its_type_wraps_as_on_a_gpu() -> None:
    """The interpreter's check for it is left out, which reported nothing."""
    assert _run([2**31 - 1, 0]) == [-2, 0]
    assert not interpreter.interpreter_builder.options.sanitize_overflow


def test_types_are_named_once_for_scalars_pointers_and_blocks() -> None:
    """Blocks and pointers of a type do not get each other's numpy type."""
    get = interpreter._get_np_dtype
    for _ in range(2):
        assert get(tl.float16) == "float16"
        assert get(tl.pointer_type(tl.float16)) == "uint64"
        assert get(tl.block_type(tl.float16, [4])) == "float16"
        assert get(tl.block_type(tl.pointer_type(tl.float16), [4])) == "uint64"
        assert get(tl.bfloat16) == "uint16"


def test_a_loop_counts_in_numbers_with_a_type() -> None:
    """As a compiled loop does; vLLM's kernel for top-k and top-p makes use of it."""
    target = torch.zeros((), dtype=torch.int64)
    _sum_up_to[(1,)](target, 4)
    assert target.item() == 1 + 4 + 9
    before = _language()
    _sum_up_to[(1,)](target, 3)
    assert target.item() == 1 + 4
    assert _language() == before


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_products_are_summed_in_float32_and_rounded_once(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the CPU has no arithmetic for them; other types, and other CPUs, go vLLM's way."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    theirs: list[torch.dtype] = []

    def multiply(
        layer: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        theirs.append(x.dtype)
        return layer(x, weight, bias)

    utils = SimpleNamespace(cpu_unquantized_gemm=multiply)
    matmul.adapt(utils)
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.forward = torch.nn.functional.linear
    for bias in (torch.randn(48), None):
        x, weight = torch.randn(5, 7, 64), torch.randn(48, 64)
        assert torch.equal(utils.cpu_unquantized_gemm(layer, x, weight, bias), layer(x, weight, bias))
        narrow = [None if value is None else value.bfloat16() for value in (x, weight, bias)]
        found = utils.cpu_unquantized_gemm(layer, *narrow)
        assert found.dtype == torch.bfloat16
        exact = layer(*(None if value is None else value.double() for value in narrow))
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
    assert theirs == ([torch.float32, torch.bfloat16] if has_bf16 else [torch.float32]) * 2


def test_vllm_itself_multiplies_by_the_adapted_product() -> None:
    from vllm.model_executor.layers import utils

    ours = utils.cpu_unquantized_gemm.__module__ == matmul.__name__
    assert ours == (not torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_samplers_are_not_warmed_up() -> None:
    """vLLM 0.33's worker asks this setting; 0.32's warms nothing up on a CPU."""
    from vllm.config import KernelConfig
    from vllm.v1.worker.cpu_worker import CPUWorker

    kernels = KernelConfig(enable_jit_warmup=True)
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(kernel_config=kernels),
        model_runner=SimpleNamespace(kv_caches=["a layer's"]),
        use_v2_model_runner=True,
        model_config=SimpleNamespace(seed=0),
        parallel_config=SimpleNamespace(data_parallel_index=0),
        compilation_config=SimpleNamespace(compilation_time=0.0, encoder_compilation_time=0.0),
    )
    CPUWorker.compile_or_warm_up_model(worker)
    assert not kernels.enable_jit_warmup
