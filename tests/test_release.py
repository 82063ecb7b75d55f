"""What is released: the source distribution makes the wheel, and the wheel works where the tree is not."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from doc_pages import ROOT, read

from hybridkv_vllm import __version__
from hybridkv_vllm.server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.server]

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
# Run in the new environment, away from the tree.
INSTALLED = """
import importlib.metadata, json, hybridkv_kernels, hybridkv_quality.model_path, hybridkv_vllm
distribution = importlib.metadata.distribution("hybridkv-vllm")
print(json.dumps({
    "files": [module.__file__ for module in (hybridkv_kernels, hybridkv_quality, hybridkv_vllm)],
    "model": sorted(path.name for path in hybridkv_quality.model_path.model_folder().iterdir()),
    "metadata": dict(distribution.metadata),
    "entry_points": {
        point.group: point.load().__name__
        for point in distribution.entry_points
    },
}))
"""


def shipped_files() -> set[str]:
    """All that the tree has in the three packages: code, type markers, the small model, the page."""
    return {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both distributions. `build` makes the wheel from the unpacked source distribution."""
    copy = tmp_path_factory.mktemp("release") / "tree"
    # A copy, because building leaves files behind, and takes up those of an earlier build.
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "gpu_check_out")
    shutil.copytree(ROOT, copy, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def test_the_source_distribution_is_what_the_wheel_is_made_of(dist: Path) -> None:
    (found,) = dist.glob("*.tar.gz")
    top = f"hybridkv_vllm-{__version__}"
    assert found.name == f"{top}.tar.gz"
    with tarfile.open(found) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    sources = {
        f"{FOLDERS[package]}/{rest}" for package, _, rest in (n.partition("/") for n in shipped_files())
    }
    assert sources <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md"} <= names
    pages = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".svg", ".png")]
    assert {str(path.relative_to(ROOT)) for path in pages} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "tools", "deploy")]


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0] == f"hybridkv_vllm-{__version__}.dist-info"}
    assert names - metadata == shipped_files()
    assert {"hybridkv_vllm/py.typed", "hybridkv_quality/model/model.safetensors"} < names
    assert f"hybridkv_vllm-{__version__}.dist-info/licenses/LICENSE" in metadata


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel beside vLLM."""
    folder = tmp_path_factory.mktemp("new") / "venv"
    venv.create(folder)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    command = [sys.executable, "-m", "pip", f"--python={folder / 'bin' / 'python'}", "install"]
    subprocess.run([*command, "-q", "--no-deps", "--no-index", wheel], check=True, timeout=120)
    # torch and vLLM come from here. A path in a .pth file is not searched for further .pth files, and those
    # are what makes an editable install of the tree importable; only the CPU harness's is wanted.
    lines = [sysconfig.get_path("purelib")]
    if importlib.util.find_spec("hybridkv_cpu_harness") is not None:
        lines.append("import hybridkv_cpu_harness")
    (site / "dependencies.pth").write_text("\n".join(lines) + "\n")
    vllm = folder / "bin" / "vllm"
    vllm.write_text(f'#!/bin/sh\nexec {folder}/bin/python -m vllm.entrypoints.cli.main "$@"\n')
    vllm.chmod(0o755)
    return folder


def shell(environment: Path) -> dict[str, str]:
    """Variables of a user's shell in which the environment is active."""
    # What tests in this process, and engines of theirs, have set for themselves.
    own = ("PYTHONPATH", "VLLM_LOGGING_LEVEL", "VLLM_ENABLE_V1_MULTIPROCESSING", "HYBRIDKV_METRICS_DIR")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return {**inherited, "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def run(environment: Path, folder: Path, command: str) -> str:
    """Output of a command in that shell."""
    return subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=shell(environment),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    ).stdout


def test_the_wheel_works_where_the_tree_is_not(environment: Path, tmp_path: Path) -> None:
    assert run(environment, tmp_path, "hybridkv --version").strip() == __version__
    (tmp_path / "installed.py").write_text(INSTALLED)
    found = json.loads(run(environment, tmp_path, "python -I installed.py").splitlines()[-1])
    assert all(Path(file).is_relative_to(environment) for file in found["files"])
    assert found["entry_points"] == {
        "console_scripts": "main",
        "vllm.endpoint_plugins": "HybridKVEndpoints",
        "vllm.general_plugins": "register",
    }
    assert "config.json" in found["model"]
    assert found["metadata"]["Version"] == __version__
    assert found["metadata"]["License-Expression"] == "Apache-2.0"


def test_the_quick_start_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    """Block after block as a new user would type them, but for the port and the length of the load."""
    page, port = read("docs/quick-start.md"), free_port()
    here = {"localhost:8000": f"localhost:{port}", "contexts=64": "contexts=4"}

    def typed(text: str) -> str:
        return functools.reduce(lambda changed, change: changed.replace(*change), here.items(), text)

    printed: list[str] = []
    compressed: list[int] = []
    with ExitStack() as running:
        for block in page.blocks:
            if not block.is_commands or block.mark is not None:
                continue
            if "vllm serve" in block.text:
                command = f"{block.text.rstrip()} --port {port}"
                running.enter_context(in_background(command, environment, tmp_path, port))
            else:
                printed.append(run(environment, tmp_path, typed(block.text)))
            if len(printed) > 1:
                stats = httpx.get(f"http://localhost:{port}/hybridkv/stats").json()
                compressed.append(stats["requests_compressed"])
        for command in re.findall(r"`(hybridkv (?:inspect|plan) [^`]+)`", "\n".join(page.prose)):
            run(environment, tmp_path, typed(command))
        assert "<title>HybridKV</title>" in httpx.get(f"http://localhost:{port}/hybridkv").text
    answer = next(n + 1 for n, block in enumerate(page.blocks) if "first-picture.png" in block.text)
    assert printed[1].split() == page.blocks[answer].text.split()
    assert compressed[0] == 1 < compressed[1], "nothing moved under load"
    assert "hybridkv_requests_compressed_total" in printed[-1]
    for name in ("first-picture.png", "heads.png"):
        assert (tmp_path / name).stat().st_size > 1000


@contextmanager
def in_background(command: str, environment: Path, folder: Path, port: int) -> Iterator[None]:
    """A server that a user leaves running in another shell."""
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            ["bash", "-euc", command],
            cwd=folder,
            env=shell(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while not is_healthy(port):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def is_healthy(port: int) -> bool:
    """Whether the server answers."""
    try:
        return httpx.get(f"http://localhost:{port}/health", timeout=2).is_success
    except httpx.TransportError:
        return False
