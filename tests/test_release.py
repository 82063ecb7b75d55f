"""What is released: the source distribution makes the wheel, and the wheel works where the tree is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hybridkv_vllm import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
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
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "tools", "deploy")]


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0] == f"hybridkv_vllm-{__version__}.dist-info"}
    assert names - metadata == shipped_files()
    assert {"hybridkv_vllm/py.typed", "hybridkv_quality/model/model.safetensors"} < names
    assert f"hybridkv_vllm-{__version__}.dist-info/licenses/LICENSE" in metadata


def test_the_wheel_works_where_the_tree_is_not(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    command = [sys.executable, "-m", "pip", f"--python={environment / 'bin' / 'python'}", "install"]
    subprocess.run([*command, "-q", "--no-deps", "--no-index", wheel], check=True, timeout=120)
    # torch and vLLM come from here. A path in a .pth file is not searched for further .pth files, and those
    # are what makes an editable install of the tree importable.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def run(*arguments: str | Path) -> str:
        return subprocess.run(
            [environment / "bin" / arguments[0], *arguments[1:]],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=240,
        ).stdout

    assert run("hybridkv", "--version").strip() == __version__
    found = json.loads(run("python", "-I", "-c", INSTALLED).splitlines()[-1])
    assert all(Path(file).is_relative_to(site) for file in found["files"])
    assert found["entry_points"] == {
        "console_scripts": "main",
        "vllm.endpoint_plugins": "HybridKVEndpoints",
        "vllm.general_plugins": "register",
    }
    assert "config.json" in found["model"]
    assert found["metadata"]["Version"] == __version__
    assert found["metadata"]["License-Expression"] == "Apache-2.0"
