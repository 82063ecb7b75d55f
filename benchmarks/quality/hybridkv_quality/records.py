"""What is written down of every answer, one JSON line each, so that a run can stop and go on anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Generic, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybridkv_quality.sample import Sample
from hybridkv_quality.scoring import score, word_hits
from hybridkv_quality.settings import LinesDamaged
from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.observe.heads import RequestHeads
from hybridkv_vllm.plan import ceil_pages

Metric = Literal["words", "contains", "choice", "rouge"]
Line = TypeVar("Line", bound=BaseModel)


class AnswerKey(NamedTuple):
    """What an answer is an answer to, and how it was got; one record each.

    Attributes:
        budget: share of the prompt's KV cache; None where a server decided for itself.
    """

    task: str
    sample: str
    policy: str
    budget: float | None


class Record(BaseModel):
    """One answer: its score, and the memory that its prompt held while it was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    configuration: str = Field(description="Digest of what the run's folder was made with.")
    task: str
    sample: str = Field(description="The sample's name, unique within its task.")
    context: str = Field(description="What several questions share; the unit of the bootstrap.")
    policy: str
    budget: float | None
    metric: Metric
    answer: str = Field(description="The right answer.")
    output: str = Field(description="The model's answer.")
    score: float = Field(ge=0, le=1)
    word_hits: list[bool] = Field(description="For each word of the answer whether the output has it there.")
    prompt_tokens: int
    cached_tokens: int | None = Field(description="Prompt tokens that the prefix cache served.")
    output_tokens: int
    compressed: bool | None = Field(
        description="Whether the prompt was compressed; null where that could not be seen."
    )
    blocks_full: int = Field(description="Blocks that the prompt takes uncompressed, ceil(T / 16).")
    blocks_held: int | None = Field(
        description="Blocks that the prompt held while the answer was decoded: its arena and what is left of "
        "its own. Null where nothing was decoded after the first token, or it could not be seen."
    )
    block_bytes: int | None = Field(description="Bytes of one block, over all layers and KV heads.")
    recalled_share: float | None = Field(description="Share of the KV heads that recall chunks.")
    host_bytes: int | None = Field(description="Bytes of the prompt's chunks in host memory.")

    @classmethod
    def of(
        cls, sample: Sample, output: str, *, prompt_tokens: int, block_bytes: int | None, **more: Any
    ) -> Self:
        """The record of one answer, scored.

        Args:
            output: what the model said.
            more: the other fields, but for those that follow from the sample and the prompt's length.
        """
        return cls(
            task=sample.task,
            sample=sample.name,
            context=sample.context,
            metric=sample.metric,
            answer=sample.answer,
            output=output,
            score=score(output, sample),
            word_hits=word_hits(output, sample.answer) if sample.metric == "words" else [],
            prompt_tokens=prompt_tokens,
            blocks_full=ceil_pages(prompt_tokens),
            block_bytes=block_bytes,
            **more,
        )

    @property
    def key(self) -> AnswerKey:
        return AnswerKey(self.task, self.sample, self.policy, self.budget)

    @property
    def held_share(self) -> float | None:
        """Blocks held, as a share of the blocks that the prompt takes uncompressed."""
        return None if self.blocks_held is None else self.blocks_held / self.blocks_full

    @property
    def held_bytes(self) -> int | None:
        """Bytes of the blocks held."""
        if self.blocks_held is None or self.block_bytes is None:
            return None
        return self.blocks_held * self.block_bytes


class HeadsExample(BaseModel):
    """How the KV heads of one prompt were judged, kept for one prompt of each task, policy and budget."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    sample: str
    policy: str
    budget: float | None
    classifier: str
    theta: float
    heads: RequestHeads

    @classmethod
    def of(
        cls, sample: Sample, policy: str, budget: float | None, options: ServerOptions, heads: RequestHeads
    ) -> Self:
        """How the heads of a sample's prompt were judged under the server's options."""
        return cls(
            task=sample.task,
            sample=sample.name,
            policy=policy,
            budget=budget,
            classifier=options.classifier_name,
            theta=options.theta,
            heads=heads,
        )


class JsonLines(Generic[Line]):
    """A file with one model a line, appended and flushed line by line.

    A last line without its end (the run was killed while writing) is dropped, and its place used again.
    """

    def __init__(self, path: Path, line_type: type[Line]) -> None:
        self.path = path
        self._line_type = line_type
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._drop_torn_line()
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            # What a full disk left of the last line; `append` has said so.
            with suppress(OSError):
                self._file.close()
            self._file = None

    def append(self, line: Line) -> None:
        """Writes a line through to the file (open it with `with` first)."""
        if self._file is None:
            raise RuntimeError(f"{self.path} is not open for writing")
        self._file.write(line.model_dump_json().encode() + b"\n")
        self._file.flush()

    def read(self) -> Iterator[Line]:
        """All whole lines.

        Raises:
            LinesDamaged: a whole line that is not one of these models.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield self._line_type.model_validate_json(line)
                except ValidationError as error:
                    reason = error.errors()[0]["msg"]
                    raise LinesDamaged(
                        f"{self.path}, line {number}, is no record of this version ({reason}); delete the "
                        "line, or start again in another --out"
                    ) from None

    def _drop_torn_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
