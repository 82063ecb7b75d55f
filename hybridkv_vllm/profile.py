"""What `hybridkv calibrate` found out about a model's KV heads, as a file that a server can be given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hybridkv_vllm.errors import HybridKVConfigError

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class HeadProfile(BaseModel):
    """How much each KV head's target moves while a model answers.

    Attributes:
        model: as it was named to the command.
        tasks: of the suite, on whose prompts the heads were watched.
        tokens: about the length of a prompt.
        prompts: how many there were.
        share: of a prompt's tokens that a pruned head would have kept.
        moving: `[layers][KV heads]`, share of a decode step's attention that pruning by the prompt loses and
            choosing anew at each step does not; mean over steps, prompts and tasks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    tasks: list[str]
    tokens: int
    prompts: int
    share: Share
    moving: list[Annotated[list[Share], Field(min_length=1)]] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_rectangular(self) -> Self:
        if len({len(layer) for layer in self.moving}) > 1:
            raise ValueError("'moving' has layers of different numbers of KV heads")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads of the whole model."""
        return len(self.moving), len(self.moving[0])

    def figures(self, layers: Sequence[int], heads: range) -> list[list[float]]:
        """What stands for a classifier's figure, for a rank's layers and heads: 1 less what moves."""
        return [[1 - self.moving[layer][head] for head in heads] for layer in layers]


def read_profile(path: Path, layers: int, kv_heads: int) -> HeadProfile:
    """Reads a profile for a model of so many layers and KV heads.

    Raises:
        HybridKVConfigError: the file cannot be read, is no profile, or is of another shape of model.
    """
    remedy = "give --additional-config.hybridkv.profile a file that `hybridkv calibrate MODEL` wrote"
    try:
        profile = HeadProfile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise HybridKVConfigError(f"profile {path} cannot be read ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise HybridKVConfigError(f"{path} is no profile ({where}: {first['msg']}); {remedy}") from None
    if profile.shape != (layers, kv_heads):
        raise HybridKVConfigError(
            f"profile {path} is of {profile.model}, with {profile.shape[0]} layers of {profile.shape[1]} "
            f"KV heads, but this model has {layers} of {kv_heads}; {remedy}"
        )
    return profile
