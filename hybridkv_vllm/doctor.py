"""Looks at the environment and says, for each thing a server needs, what it found and what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from hybridkv_vllm.errors import HybridKVConfigError

VLLM_VERSIONS = ((0, 32), (0, 34))
ENDPOINT_PLUGIN = "hybridkv_api"
PLUGIN = "hybridkv"


class Finding(NamedTuple):
    """One thing looked at.

    Attributes:
        subject: what was looked at.
        status: `ok`; `note`, works but worth knowing; `problem`, a server would not start or not compress.
        found: what is there.
        remedy: what to do; empty where nothing is needed.
    """

    subject: str
    status: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", version)
    return Finding("python", "problem", version, "use Python 3.11, 3.12 or 3.13")


def _vllm() -> Finding:
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "vllm", "problem", "not installed", "pip install 'hybridkv-vllm[gpu]', or make setup on a CPU"
        )
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    low, high = VLLM_VERSIONS
    if low <= release < high:
        return Finding("vllm", "ok", version)
    remedy = f"install vllm >= {low[0]}.{low[1]}, < {high[0]}.{high[1]}"
    return Finding("vllm", "problem", version, remedy)


def _torch() -> Finding:
    try:
        import torch
    except ModuleNotFoundError:
        return Finding(
            "torch", "problem", "not installed", "pip install 'hybridkv-vllm[gpu]', or make setup on a CPU"
        )
    return Finding("torch", "ok", torch.__version__)


def _triton() -> Finding:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding("triton", "problem", "not installed", "pip install triton (Model Runner V2 needs it)")
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        return Finding(
            "triton",
            "problem",
            f"{version}, but vLLM calls it unusable",
            "on a GPU check the driver; on a CPU run make setup, which installs the CPU harness",
        )
    interpreted = " (interpreted)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return Finding("triton", "ok", version + interpreted)


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = f"{properties.name}, sm_{properties.major}{properties.minor}"
        if properties.major < 8:
            return Finding("device", "problem", found, "use a GPU of compute capability 8.0 or later")
        return Finding("device", "ok", found)
    return Finding("device", "note", "CPU", "fine for trying and testing; for speed use an NVIDIA GPU")


def _host_memory() -> Finding:
    from hybridkv_vllm.worker.host_tier import GIB, node_share

    share = f"up to {node_share() / GIB:.1f} GiB"
    return Finding("host memory", "ok", f"{share} by default for dynamic heads, all ranks together")


def _harness() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("cpu harness", "ok", "not needed with a GPU")
    try:
        importlib.import_module("hybridkv_cpu_harness")
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        return Finding("cpu harness", "problem", f"{type(error).__name__}: {error}", "run make setup")
    return Finding("cpu harness", "ok", "installed")


def _runner() -> Finding:
    chosen = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    # vLLM reads a number, and nothing else.
    if chosen is not None and (not chosen.strip().isdecimal() or int(chosen) == 0):
        return Finding(
            "model runner",
            "problem",
            f"VLLM_USE_V2_MODEL_RUNNER={chosen}",
            "unset VLLM_USE_V2_MODEL_RUNNER or set it to 1",
        )
    return Finding("model runner", "ok", "V2")


def _plugin() -> Finding:
    names = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if PLUGIN not in names:
        return Finding("plugin", "problem", "entry point missing", "pip install hybridkv-vllm (or -e .)")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return Finding(
            "plugin",
            "problem",
            f"left out by VLLM_PLUGINS={allowed}",
            f"add it: VLLM_PLUGINS={','.join(filter(None, (allowed, PLUGIN)))}",
        )
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    try:
        load_general_plugins()
    except HybridKVConfigError as refusal:
        found, _, remedy = str(refusal).rpartition("; ")
        return Finding("plugin", "problem", found, remedy)
    try:
        path = AttentionBackendEnum["HYBRIDKV"].get_path()
    except ValueError as error:
        return Finding("plugin", "problem", str(error), "see the log above for why the plugin did not load")
    return Finding("plugin", "ok", f"--attention-backend hybridkv -> {path}")


def _endpoints() -> Finding:
    allowed = [name for name in (os.environ.get("VLLM_PLUGINS") or "").split(",") if name]
    if ENDPOINT_PLUGIN in allowed:
        return Finding(
            "http routes",
            "ok",
            "/hybridkv, /hybridkv/stats, /hybridkv/heads, /hybridkv/requests",
        )
    wanted = ",".join(dict.fromkeys((*allowed, PLUGIN, ENDPOINT_PLUGIN)))
    return Finding("http routes", "note", "off", f"to have them, start with VLLM_PLUGINS={wanted}")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _torch,
    _vllm,
    _triton,
    _device,
    _host_memory,
    _harness,
    _runner,
    _plugin,
    _endpoints,
)


def examine() -> list[Finding]:
    """Looks at everything; a check that fails in an unforeseen way is itself a finding."""
    findings = []
    for check in CHECKS:
        try:
            findings.append(check())
        except Exception as error:
            name = check.__name__.strip("_").replace("_", " ")
            findings.append(
                Finding(name, "problem", f"{type(error).__name__}: {error}", "reinstall it (make setup)")
            )
    return findings


def findings_table(findings: list[Finding]) -> Table:
    """The findings for a terminal."""
    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table("", "what", "found", "what to do")
    for finding in findings:
        mark = Text(finding.status, colours[finding.status])
        # As they are: rich would take a [gpu] in a string for markup.
        table.add_row(mark, *map(Text, (finding.subject, finding.found, finding.remedy)))
    return table
