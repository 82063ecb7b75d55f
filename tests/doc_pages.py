"""Takes the documentation's pages apart: prose, code, and what the code blocks are marked with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ASSIGNMENT = re.compile(r"\w+=\S*")
# Before a block of commands: why nothing runs it, or what does; one without a mark is run as it stands.
MARK = re.compile(r"<!-- (not run|run by): (.+) -->")
PROGRAMS = {
    "vllm",
    "hybridkv",
    "python",
    "python3",
    "pip",
    "make",
    "bash",
    "docker",
    "kubectl",
    "curl",
    "for",
}


class Block(NamedTuple):
    """A code block.

    Attributes:
        lines: without the indentation.
        mark: the comment before it, without its brackets.
    """

    lines: list[str]
    mark: str | None

    @property
    def text(self) -> str:
        """As a shell would read it."""
        return "\n".join(self.lines) + "\n"

    @property
    def is_commands(self) -> bool:
        """Whether a line of it begins with a program."""
        found = [words(line) for line in self.lines]
        return any(line and line[0] in PROGRAMS for line in found)


class Page(NamedTuple):
    """A page in parts.

    Attributes:
        prose: lines outside of code blocks.
        blocks: code blocks in their order.
    """

    prose: list[str]
    blocks: list[Block]

    @property
    def code(self) -> list[str]:
        """The lines of all blocks, those that a backslash continues put together."""
        lines: list[str] = []
        for block in self.blocks:
            continued = False
            for line in block.lines:
                if continued:
                    lines[-1] = lines[-1].removesuffix("\\") + line
                else:
                    lines.append(line)
                continued = line.endswith("\\")
        return lines


def read(name: str) -> Page:
    """Takes a page apart: blocks are fenced, or indented by four after an empty line."""
    prose: list[str] = []
    blocks: list[Block] = []
    fenced = inside = False
    previous = ""
    for line in (ROOT / name).read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            inside = False
            continue
        goes_on = inside and not line.strip()
        starts = line.startswith("    ") and not previous.strip()
        if fenced or (inside and line.startswith("    ")) or goes_on or starts:
            if not inside:
                said = next((said for said in reversed(prose) if said.strip()), "")
                mark = MARK.fullmatch(said.strip())
                blocks.append(Block([], mark and f"{mark[1]}: {mark[2]}"))
            inside = True
            blocks[-1].lines.append(line)
        else:
            inside = False
            prose.append(line)
        previous = line
    return Page(prose, [_tidy(block) for block in blocks])


def _tidy(block: Block) -> Block:
    """Without indentation, and without empty lines at the end."""
    lines = list(block.lines)
    while lines and not lines[-1].strip():
        lines.pop()
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return block._replace(lines=[line[margin:] for line in lines])


def words(line: str) -> list[str]:
    """The words of a command, without what is set before it."""
    try:
        found = shlex.split(line, comments=True)
    except ValueError:  # A quoted text that goes on in the next line.
        found = line.split()
    while found and ASSIGNMENT.fullmatch(found[0]):
        del found[0]
    return found
