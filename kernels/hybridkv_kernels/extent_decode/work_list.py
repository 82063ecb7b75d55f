"""A step's work lists: who does which run of pages, balanced over heads of very unequal length."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LaunchOptions
from ..pages import PAGE, check_index, require
from ..recall.paging import selecting_head
from ..recall.tables import RecallTables
from ..tables import DecodeTables
from .paging import head_lengths

Part = Literal["all", "static", "recalling", "selecting"]
"""Heads that a list is for, and their pages.

`all`: extent and tail of every head. `static`: of those that recall no chunks; `recalling`: of the others.
`selecting`: the landmark pages of heads that recall, in rows on a selecting step.
"""

# Without a GPU there is nothing to fill; a few programs exercise the same code.
CPU_TARGET_PROGRAMS = 16


def programs_to_fill(device: torch.device, per_multiprocessor: int) -> int:
    """Programs that fill a GPU with so many on each of its multiprocessors."""
    if device.type != "cuda":
        return CPU_TARGET_PROGRAMS
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def listed_pages(
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    tail_start: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    item: tl.tensor,
    items: tl.tensor,
    layer: tl.tensor,
    interval: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
    PART: tl.constexpr,
) -> tl.tensor:
    """Pages of items that the list is for, 0 of others, and which ones these are."""
    listed = item < items
    if PART == "selecting":
        _, chunks, _, _ = selecting_head(
            row_slot,
            row_len,
            extents,
            chunk_first,
            prompt_len,
            tl.minimum(item, items - 1),
            layer,
            interval,
            PAGE,
            LAYERS,
            HEADS,
            PLACES,
        )
        pages = tl.cdiv(chunks, PLACES)
        listed = listed & (chunks > 0)
    else:
        slot, _, extent, _, tail = head_lengths(
            row_slot, row_len, extents, tail_start, item, items, layer, LAYERS, HEADS
        )
        if PART != "all":
            head = (slot.to(tl.int64) * LAYERS + layer) * HEADS + item % HEADS
            recalls = tl.load(chunk_first + head, mask=listed & (slot >= 0), other=-1) >= 0
            listed = listed & (recalls == (PART == "recalling"))
        pages = tl.cdiv(extent, PAGE) + tl.cdiv(tail, PAGE)
    return tl.where(listed, pages, 0), listed


@triton.jit(do_not_specialize=["items", "interval", "target_programs", "min_pages"])
def plan_kernel(
    row_slot: tl.tensor,
    row_len: tl.tensor,
    extents: tl.tensor,
    tail_start: tl.tensor,
    chunk_first: tl.tensor,
    prompt_len: tl.tensor,
    offsets: tl.tensor,
    work: tl.tensor,
    items: tl.tensor,
    interval: tl.tensor,
    target_programs: tl.tensor,
    min_pages: tl.tensor,
    stride_offsets: tl.tensor,
    stride_work: tl.tensor,
    PAGE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
    GRANULE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Plan layer `program_id(0)`: two sweeps over its items, one for the total, one for the splits."""
    layer = tl.program_id(0)
    pages_seen = tl.zeros((TILE,), tl.int32)
    for start in range(0, items, TILE):
        item = start + tl.arange(0, TILE)
        pages, _ = listed_pages(
            row_slot,
            row_len,
            extents,
            tail_start,
            chunk_first,
            prompt_len,
            item,
            items,
            layer,
            interval,
            PAGE,
            LAYERS,
            HEADS,
            PLACES,
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
        pages, listed = listed_pages(
            row_slot,
            row_len,
            extents,
            tail_start,
            chunk_first,
            prompt_len,
            item,
            items,
            layer,
            interval,
            PAGE,
            LAYERS,
            HEADS,
            PLACES,
            PART,
        )
        # One split at least: somebody has to write the zeros of a row that sees nothing.
        splits = tl.where(listed, tl.maximum(tl.cdiv(pages, share), 1), 0)
        offset = used + tl.cumsum(splits, axis=0) - splits
        tl.store(layer_offsets + item, offset, mask=item < items)
        for split in range(0, tl.max(splits, axis=0)):
            tl.store(layer_work + offset + split, item, mask=split < splits)
        used += tl.sum(splits, axis=0)
    tl.store(layer_offsets + items, used)


@triton.jit
def split_of(
    offsets: tl.tensor,
    work: tl.tensor,
    program: tl.tensor,
    items: tl.tensor,
    layer: tl.tensor,
    stride_offsets: tl.tensor,
    stride_work: tl.tensor,
) -> tl.tensor:
    """(item, which of its splits, splits of the item) of a program; of an idle one 0 splits of any item."""
    layer_offsets = offsets + layer.to(tl.int64) * stride_offsets
    # Stale past the total.
    item = tl.minimum(tl.load(work + layer.to(tl.int64) * stride_work + program), items - 1)
    total = tl.load(layer_offsets + items)
    first = tl.load(layer_offsets + item)
    splits = tl.load(layer_offsets + item + 1) - first
    return item, program - first, tl.where(program < total, splits, 0)


@functools.cache
def launch_options(
    num_layers: int, num_kv_heads: int, part: Part = "all", granule: int = 1, places: int = 1
) -> LaunchOptions:
    """How `plan_kernel` is compiled for a model's shape; `places` are a landmark page's."""
    constexprs = {
        "PAGE": PAGE,
        "LAYERS": num_layers,
        "HEADS": num_kv_heads,
        "PLACES": places,
        "GRANULE": granule,
        "PART": part,
        "TILE": 1024,
    }
    return LaunchOptions(constexprs, num_warps=8, num_stages=1)


@dataclass(eq=False)
class WorkList:
    """Device buffers that live as long as the model: how a step's work on pages is split, layer by layer.

    Item `row*H + head` of a layer has splits `offsets[layer, item] .. offsets[layer, item+1]-1`. Split i is
    done by program i, which finds its item in `work[layer, i]` and takes an equal part of its pages, in whole
    granules. There are never more than `rows*H + target_programs` splits. Heads that the list is not for have
    none.

    Attributes:
        offsets: [L, max_rows*H + 1] int32, exclusive prefix sums of the splits per item, then the total.
        work: [L, max_rows*H + target_programs] int32, the item of each split; stale past the total.
        num_kv_heads: H.
        target_programs: splits to aim at over all rows and heads of a layer.
        min_pages: least pages of a split.
        granule: pages of which a split has a whole number.
        part: heads that it is for, and which pages; padding rows are with the heads that recall nothing.
        places: chunks of a landmark page, for `selecting`.
        num_rows: N of the last update, 0 before the first.
        interval: of the last update, for `selecting`.
    """

    offsets: Tensor
    work: Tensor
    num_kv_heads: int
    target_programs: int
    min_pages: int
    granule: int
    part: Part
    places: int
    num_rows: int = 0
    interval: int = 1

    @classmethod
    def create(
        cls,
        max_rows: int,
        num_layers: int,
        num_kv_heads: int,
        device: torch.device | str,
        target_programs: int,
        min_pages: int,
        granule: int = 1,
        part: Part = "all",
        places: int = 1,
    ) -> "WorkList":
        """Allocate the buffers; the arguments are the attributes.

        Raises:
            ValueError: for a size that is not positive.
        """
        sizes = (max_rows, num_layers, num_kv_heads, target_programs, min_pages, granule, places)
        require(min(sizes) >= 1, "every size of a work list must be positive")
        items = max_rows * num_kv_heads
        return cls(
            offsets=torch.zeros((num_layers, items + 1), dtype=torch.int32, device=device),
            work=torch.zeros((num_layers, items + target_programs), dtype=torch.int32, device=device),
            num_kv_heads=num_kv_heads,
            target_programs=target_programs,
            min_pages=min_pages,
            granule=granule,
            part=part,
            places=places,
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
        """Programs that N = `rows` need at most; a grid must not depend on more than N."""
        return rows * self.num_kv_heads + self.target_programs

    def update(
        self,
        row_slot: Tensor,
        row_len: Tensor,
        tables: DecodeTables,
        recall: RecallTables | None = None,
        interval: int = 1,
    ) -> None:
        """List one step for all layers: one launch, no host sync, shapes that depend only on N.

        Args:
            row_slot: [N] int32, N <= max_rows, the row's request slot; -1 for padding.
            row_len: [N] int32, the query's position + 1, in tokens.
            tables: the requests' tables.
            recall: which heads recall; for any part but `all`.
            interval: steps between two selections, for `selecting`.

        Raises:
            ValueError: for a shape or dtype that does not fit, or a list of a part without `recall`.
        """
        rows = row_slot.shape[0]
        check_index("row_slot", row_slot, torch.int32, rows)
        check_index("row_len", row_len, torch.int32, rows)
        require(interval >= 1, f"interval must be at least 1, not {interval}")
        self.num_rows, self.interval = rows, interval
        self._check_shape(rows, tables)
        # What is not used is not read either: any pointer will do.
        chunk_first = prompt_len = tables.tail_start
        if self.part != "all":
            if recall is None:
                raise ValueError(f"a plan of {self.part} heads needs the recall tables")
            check_index("chunk_first", recall.chunk_first, torch.int32, *tables.extents.shape[:3])
            chunk_first, prompt_len = recall.chunk_first, recall.prompt_len
        if rows == 0:
            return
        plan_kernel[(self.num_layers,)](
            row_slot,
            row_len,
            tables.extents,
            tables.tail_start,
            chunk_first,
            prompt_len,
            self.offsets,
            self.work,
            rows * self.num_kv_heads,
            interval,
            self.target_programs,
            self.min_pages,
            self.offsets.stride(0),
            self.work.stride(0),
            **launch_options(
                self.num_layers, self.num_kv_heads, self.part, self.granule, self.places
            ).kwargs(),
        )

    def check(self, rows: int, tables: DecodeTables) -> None:
        """Check that the list was made for this model and last updated for N = `rows`.

        Raises:
            ValueError: where it was not.
        """
        self._check_shape(rows, tables)
        require(rows == self.num_rows, f"the plan was updated for {self.num_rows} rows, not {rows}")

    def _check_shape(self, rows: int, tables: DecodeTables) -> None:
        mine, theirs = (self.num_layers, self.num_kv_heads), (tables.num_layers, tables.num_kv_heads)
        require(mine == theirs, f"the plan is for {mine} layers and KV heads, the tables for {theirs}")
        require(rows <= self.max_rows, f"{rows} rows are more than the plan's {self.max_rows}")
