"""Buffers that one layer's recall passes from kernel to kernel, allocated once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import group_size, require


@dataclass(frozen=True)
class RecallWork:
    """Device buffers for up to R decode rows of H KV heads and C chunks; item `row*H + head` as in a plan.

    Rows are of S request slots.

    Attributes:
        log_weight: [R*H, G, C] fp32, log2 of a chunk's attention weight for each member of the query group,
            up to a constant of the member's own.
        num_missing: [R*H] int32, chunks that were chosen and are not hot.
        missing: [R*H, C] int32, those chunks, ascending; stale past num_missing.
        freed: [R*H, C] int32, the hot slot that each one goes to; stale past num_missing.
        counters: [S, 2] int64, of each slot the chosen chunks since the start that were hot already, and
            that were missing.
        rotated: [R*H, G, D] fp32, the rotated queries (sketches).
        harmonics: [R*H, G, 2*D] fp32, the query's product with the centre as cosine and sine weights.
    """

    log_weight: Tensor
    num_missing: Tensor
    missing: Tensor
    freed: Tensor
    counters: Tensor
    rotated: Tensor
    harmonics: Tensor

    @classmethod
    def create(
        cls,
        max_rows: int,
        num_kv_heads: int,
        num_q_heads: int,
        head_size: int,
        max_chunks: int,
        slots: int,
        device: torch.device | str,
    ) -> "RecallWork":
        """Allocate the buffers.

        Raises:
            ValueError: for heads that do not divide, or a size that is not positive.
        """
        group = group_size(num_q_heads, num_kv_heads)
        require(
            min(max_rows, max_chunks, slots, head_size) >= 1,
            "every size of the recall buffers must be positive",
        )
        items = max_rows * num_kv_heads

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        def indices(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            log_weight=floats(items, group, max_chunks),
            num_missing=indices(items),
            missing=indices(items, max_chunks),
            freed=indices(items, max_chunks),
            counters=torch.zeros(slots, 2, dtype=torch.int64, device=device),
            rotated=floats(items, group, head_size),
            harmonics=floats(items, group, 2 * head_size),
        )

    @property
    def max_chunks(self) -> int:
        """C."""
        return self.missing.shape[1]
