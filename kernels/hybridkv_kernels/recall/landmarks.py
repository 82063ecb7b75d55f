"""What building and scoring landmarks needs besides the keys: a random rotation, and the model's own rope."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..pages import check_index, require
from .layout import LandmarkKind, LandmarkLayout

ROTATION_SEED = 0x5EED


def random_rotation(head_size: int, device: torch.device | str) -> Tensor:
    """A fixed orthogonal [D, D] fp32 matrix that spreads each dimension over all: y = x @ matrix.

    A Hadamard matrix whose rows have random signs (RaBitQ and others rotate like this before taking signs).
    Where D is no power of two, its odd part is a cosine transform instead, which is orthogonal too.
    """
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while head_size % (2 * hadamard.shape[0]) == 0:
        hadamard = torch.cat(
            (torch.cat((hadamard, hadamard), dim=1), torch.cat((hadamard, -hadamard), dim=1))
        )
    odd = head_size // hadamard.shape[0]
    step = torch.arange(odd, dtype=torch.float64)
    cosine = torch.cos(math.pi / odd * (step[None, :] + 0.5) * step[:, None]) * (2 / odd) ** 0.5
    cosine[0] *= 0.5**0.5
    matrix = torch.kron(hadamard * hadamard.shape[0] ** -0.5, cosine)
    generator = torch.Generator().manual_seed(ROTATION_SEED)
    signs = torch.randint(0, 2, (head_size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return (matrix * signs).float().to(device)


@dataclass(frozen=True)
class Rope:
    """How a model rotates keys by position: what lets sketches be taken around a centre that rotates along.

    Frequency i turns the pair (i, i + R/2), or (2i, 2i + 1) where `is_neox` is off, of the first R
    dimensions, by the position on axis `axis[i]` (M-RoPE has one axis each for time, height and width).

    Attributes:
        cos_sin: [P, R] float, the model's own table: R/2 cosines, then as many sines, for each position. A
            common factor on both (YaRN's) is allowed.
        axis: [R/2] int32.
        num_axes: position axes; with one, a token's position is its index.
        is_neox: whether pairs are halves.

    Raises:
        ValueError: for a shape or dtype that does not fit.
    """

    cos_sin: Tensor
    axis: Tensor
    num_axes: int
    is_neox: bool

    def __post_init__(self) -> None:
        require(self.cos_sin.dim() == 2 and self.cos_sin.is_contiguous(), "cos_sin must be contiguous [P, R]")
        require(self.cos_sin.shape[1] % 2 == 0, "cos_sin must hold as many cosines as sines")
        check_index("axis", self.axis, torch.int32, self.cos_sin.shape[1] // 2)
        require(self.num_axes >= 1, "num_axes must be at least 1")

    @property
    def rotary_size(self) -> int:
        """R, dimensions that are rotated."""
        return self.cos_sin.shape[1]

    def pair(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The two dimensions that each frequency `index` turns."""
        if self.is_neox:
            return index, index + self.rotary_size // 2
        return 2 * index, 2 * index + 1

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, R/2] fp32 for positions [num_axes, T]."""
        at = positions.long().T[:, self.axis.long()]
        half = self.rotary_size // 2
        frequency = torch.arange(half, device=self.cos_sin.device)
        return self.cos_sin[at, frequency].float(), self.cos_sin[at, frequency + half].float()

    def rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """`vectors` [..., D] fp32, broadcast over tokens, rotated to positions [num_axes, T]: [..., T, D]."""
        cos, sin = self.angles(positions)
        first, second = self.pair(torch.arange(self.rotary_size // 2, device=cos.device))
        rotated = vectors.expand(*vectors.shape[:-2], cos.shape[0], vectors.shape[-1]).clone()
        a, b = vectors[..., first], vectors[..., second]
        rotated[..., first] = a * cos - b * sin
        rotated[..., second] = b * cos + a * sin
        return rotated

    def unrotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate` for vectors [..., T, D] fp32 at positions [num_axes, T]."""
        cos, sin = self.angles(positions)
        norm = (cos * cos + sin * sin).clamp(min=torch.finfo(torch.float32).tiny)
        first, second = self.pair(torch.arange(self.rotary_size // 2, device=cos.device))
        result = vectors.clone()
        a, b = vectors[..., first], vectors[..., second]
        result[..., first] = (a * cos + b * sin) / norm
        result[..., second] = (b * cos - a * sin) / norm
        return result


@dataclass(frozen=True)
class Landmarks:
    """A kind of landmark for one model: its layout, and for sketches the rotation and the model's rope.

    Attributes:
        layout: where its bytes lie.
        rotation: [D, D] fp32, orthogonal; None for other kinds than sketches.
        rope: None where the centre does not rotate along: other kinds, or a rope that is not known. A sketch
            is then taken around the mean of the keys as they are.
    """

    layout: LandmarkLayout
    rotation: Tensor | None
    rope: Rope | None

    @classmethod
    def create(
        cls,
        kind: LandmarkKind,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        rope: Rope | None = None,
    ) -> "Landmarks":
        """Landmarks of `kind` for pages of `dtype`; `rope` only matters to sketches.

        Raises:
            ValueError: for a kind, head size or rotary size that does not fit.
        """
        layout = LandmarkLayout(kind, head_size, dtype.itemsize)
        if not layout.sketch_bits:
            return cls(layout, None, None)
        if rope is not None:
            require(rope.rotary_size <= head_size, "the rope turns more dimensions than the head has")
        # With one axis a token's position is its index.
        axes = rope.num_axes if rope is not None and rope.num_axes > 1 else 0
        return cls(replace(layout, position_axes=axes), random_rotation(head_size, device), rope)
