"""What building and scoring landmarks needs besides the keys: a layout and a random rotation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
class Landmarks:
    """A kind of landmark for one model: its layout, and for sketches the rotation.

    Attributes:
        layout: where its bytes lie.
        rotation: [D, D] fp32, orthogonal; None for other kinds than sketches.
    """

    layout: LandmarkLayout
    rotation: Tensor | None

    @classmethod
    def create(
        cls, kind: LandmarkKind, head_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> "Landmarks":
        """Landmarks of `kind` for pages of `dtype`.

        Raises:
            ValueError: for a kind or head size that does not fit.
        """
        layout = LandmarkLayout(kind, head_size, dtype.itemsize)
        return cls(layout, random_rotation(head_size, device) if layout.sketch_bits else None)
