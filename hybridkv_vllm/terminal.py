"""Standard output of the commands: wide enough in a file, and foreign names shown as they are."""

from __future__ import annotations

from rich.console import Console

# Of tables in a file or a pipe.
FILE_WIDTH = 180


def standard_output() -> Console:
    """As wide as the terminal, or as every table where there is none.

    Names of models, folders and tasks appear as they are: rich would take a [b] in them for markup.
    """
    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(width=FILE_WIDTH, markup=False, emoji=False)
