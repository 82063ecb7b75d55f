"""How landmarks lie in a dynamic head's pages: fields side by side, so that a page holds whole chunks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from ..pages import PAGE, require, supports_head_size

LandmarkKind = Literal["sketch", "sketch2", "mean", "minmax"]

INDEX_BYTES = 4
SCALE_BYTES = 2
STEP_BYTES = 4


@dataclass(frozen=True)
class LandmarkLayout:
    """The bytes of a head's landmark pages, for pages of 16 tokens of one KV head.

    A page has `places`, one for each chunk, and keeps each field of all its places together: first `data`
    (what the kind says of a chunk's keys), then for sketches 16 fp16 scales, then the chunk's hot slot as
    int32 (-1 where it is not hot). Chunk c is at place c of the head's pages.

    A sketch's data is, token by token, `span` bytes: byte j has the codes of dimensions j, j + span,
    j + 2 * span and so on, the first in its lowest bits. Sketches are taken around the mean of the page's
    keys, which follows the places' fields: the step of its levels, fp32, then D levels, int8, in the order of
    the rotated dimensions.

    Attributes:
        kind: `sketch` (a sign bit for each rotated dimension of each key), `sketch2` (two bits), `mean` (the
            mean key) or `minmax` (for each dimension the least and the largest value).
        head_size: D.
        itemsize: bytes of an element of the pool.

    Raises:
        ValueError: for a kind that does not exist, or a head size that is not supported.
    """

    kind: LandmarkKind
    head_size: int
    itemsize: int

    def __post_init__(self) -> None:
        require(self.kind in get_args(LandmarkKind), f"landmark kind {self.kind!r} does not exist")
        require(supports_head_size(self.head_size), f"head size {self.head_size} is not supported")

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return PAGE * 2 * self.head_size * self.itemsize

    @property
    def sketch_bits(self) -> int:
        """Bits that a sketch has for each rotated dimension of a key; 0 for kinds that are no sketches."""
        return {"sketch": 1, "sketch2": 2}.get(self.kind, 0)

    @property
    def span(self) -> int:
        """Bytes of one token's sketch, and dimensions whose codes lie side by side."""
        return self.head_size * self.sketch_bits // 8

    @property
    def data_bytes(self) -> int:
        """Bytes of one chunk's data field."""
        if self.sketch_bits:
            return PAGE * self.span
        return self.head_size * self.itemsize * (2 if self.kind == "minmax" else 1)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one chunk's scales."""
        return PAGE * SCALE_BYTES if self.sketch_bits else 0

    @property
    def mean_bytes(self) -> int:
        """Bytes of a page's mean key."""
        return STEP_BYTES + self.head_size if self.sketch_bits else 0

    @cached_property
    def places(self) -> int:
        """Chunks that a page has room for."""
        return (self.page_bytes - self.mean_bytes) // (self.data_bytes + self.scale_bytes + INDEX_BYTES)

    @property
    def scale_offset(self) -> int:
        """First byte of a page's scales."""
        return self.places * self.data_bytes

    @property
    def slot_offset(self) -> int:
        """First byte of a page's hot slots."""
        return self.scale_offset + self.places * self.scale_bytes

    @property
    def mean_offset(self) -> int:
        """First byte of a page's mean key."""
        return self.slot_offset + self.places * INDEX_BYTES

    def pages(self, num_chunks: int) -> int:
        """Pages that hold the landmarks of `num_chunks` chunks."""
        return -(-num_chunks // self.places)
