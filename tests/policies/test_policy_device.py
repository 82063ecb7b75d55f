"""No policy ever waits for the device: shown on meta tensors, and on a GPU where there is one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from policy_cases import CASES, random_scores
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridkv_vllm.policies import CLASSIFIERS, POLICIES, PolicyOptions, PromptScores, get_policy

# Operations whose result's shape, or whose answer to Python, needs the tensor's values.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}


class StaysOnDevice(TorchDispatchMode):
    """Fails on operations that wait for the device or touch a tensor elsewhere; `meta` stands for the device.

    A meta tensor has no values, so whatever needs one fails in any case.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING:
            raise AssertionError(f"{name} waits for the device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name.startswith("index") and any(leaf.dtype == torch.bool for leaf in tensors[1:]):
            raise AssertionError(f"{name} with a mask waits for the device")
        out = func(*args, **(kwargs or {}))
        tensors += [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for leaf in tensors:
            if leaf.device.type != "meta":
                raise AssertionError(f"{name} touches {leaf.device}")
        return out


def moved(case: PromptScores, device: str) -> PromptScores:
    fields = vars(case).items()
    return PromptScores(
        **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields}
    )


@pytest.mark.parametrize("case", ["usual", "window_is_prompt", "one_head"])
@pytest.mark.parametrize("tier", ["off", "host"])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_stays_on_the_device(policy: str, classifier: str, tier: str, case: str) -> None:
    options = PolicyOptions(classifier=classifier, dynamic_tier=tier)
    scores = moved(CASES[case], "meta")
    most = scores.heads * scores.capacity
    with StaysOnDevice():
        for pages in (most,) if policy == "full" else (0, scores.heads, most - 1, most):
            selection = get_policy(policy).select(scores, pages, options)
            assert selection.dest().shape == (*scores.mass.shape[:2], scores.compressible)


@pytest.mark.parametrize(
    "offence",
    [
        lambda mass: mass.sum().item(),
        lambda mass: bool(mass.sum() > 0),
        lambda mass: mass.cpu(),
        lambda mass: mass.nonzero(),
        lambda mass: mass[mass > 0],
        lambda mass: mass.masked_select(mass > 0),
        lambda mass: mass.view(-1)[mass.sum().long()],
        lambda mass: mass + torch.tensor(1.0),
        lambda mass: mass * torch.arange(16),
    ],
)
def test_the_check_sees_offences(offence: Callable[[Tensor], object]) -> None:
    mass = torch.empty(2, 3, 16, device="meta")
    with StaysOnDevice(), pytest.raises((AssertionError, NotImplementedError), match=r"waits|touches|meta"):
        offence(mass)


def test_importable_without_vllm() -> None:
    blocked = "import sys; sys.modules['vllm'] = None; import hybridkv_vllm.policies"
    subprocess.run([sys.executable, "-c", blocked], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tier", ["off", "host"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gpu_gives_the_same_without_waiting(policy: str, tier: str) -> None:
    case = random_scores(40, layers=4, heads=4, tokens=1000, window=64, visual=(100, 900))
    scores = moved(case, "cuda")
    pages = case.heads * case.capacity // (1 if policy == "full" else 4)
    options = PolicyOptions(dynamic_tier=tier)
    get_policy(policy).select(scores, pages, options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = get_policy(policy).select(scores, pages, options)
        dest = on_gpu.dest()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = get_policy(policy).select(case, pages, options)
    assert torch.equal(on_gpu.keep.cpu(), on_cpu.keep)
    assert torch.equal(on_gpu.first_page.cpu(), on_cpu.first_page)
    assert torch.equal(dest.cpu(), on_cpu.dest())
