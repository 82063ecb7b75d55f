"""The step's work list: who decodes which run of pages, balanced over heads of very unequal length."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions
from ..pages import PAGE, check_index, group_size, require
from .paging import head_lengths
from .tables import DecodeTables

Part = Literal["all", "static", "recalling"]
"""Heads that a plan is for: all of them, those that recall no chunks, or the others."""

# A split is a whole number of the decode kernel's tiles.
SPLIT_GRANULE = 4
# Without a GPU there is nothing to fill; a few programs exercise the same code.
CPU_TARGET_PROGRAMS = 16
# As many as fit on a multiprocessor at once (shared memory, D = 128), so that equal splits make one wave.
PROGRAMS_PER_MULTIPROCESSOR = 3
# Of a plan for heads that are attended beside the recall of others, which needs room too.
PROGRAMS_BESIDE = 2


@triton.jit
def planned_pages(
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    tail_start: tl.tensor,
    chunk_first: tl.tensor,
    item: tl.tensor,
    items: tl.tensor,
    layer: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    PART: tl.constexpr,
) -> tl.tensor:
    """Pages of items that the plan is for, 0 of others, and which ones these are."""
    slot, _, extent, _, tail = head_lengths(
        row_slot, row_len, extents, tail_start, item, items, layer, LAYERS, HEADS
    )
    planned = item < items
    if PART != "all":
        head = (slot.to(tl.int64) * LAYERS + layer) * HEADS + item % HEADS
        recalls = tl.load(chunk_first + head, mask=planned & (slot >= 0), other=-1) >= 0
        planned = planned & (recalls == (PART == "recalling"))
    pages = tl.cdiv(extent, PAGE) + tl.cdiv(tail, PAGE)
    return tl.where(planned, pages, 0), planned


@triton.jit(do_not_specialize=["items", "target_programs", "min_pages"])
def plan_kernel(
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    tail_start: tl.tensor,
    chunk_first: tl.tensor,
    offsets: tl.tensor,
    work: tl.tensor,
    items: tl.tensor,
    target_programs: tl.tensor,
    min_pages: tl.tensor,
    stride_offsets: tl.tensor,
    stride_work: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GRANULE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Plan layer `program_id(0)`: two sweeps over its items, one for the total, one for the splits."""
    layer = tl.program_id(0)
    pages_seen = tl.zeros((TILE,), tl.int32)
    for start in range(0, items, TILE):
        item = start + tl.arange(0, TILE)
        pages, _ = planned_pages(
            row_slot,
            row_len,
            extents,
            tail_start,
            chunk_first,
            item,
            items,
            layer,
            PAGE,
            LAYERS,
            HEADS,
            PART,
        )
        pages_seen += pages
    share = tl.maximum(tl.cdiv(tl.sum(pages_seen, axis=0), target_programs), min_pages)
    share = tl.cdiv(share, GRANULE) * GRANULE

    layer_offsets = offsets + layer.to(tl.int64) * stride_offsets
    layer_work = work + layer.to(tl.int64) * stride_work
    used = 0
    for start in range(0, items, TILE):
        item = start + tl.arange(0, TILE)
        pages, planned = planned_pages(
            row_slot,
            row_len,
            extents,
            tail_start,
            chunk_first,
            item,
            items,
            layer,
            PAGE,
            LAYERS,
            HEADS,
            PART,
        )
        # One split at least: somebody has to write the zeros of a row that sees nothing.
        splits = tl.where(planned, tl.maximum(tl.cdiv(pages, share), 1), 0)
        offset = used + tl.cumsum(splits, axis=0) - splits
        tl.store(layer_offsets + item, offset, mask=item < items)
        for split in range(0, tl.max(splits, axis=0)):
            tl.store(layer_work + offset + split, item, mask=split < splits)
        used += tl.sum(splits, axis=0)
    tl.store(layer_offsets + items, used)


@functools.cache
def launch_options(num_layers: int, num_kv_heads: int, part: Part = "all") -> LaunchOptions:
    """How `plan_kernel` is compiled for a model's shape."""
    constexprs = {
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "GRANULE": SPLIT_GRANULE,
        "PART": part,
        "TILE": 1024,
    }
    return LaunchOptions(constexprs, num_warps=8, num_stages=1)


@dataclass(eq=False)
class DecodePlan:
    """Device buffers that live as long as the model: the work list of each layer, and the partial results.

    Item `row*H + head` of a layer has splits `offsets[layer, item] .. offsets[layer, item+1]-1`. Split i is
    done by program i, which finds its item in `work[layer, i]` and takes an equal part of its pages. There
    are never more than `rows*H + target_programs` splits.

    A plan is for one part of the heads. The others have no splits, and the decode kernel leaves their outputs
    alone: two plans divide a step.

    Attributes:
        offsets: [L, max_rows*H + 1] int32, exclusive prefix sums of the splits per item, then the total.
        work: [L, max_rows*H + target_programs] int32, the item of each split; stale past the total.
        partial_out: [max_rows*H + target_programs, G, D] fp32, attention within one split.
        partial_lse: [max_rows*H + target_programs, G] fp32, log2 of the split's sum of exp2.
        target_programs: splits to aim at over all rows and heads of a layer.
        min_pages: least pages of a split.
        part: heads that it is for; padding rows are with those that recall nothing.
        num_rows: N of the last update, 0 before the first.
    """

    offsets: Tensor
    work: Tensor
    partial_out: Tensor
    partial_lse: Tensor
    num_kv_heads: int
    target_programs: int
    min_pages: int
    part: Part
    num_rows: int = 0

    @classmethod
    def create(
        cls,
        max_rows: int,
        num_layers: int,
        num_kv_heads: int,
        num_q_heads: int,
        head_size: int,
        device: torch.device | str,
        target_programs: int | None = None,
        min_pages: int = 8,
        part: Part = "all",
    ) -> "DecodePlan":
        """Allocate the buffers of a plan for up to `max_rows` rows; head counts are those of this rank.

        Args:
            max_rows: largest N.
            num_layers: L.
            num_kv_heads: H.
            num_q_heads: Hq = G*H.
            head_size: D.
            device: where the pool is.
            target_programs: splits to aim at per layer; by default 3 for each multiprocessor of the device,
                and 2 in a plan of `static` heads.
            min_pages: least pages of a split, at least 1.
            part: heads that the plan is for.

        Raises:
            ValueError: for heads that do not divide, or a size that is not positive.
        """
        device = torch.device(device)
        group = group_size(num_q_heads, num_kv_heads)
        if target_programs is None:
            target_programs = CPU_TARGET_PROGRAMS
            if device.type == "cuda":
                multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
                beside = part == "static"
                target_programs = (
                    PROGRAMS_BESIDE if beside else PROGRAMS_PER_MULTIPROCESSOR
                ) * multiprocessors
        sizes = (max_rows, num_layers, head_size, target_programs, min_pages)
        require(min(sizes) >= 1, "every size of a decode plan must be positive")
        items = max_rows * num_kv_heads
        entries = items + target_programs
        return cls(
            offsets=torch.zeros((num_layers, items + 1), dtype=torch.int32, device=device),
            work=torch.zeros((num_layers, entries), dtype=torch.int32, device=device),
            partial_out=torch.zeros((entries, group, head_size), dtype=torch.float32, device=device),
            partial_lse=torch.zeros((entries, group), dtype=torch.float32, device=device),
            num_kv_heads=num_kv_heads,
            target_programs=target_programs,
            min_pages=min_pages,
            part=part,
        )

    @property
    def num_layers(self) -> int:
        """L."""
        return self.offsets.shape[0]

    @property
    def max_rows(self) -> int:
        """The largest N."""
        return (self.offsets.shape[1] - 1) // self.num_kv_heads

    def programs(self, rows: int) -> int:
        """The decode kernel's grid for N = `rows`: no step has more splits."""
        return rows * self.num_kv_heads + self.target_programs

    def update(
        self, row_slot: Tensor, row_len: Tensor, tables: DecodeTables, chunk_first: Tensor | None = None
    ) -> None:
        """Plan one step for all layers: one launch, no host sync, shapes that depend only on N.

        Args:
            row_slot: [N] int32, N <= max_rows, as `extent_decode` will get it.
            row_len: [N] int32, likewise.
            tables: the requests' tables.
            chunk_first: [S, L, H] int32, -1 for a head that does not recall; for a plan of a part.

        Raises:
            ValueError: for a shape or dtype that does not fit, or a plan of a part without `chunk_first`.
        """
        rows = row_slot.shape[0]
        check_index("row_slot", row_slot, torch.int32, rows)
        check_index("row_len", row_len, torch.int32, rows)
        self.num_rows = rows
        self._check_shape(rows, tables)
        if self.part != "all":
            if chunk_first is None:
                raise ValueError(f"a plan of {self.part} heads needs chunk_first")
            check_index("chunk_first", chunk_first, torch.int32, *tables.extents.shape[:3])
        if rows == 0:
            return
        plan_kernel[(self.num_layers,)](
            row_slot,
            row_len,
            tables.extents,
            tables.tail_start,
            # What is not used is not read either: any pointer will do.
            tables.tail_start if chunk_first is None else chunk_first,
            self.offsets,
            self.work,
            rows * self.num_kv_heads,
            self.target_programs,
            self.min_pages,
            self.offsets.stride(0),
            self.work.stride(0),
            **launch_options(self.num_layers, self.num_kv_heads, self.part).kwargs(),
        )

    def check(self, rows: int, tables: DecodeTables, group: int, head_size: int) -> None:
        """Check that the plan was made for this model and last updated for N = `rows`.

        Raises:
            ValueError: where it was not.
        """
        self._check_shape(rows, tables)
        mine, theirs = list(self.partial_out.shape[1:]), [group, head_size]
        require(mine == theirs, f"the plan is for group and head size {mine}, not {theirs}")
        require(rows == self.num_rows, f"the plan was updated for {self.num_rows} rows, not {rows}")

    def _check_shape(self, rows: int, tables: DecodeTables) -> None:
        mine, theirs = (self.num_layers, self.num_kv_heads), (tables.num_layers, tables.num_kv_heads)
        require(mine == theirs, f"the plan is for {mine} layers and KV heads, the tables for {theirs}")
        require(rows <= self.max_rows, f"{rows} rows are more than the plan's {self.max_rows}")
