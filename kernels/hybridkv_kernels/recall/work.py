"""Buffers that one layer's recall passes from kernel to kernel, allocated once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import MAX_CHUNKS, group_size, require
from .landmarks import Landmarks
from .layout import LandmarkLayout

WEIGHTS_PAST_END = 2048
"""Elements after the last weight that may be read, for nothing, so that loads need no mask."""

# The least K of a tensor-core dot of bytes.
LEAST_SPAN = 32


def members(group: int) -> int:
    """Rows that a query group takes in the buffers of sketches."""
    return 8 if group <= 8 else 16


def span_pad(layout: LandmarkLayout) -> int:
    """Columns that a sketch's span takes there."""
    return max(1 << max(layout.span - 1, 0).bit_length(), LEAST_SPAN)


@dataclass(frozen=True)
class RecallWork:
    """Device buffers for up to R decode rows of H KV heads and C chunks; item `row*H + head` as in a plan.

    Rows are of S request slots.

    Attributes:
        log_weight: [R*H, G, C] fp32, log2 of a chunk's attention weight for each member of the query group,
            up to a constant of the member's own. WEIGHTS_PAST_END more elements follow in memory.
        num_missing: [R*H] int32, chunks that were chosen and are not hot.
        missing: [R*H, C] int32, those chunks, in any order; stale past num_missing.
        freed: [R*H, C] int32, the hot slot that each one goes to; stale past num_missing.
        counters: [S, 2] int64, of each slot the chosen chunks since the start that were hot already, and
            that were missing.
        digits: [R*H, 8/bits, 2, M, K] int8, for sketches the rotated queries as levels. Of each run of
            dimensions, which have their codes at one place of their bytes, the high digits of M members,
            worth 256, then the low ones. A level stands for a step of the member's own, 2^bits times as much
            from run to run in each half of a byte.
        terms: [R*H, 1 + 8/bits, M] fp32, of each member its step, and of each run the sum of its levels, in
            such steps.
    """

    log_weight: Tensor
    num_missing: Tensor
    missing: Tensor
    freed: Tensor
    counters: Tensor
    digits: Tensor
    terms: Tensor

    @classmethod
    def create(
        cls,
        max_rows: int,
        num_kv_heads: int,
        num_q_heads: int,
        landmarks: Landmarks | None,
        max_chunks: int,
        slots: int,
        device: torch.device | str,
    ) -> "RecallWork":
        """Allocate the buffers; without `landmarks` none to score with.

        Raises:
            ValueError: for heads that do not divide, a size that is not positive, or more than `MAX_CHUNKS`.
        """
        group = group_size(num_q_heads, num_kv_heads)
        require(
            min(max_rows, max_chunks, slots) >= 1,
            "every size of the recall buffers must be positive",
        )
        require(max_chunks <= MAX_CHUNKS, f"{max_chunks} chunks are more than {MAX_CHUNKS}")
        items = max_rows * num_kv_heads
        rows, runs, span = members(group), 0, 0
        if landmarks is not None and landmarks.layout.sketch_bits:
            runs, span = 8 // landmarks.layout.sketch_bits, span_pad(landmarks.layout)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        def indices(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        weights = floats(items * group * max_chunks + WEIGHTS_PAST_END)
        return cls(
            log_weight=weights[:-WEIGHTS_PAST_END].view(items, group, max_chunks),
            num_missing=indices(items),
            missing=indices(items, max_chunks),
            freed=indices(items, max_chunks),
            counters=torch.zeros(slots, 2, dtype=torch.int64, device=device),
            digits=torch.zeros(items, runs, 2, rows, span, dtype=torch.int8, device=device),
            terms=floats(items, 1 + runs, rows),
        )

    @property
    def max_chunks(self) -> int:
        """C."""
        return self.missing.shape[1]
