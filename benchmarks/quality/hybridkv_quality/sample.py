"""One question about a conversation with pictures, and what counts as its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One message of a chat: text and pictures in the order in which the model reads them."""

    role: Role
    parts: tuple[str | Image.Image, ...]


@dataclass(frozen=True)
class Sample:
    """A conversation that ends with a question, and the answer to it.

    Attributes:
        task: name in the results.
        name: unlike that of any other sample of the task.
        messages: the last one is the user's.
        answer: the right answer. For suite tasks, words with one space between them.
        context: samples with the same value begin with the same messages' content, so asking one after the
            other lets the prefix cache serve them. The unit of resampling for intervals.
        metric: `words`: the answer's words, in order, nothing after them; `contains`: they stand somewhere in
            the output; `choice`: the letter of an option; `rouge`: ROUGE-L F of the words.
        max_tokens: room for the model's answer.
        choices: options of a multiple-choice question, in the order of their letters.
    """

    task: str
    name: str
    messages: tuple[Message, ...]
    answer: str
    context: str
    metric: Literal["words", "contains", "choice", "rouge"] = "words"
    max_tokens: int = 32
    choices: Sequence[str] = field(default=())
