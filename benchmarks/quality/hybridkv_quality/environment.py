"""What a result was measured with: versions, device, model, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from pydantic import BaseModel, Field

from hybridkv_quality.settings import UsageError

PACKAGES = (
    "vllm",
    "torch",
    "triton",
    "transformers",
    "numpy",
    "flashinfer-python",
    "xformers",
    "hybridkv-vllm",
)
# Weights up to here are read whole; of larger ones only names, sizes and headers.
HASHED_BYTES = 2**30
HEADER_BYTES = 2**16
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Environment(BaseModel):
    """Where and with what a run was made."""

    device: str
    cpus: int
    python: str
    versions: dict[str, str]
    commit: str | None = Field(description="Of this repository; null outside of one.")


def environment(device: str | None = None) -> Environment:
    """This machine's; `device` where the model runs elsewhere."""
    return Environment(
        device=device or _device(),
        cpus=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        versions={name: version for name in PACKAGES if (version := _version(name))},
        commit=_commit(),
    )


def model_digest(model: str) -> str | None:
    """Changes with the model's files: configuration, tokenizer and weights; None for a name on a hub.

    Raises:
        UsageError: neither a folder with a `config.json` nor such a name.
    """
    folder = Path(model)
    if not folder.is_dir():
        if _HUB_NAME.fullmatch(model) and not folder.exists():
            return None
        raise UsageError(
            f"--model {model} is no folder and no name on a hub; write one with hybridkv tiny-model"
        )
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {model} holds no config.json; name a model's folder")
    content = hashlib.sha256()
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix != ".md")
    whole = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    for file in files:
        content.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            content.update(opened.read() if whole else opened.read(HEADER_BYTES))
    return content.hexdigest()[:16]


def _device() -> str:
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip().splitlines()[0]
    return f"CPU ({platform.machine()})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    # Where the code has been copied to without its repository.
    if given := os.environ.get("HYBRIDKV_COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
