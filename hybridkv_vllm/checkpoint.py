"""What a local model's weights take, by the headers of its safetensors files; imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

INDEX = "model.safetensors.index.json"
# Loaded in the model's own type, whatever the file has.
FLOATS = {"F64", "F32", "F16", "BF16"}
OUTSIDE = re.compile(r"vis(ion|ual)|projector|audio|image_newline|^(mlp1|vpm|resampler|vit)\.")
EMBEDDING = re.compile(r"embed_tokens|wte|tok_embeddings")
EXPERTS = re.compile(r"\.experts\.")
LONGEST_HEADER = 100_000_000  # The format's own limit, bytes.


class _Tensor(BaseModel):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]

    def loaded_bytes(self, itemsize: int) -> int:
        begin, end = self.data_offsets
        return math.prod(self.shape) * itemsize if self.dtype in FLOATS else end - begin


class _Index(BaseModel):
    weight_map: dict[str, str]


# The strings are what a file tells of itself.
HEADER = TypeAdapter(dict[str, _Tensor | dict[str, str]])


@dataclass(frozen=True)
class Weights:
    """Bytes of a checkpoint's tensors, once loaded.

    Attributes:
        decoder: what every decode step reads: layers without routed experts, output layer.
        experts: routed experts of all layers.
        embedding: the input embedding.
        outside: vision tower, projector and what else a decode step does not read.
    """

    decoder: int = 0
    experts: int = 0
    embedding: int = 0
    outside: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.decoder + self.experts + self.embedding + self.outside


def read_weights(folder: Path, itemsize: int) -> Weights | None:
    """Sums a model's tensors up; None where the folder has no safetensors.

    Args:
        itemsize: bytes of an element of the model's type.

    Raises:
        ValueError: a file that is named is missing or is no safetensors.
    """
    totals = {"decoder": 0, "experts": 0, "embedding": 0, "outside": 0}
    for name, tensor in _tensors(folder):
        totals[_part(name)] += tensor.loaded_bytes(itemsize)
    return Weights(**totals) if any(totals.values()) else None


def _part(name: str) -> str:
    for part, pattern in (("outside", OUTSIDE), ("embedding", EMBEDDING), ("experts", EXPERTS)):
        if pattern.search(name):
            return part
    return "decoder"


def _tensors(folder: Path) -> Iterator[tuple[str, _Tensor]]:
    try:
        if (folder / INDEX).is_file():
            index = _Index.model_validate_json((folder / INDEX).read_bytes())
            files = [folder / name for name in sorted(set(index.weight_map.values()))]
        else:
            files = sorted(folder.glob("model*.safetensors"))
        headers = [_header(file) for file in files]
    except ValidationError:
        raise ValueError(
            f"the weights in {folder} cannot be read: {INDEX} has no weight_map from weights to files"
        ) from None
    except OSError as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from None
    for header in headers:
        yield from ((name, tensor) for name, tensor in header.items() if isinstance(tensor, _Tensor))


def _header(file: Path) -> dict[str, _Tensor | dict[str, str]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            return HEADER.validate_json(stream.read(min(length, LONGEST_HEADER)))
        except ValidationError:
            raise ValueError(f"{file} is no safetensors file") from None
