"""Where each request's compressed and ordinary KV lies, as the decode path reads it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .pages import check_index, require


@dataclass(frozen=True)
class DecodeTables:
    """The tables of S request slots, of L layers and H KV heads; A and B are at least 1.

    Attributes:
        extents: [S, L, H, 2] int32, (first logical arena page, length in tokens); length 0 = not compressed.
        arena: [S, A] int32 block ids.
        tail_start: [S] int32, first position that the ordinary blocks serve, a multiple of 16
            (0 = not compressed).
        blocks: [S, B] int32 ordinary block table; index i holds positions 16i..16i+15.

    Raises:
        ValueError: for a shape, dtype or stride that does not fit. Indices are not checked.
    """

    extents: Tensor
    arena: Tensor
    tail_start: Tensor
    blocks: Tensor

    @property
    def num_layers(self) -> int:
        """L."""
        return self.extents.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.extents.shape[2]

    def __post_init__(self) -> None:
        slots = self.extents.shape[0]
        check_index("extents", self.extents, torch.int32, -1, -1, -1, 2)
        check_index("arena", self.arena, torch.int32, slots, -1)
        check_index("tail_start", self.tail_start, torch.int32, slots)
        check_index("blocks", self.blocks, torch.int32, slots, -1)
        require(self.arena.shape[1] > 0 and self.blocks.shape[1] > 0, "arena and blocks need a column")
