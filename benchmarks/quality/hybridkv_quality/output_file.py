"""Whether a command's `--out` can be written, seen before the work."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile


def check_writable(out: Path) -> None:
    """Sees that the file can be written, before minutes are spent on what is to be in it.

    Raises:
        ValueError: it is a folder, or cannot be written.
    """
    try:
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder; name a file in it")
        if not out.exists():
            # Folders that are missing are made in the end.
            with TemporaryFile(dir=next(folder for folder in out.absolute().parents if folder.exists())):
                return
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error}); name another file") from None
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out} may not be written; name another file")
