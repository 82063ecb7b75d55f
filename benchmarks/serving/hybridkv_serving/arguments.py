"""Arguments that are lists, as argparse's `type` reads them: a typo ends the command before it starts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def whole_numbers(text: str) -> list[int]:
    """Numbers with commas between them, each once.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers with commas, such as 1,32") from None


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """What reads names with commas between them, each once, and refuses unknown ones."""

    def names(text: str) -> list[str]:
        given = list(dict.fromkeys(text.split(",")))
        if unknown := sorted(set(given) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)} (known: {', '.join(known)})")
        return given

    return names
