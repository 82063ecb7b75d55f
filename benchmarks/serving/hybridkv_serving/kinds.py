"""The kinds of conversation that servers are compared by."""

from typing import Literal

Kind = Literal["images", "video", "chat"]
KINDS: tuple[Kind, ...] = ("images", "video", "chat")
