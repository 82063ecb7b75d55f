"""What a child process tells its parent, one JSON object a line."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from hybridkv_quality.records import HeadsExample, Record


class Message(BaseModel):
    """The engine is ready, an answer, or how a prompt's heads were judged."""

    kind: Literal["ready", "record", "heads"]
    record: Record | None = None
    heads: HeadsExample | None = None
