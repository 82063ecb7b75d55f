"""What the documentation names exists: links, anchors, commands, flags, options, targets, metrics, tests."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import ROOT, Block, Page, read, words

from hybridkv_vllm.cli import build_parser
from hybridkv_vllm.config import RequestOptions, ServerOptions
from hybridkv_vllm.observe.metrics import METRICS

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
QUICK_START = "docs/quick-start.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"--additional-config\.hybridkv\.([a-z_]+)")
OURS = re.compile(r"\bhybridkv_[a-z0-9_]*[a-z0-9]\b")
TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")


def commands(page: Page) -> Iterator[list[str]]:
    """Every command, in code blocks and between backticks."""
    for line in (*page.code, *(span for prose in page.prose for span in SPAN.findall(prose))):
        if found := words(line):
            yield found


def anchors(name: str) -> set[str]:
    """What a link may add to a page's name: its headings, as GitHub writes them."""
    headings = [line.lstrip("#").strip() for line in read(name).prose if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """The parsers below `hybridkv`."""
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def script_flags(script: Path) -> set[str]:
    """Flags that a script's parser takes, read from its source: importing it would load torch."""
    return {
        argument.value
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }


def flags(arguments: list[str]) -> set[str]:
    """The flags among a command's words."""
    return {word.partition("=")[0] for word in arguments if word.startswith("--")}


def problem(command: list[str]) -> str | None:
    """What a command names that does not exist; None if all does, or it is none of ours."""
    program, *rest = command
    if program == "hybridkv" and rest:
        if rest[0] in subcommands():
            unknown = flags(rest) - set(subcommands()[rest[0]]._option_string_actions)
        else:
            unknown = {rest[0]} - set(build_parser()._option_string_actions)
        return f"hybridkv has no {sorted(unknown)}" if unknown else None
    if program in ("python", "python3", "bash") and rest and rest[0].endswith((".py", ".sh")):
        script = ROOT / rest[0]
        if not script.is_file():
            return f"there is no {rest[0]}"
        unknown = flags(rest) - script_flags(script) if script.suffix == ".py" else set()
        return f"{rest[0]} has no {sorted(unknown)}" if unknown else None
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = {word for word in rest if "=" not in word} - set(targets)
        return f"make has no {sorted(unknown)}" if unknown else None
    return None


@pytest.mark.parametrize("name", PAGES)
def test_links_and_anchors_lead_somewhere(name: str) -> None:
    broken = []
    for target in LINK.findall("\n".join(read(name).prose)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        if not found.exists() or (anchor and anchor not in anchors(str(found.resolve().relative_to(ROOT)))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_their_flags_exist(name: str) -> None:
    assert not [said for command in commands(read(name)) if (said := problem(command))]


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_commands_runs_or_is_marked(name: str, tmp_path: Path) -> None:
    """Those of the quick start are run by tests/test_release.py, in their order."""
    for block in filter(lambda block: block.is_commands, read(name).blocks):
        if block.mark is not None:
            for path in re.findall(r"[\w./]+\.py|\.ci/run", block.mark):
                assert (ROOT / path).is_file(), path
        elif name != QUICK_START:
            done = run(block, tmp_path)
            assert done.returncode == 0, f"{block.text}{done.stderr}"


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a block as a user would, who is in this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euc", block.text],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", PAGES)
def test_options_and_metrics_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    assert set(OPTION.findall(text)) <= set(ServerOptions.model_fields)
    ends = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    known = {
        *RequestOptions.model_fields,
        *METRICS,
        *(name + end for name, metric in METRICS.items() for end in ends.get(metric.kind, ())),
        *(name for group in project["project"]["entry-points"].values() for name in group),
        *project["tool"]["setuptools"]["package-dir"],
        *(path.stem for path in (ROOT / "hybridkv_vllm").rglob("hybridkv_*.py")),
    }
    assert set(OURS.findall(text)) - known == set()


def test_the_checks_see_what_is_wrong() -> None:
    assert problem(["hybridkv", "eval", "--budgest", "0.1"]) == "hybridkv has no ['--budgest']"
    assert problem(["hybridkv", "cure"]) == "hybridkv has no ['cure']"
    assert problem(["python", "benchmarks/serve.py", "--model", "m", "--clints=1"]) is not None
    assert problem(["python", "benchmarks/nothing.py"]) == "there is no benchmarks/nothing.py"
    assert problem(["make", "test", "coffee", "PYTHON=python3.11"]) == "make has no ['coffee']"
    assert problem(["hybridkv", "doctor", "--json"]) is None
    assert words("A=1 B= hybridkv plan --model m  # why") == ["hybridkv", "plan", "--model", "m"]
    assert anchors("docs/operations.md") >= {"messages-and-remedies", "without-a-gpu"}


def test_every_test_that_compatibility_names_exists() -> None:
    named = TEST.findall((ROOT / "docs" / "compatibility.md").read_text())
    assert named
    for path, function in named:
        defined = {
            n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)
        }
        assert not function or function in defined, f"{path}::{function}"


def test_every_refusal_is_in_compatibility() -> None:
    """By a name that its condition looks at, or a flag that its remedy gives; words are left free."""
    _, refused = (ROOT / "docs" / "compatibility.md").read_text().split("## Refused")
    # Of every row, what stands before the test's name.
    rows = [line.split("|")[1:3] for line in refused.splitlines() if line.startswith("| ")]
    mentioned = {key for row in rows for span in SPAN.findall(" ".join(row)) for key in keys(span)}
    tree = ast.parse((ROOT / "hybridkv_vllm" / "startup.py").read_text())
    refusals = [
        node
        for function in tree.body
        if isinstance(function, ast.FunctionDef) and function.name.endswith("_problems")
        for node in ast.walk(function)
        if isinstance(node, ast.If)
    ]
    assert len(refusals) > 20
    missing = [ast.unparse(node.test) for node in refusals if not keys(ast.unparse(node)) & mentioned]
    assert not missing


def keys(text: str) -> set[str]:
    """Names of several words, with flags as vLLM's attributes are called: `--block-size` is `block_size`."""
    return {key for key in re.findall(r"\w+", re.sub(r"(?<=\w)-(?=\w)", "_", text)) if "_" in key}
