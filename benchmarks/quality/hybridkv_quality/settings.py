"""What a run was asked for, and which of it decides whether old answers can be kept."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hybridkv_vllm.errors import HybridKVConfigError

FULL = "full"
# What a server without HybridKV is called in the results.
AS_SERVED = "as served"
# Prompts of all lengths are compressed, unless an option says otherwise.
MIN_PROMPT_TOKENS = 256


class EvalError(Exception):
    """A run that cannot start, or go on; the message is for the user and names the remedy."""


class UsageError(EvalError):
    """Arguments that fit nothing; found before anything is started."""


class LinesDamaged(UsageError):
    """A file of records holds a line that no run has written."""


class SuiteSource(BaseModel):
    """The suite that ships with this package."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["suite"] = "suite"
    tasks: tuple[str, ...] | None = None
    tokens: int = Field(default=2048, ge=1)
    contexts: int = Field(default=20, ge=1)
    seed: int = 0


class FolderSource(BaseModel):
    """Questions in a folder, in a layout that others have made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["milebench", "lmms-eval", "jsonl"]
    folder: Path
    tasks: tuple[str, ...] | None = None


Source = SuiteSource | FolderSource


class EngineSettings(BaseModel):
    """How the engine in this machine is started, the same for every policy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    dtype: str = "auto"
    options: dict[str, Any] = Field(
        default_factory=dict, description="HybridKV's, without policy and budget."
    )
    max_model_len: int | None = Field(default=None, ge=1)
    concurrency: int = Field(default=16, ge=1)
    threads: int = Field(default=1, ge=1, description="Torch threads on a CPU.")
    seed: int = 0


class EngineJob(BaseModel):
    """What one child process does: the questions not answered yet, under one policy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source = Field(discriminator="kind")
    engine: EngineSettings
    policy: str
    budgets: tuple[float, ...]
    configuration: str
    done: frozenset[tuple[str, str, float]] = Field(description="(task, sample, budget) with a record.")
    most_pictures: int = Field(ge=0, description="In any one prompt.")


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """HybridKV's server options in their own types.

    Raises:
        UsageError: an option that HybridKV does not know, or a value out of range.
    """
    from hybridkv_vllm.config import parse_server_options

    try:
        values = parse_server_options(options).model_dump()
    except HybridKVConfigError as error:
        reason, _, _ = str(error).removeprefix("hybridkv: ").rpartition("; ")
        raise UsageError(f"--option: {reason}") from None
    return {name: values[name] for name in options}


def server_options(policy: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the server of one policy is given."""
    return {"min_prompt_tokens": MIN_PROMPT_TOKENS, **options, "policy": policy}


def digest(configuration: Mapping[str, Any]) -> str:
    """Short name of a configuration: the same for equal ones."""
    text = json.dumps(configuration, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_folder(out: Path) -> None:
    """Makes the folder if it is missing.

    Raises:
        UsageError: it is a file, or there can be no folder.
    """
    with writing(out, UsageError, "name another folder"):
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file; name a folder")
        out.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(out: Path, error_type: type[EvalError], remedy: str) -> Iterator[None]:
    """Names the folder where its files cannot be read or written: no permission, a full disk."""
    try:
        yield
    except OSError as error:
        raise error_type(f"--out {out} cannot be written: {error}; {remedy}") from None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second run off the folder, which would ask for and write down the same answers.

    Raises:
        UsageError: another run has it.
    """
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UsageError(
            f"--out {out} is in use by another run; wait for its end, or name another folder"
        ) from None
    except OSError:
        # A network file system that locks no folders: there a run goes on unguarded.
        pass
    try:
        yield
    finally:
        os.close(folder)


def claim_folder(out: Path, configuration: Mapping[str, Any]) -> str:
    """Makes the folder this configuration's, or checks that it is.

    Answers of one folder are compared with each other, so a folder holds one configuration only.

    Returns:
        The configuration's digest.

    Raises:
        UsageError: the folder is another configuration's, or no folder.
    """
    make_folder(out)
    wanted = json.loads(json.dumps(configuration, default=str))
    file = out / "configuration.json"
    if not file.exists():
        if any(out.iterdir()):
            raise UsageError(f"--out {out} holds something else than an evaluation; name a new folder")
        file.write_text(json.dumps(wanted, indent=2) + "\n")
        return digest(wanted)
    try:
        found = json.loads(file.read_text())
    except (ValueError, IsADirectoryError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{file} is damaged; name a new folder with --out")
    changed = [
        f"{name} (there {found.get(name)!r}, now {wanted.get(name)!r})"
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name)
    ]
    if changed:
        raise UsageError(
            f"--out {out} holds answers of another configuration: {'; '.join(changed)}; they must not be "
            "mixed, name another folder, or repeat the arguments of that run"
        )
    return digest(wanted)
