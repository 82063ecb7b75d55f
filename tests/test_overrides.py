"""What we override of vLLM's classes takes every call that vLLM makes: a new argument shows here first."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from inspect import Parameter
from typing import Any

import pytest

MODULES = (
    "attention.backend",
    "attention.builder",
    "attention.impl",
    "scheduling.manager",
    "scheduling.scheduler",
    "scheduling.spec",
    "worker.state",
)
POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
STARRED = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def overrides() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Name, our function and vLLM's, for each method that has both."""
    for name in MODULES:
        module = importlib.import_module(f"hybridkv_vllm.{name}")
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            bases = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
            for method, ours in inspect.getmembers(cls, callable):
                base = next((base for base in bases if method in vars(base)), None)
                if method in vars(cls) and base is not None and not method.startswith("__"):
                    yield f"{cls.__name__}.{method}", ours, getattr(base, method)


def missing(ours: Callable[..., Any], theirs: Callable[..., Any]) -> list[str]:
    """What a call that fits `theirs` may hold and `ours` does not take."""
    mine, wanted = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    kinds = {parameter.kind for parameter in mine.values()}
    places = [name for name, parameter in mine.items() if parameter.kind in POSITIONAL]
    problems = []
    for place, (name, parameter) in enumerate(wanted.items()):
        by_place = Parameter.VAR_POSITIONAL in kinds or places[place : place + 1] == [name]
        by_name = Parameter.VAR_KEYWORD in kinds or name in mine
        taken = {
            Parameter.POSITIONAL_ONLY: by_place,
            Parameter.POSITIONAL_OR_KEYWORD: by_place and by_name,
            Parameter.KEYWORD_ONLY: by_name,
        }.get(parameter.kind, parameter.kind in kinds)
        if not taken:
            problems.append(name)
    for name, parameter in mine.items():
        required = parameter.default is Parameter.empty and parameter.kind not in STARRED
        if required and name not in wanted:
            problems.append(name)
    return problems


OVERRIDES = list(overrides())


@pytest.mark.parametrize(
    ("ours", "theirs"), [pair for _, *pair in OVERRIDES], ids=[name for name, *_ in OVERRIDES]
)
def test_an_override_takes_what_vllm_passes(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """By place and by name."""
    assert not missing(ours, theirs)


def test_there_are_overrides_of_every_class() -> None:
    """The list above is not empty by mistake."""
    assert {name.split(".")[0] for name, *_ in OVERRIDES} == {
        "HybridKVBackend",
        "HybridKVImpl",
        "HybridKVManager",
        "HybridKVMetadataBuilder",
        "HybridKVModelState",
        "HybridKVScheduler",
        "HybridKVSpec",
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda self, a: None, lambda self, a, b=None: None),
        (lambda self, b, a: None, lambda self, a, b: None),
        (lambda self, a, c: None, lambda self, a: None),
        (lambda self, *rest: None, lambda self, a: None),
        (lambda self, a: None, lambda self, a, *, b=1: None),
        (lambda self, a: None, lambda self, a, **more: None),
    ],
)
def test_a_narrower_override_is_found(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """An argument more, another order, one that is never passed, a name, a keyword, any keyword."""
    assert missing(ours, theirs)
