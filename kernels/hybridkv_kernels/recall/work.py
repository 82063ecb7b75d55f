"""Buffers that one layer's recall passes from kernel to kernel, allocated once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import PAGE, group_size, require
from .landmarks import Landmarks
from .layout import LandmarkLayout

# Bytes that waves may take at most: tokens at positions that have no room take longer.
WAVE_BYTES = 512 * 2**20
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
            up to a constant of the member's own.
        num_missing: [R*H] int32, chunks that were chosen and are not hot.
        missing: [R*H, C] int32, those chunks, ascending; stale past num_missing.
        freed: [R*H, C] int32, the hot slot that each one goes to; stale past num_missing.
        counters: [S, 2] int64, of each slot the chosen chunks since the start that were hot already, and
            that were missing.
        digits: [R*H, 8/bits, 2, M, K] int8, for sketches the rotated queries in steps of their own: of each
            run of dimensions that share a byte the high digits of M members, worth 256, then the low ones.
        terms: [R*H, 2 + 8/bits, M] fp32, of each member its step, its product with what does not turn of the
            centre, and the sum of its digits in each run.
        harmonics: [R*H, R, M] fp32, the query's product with the turned centre as weights of R/2 cosines,
            then of as many sines.
        waves: fp32, for N rows in use [N*H, axes, P, M], the part of that product that each position on an
            axis has; P as `wave_positions` says.
        num_axes: of positions; 0 where the centre does not turn.
    """

    log_weight: Tensor
    num_missing: Tensor
    missing: Tensor
    freed: Tensor
    counters: Tensor
    digits: Tensor
    terms: Tensor
    harmonics: Tensor
    waves: Tensor
    num_axes: int

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
            ValueError: for heads that do not divide, or a size that is not positive.
        """
        group = group_size(num_q_heads, num_kv_heads)
        require(
            min(max_rows, max_chunks, slots) >= 1,
            "every size of the recall buffers must be positive",
        )
        items = max_rows * num_kv_heads
        rows, runs, span, axes, rotary = members(group), 0, 0, 0, 0
        if landmarks is not None and landmarks.layout.sketch_bits:
            runs, span = 8 // landmarks.layout.sketch_bits, span_pad(landmarks.layout)
        if landmarks is not None and landmarks.rope is not None:
            axes, rotary = landmarks.rope.num_axes, landmarks.rope.rotary_size
        entries = min(items * axes * max_chunks * PAGE * rows, WAVE_BYTES // 4)

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
            digits=torch.zeros(items, runs, 2, rows, span, dtype=torch.int8, device=device),
            terms=floats(items, 2 + runs, rows),
            harmonics=floats(items, rotary, rows),
            # One position at least: what is beyond them is loaded and not used.
            waves=floats(max(entries, items * axes * rows)),
            num_axes=axes,
        )

    @property
    def max_chunks(self) -> int:
        """C."""
        return self.missing.shape[1]

    def wave_positions(self, items: int) -> int:
        """P, positions of each of `items` items that have room: the fewer rows decode, the more."""
        _, rotary, rows = self.harmonics.shape
        if rotary == 0:
            return 0
        return min(self.max_chunks * PAGE, self.waves.numel() // (items * self.num_axes * rows))
