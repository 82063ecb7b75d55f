"""No policy ever waits for the device: shown on meta tensors, and on a GPU where there is one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from policy_cases import CASES, random_scores, recalls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridkv_vllm.policies import (
    CLASSIFIERS,
    POLICIES,
    Policy,
    PolicyOptions,
    PromptScores,
    Recall,
    Selection,
    get_policy,
)

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


def recalls_on(device: str, case: PromptScores, pages: int) -> list[Recall | None]:
    found = recalls(case, pages).values()
    return [recall and replace(recall, heads=recall.heads.to(device)) for recall in found]


def choose(
    policy: Policy, scores: PromptScores, pages: int, options: PolicyOptions, recall: Recall | None
) -> Selection:
    return policy.select(scores, policy.classify(scores, options), pages, options, recall)


@pytest.mark.parametrize("case", ["usual", "long", "window_is_prompt", "one_head"])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_stays_on_the_device(policy: str, classifier: str, case: str) -> None:
    options = PolicyOptions(classifier=classifier)
    scores = moved(CASES[case], "meta")
    most = scores.heads * scores.capacity
    for pages in (most,) if policy == "full" else (0, scores.heads, most // 2, most - 1, most):
        for recall in recalls_on("meta", scores, pages):
            with StaysOnDevice():
                selection = choose(get_policy(policy), scores, pages, options, recall)
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
@pytest.mark.parametrize("policy", POLICIES)
def test_gpu_gives_the_same_without_waiting(policy: str) -> None:
    case = random_scores(40, layers=4, heads=4, tokens=1000, window=64, visual=(100, 900))
    scores = moved(case, "cuda")
    pages = case.heads * case.capacity // (1 if policy == "full" else 4)
    options, chosen = PolicyOptions(), get_policy(policy)
    pairs = zip(recalls_on("cuda", case, pages), recalls_on("cpu", case, pages), strict=True)
    for there, here in pairs:
        choose(chosen, scores, pages, options, there)
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_gpu = choose(chosen, scores, pages, options, there)
            dest = on_gpu.dest()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        on_cpu = choose(chosen, case, pages, options, here)
        for name in ("keep", "lengths", "first_page", "pages", "recalled"):
            assert torch.equal(getattr(on_gpu, name).cpu(), getattr(on_cpu, name))
        assert torch.equal(dest.cpu(), on_cpu.dest())
