"""The decode kernel's plan of a step: how heads are split over programs, and room for what splits find."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import group_size, require
from ..recall.tables import RecallTables
from ..tables import DecodeTables
from .work_list import Part, WorkList, programs_to_fill

# A split is a whole number of the decode kernel's tiles.
SPLIT_GRANULE = 4
# As many as fit on a multiprocessor at once (shared memory, D = 128), so that equal splits make one wave.
PROGRAMS_PER_MULTIPROCESSOR = 3
# Of a plan for heads that are attended beside the recall of others, which needs room too.
PROGRAMS_BESIDE = 2


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """Device buffers that live as long as the model: the work list of each layer, and the partial results.

    A plan is for one part of the heads. The others have no splits, and the decode kernel leaves their outputs
    alone: two plans divide a step.

    Attributes:
        splits: E entries at most.
        partial_out: [E, G, D] fp32, attention within one split.
        partial_lse: [E, G] fp32, log2 of the split's sum of exp2.
    """

    splits: WorkList
    partial_out: Tensor
    partial_lse: Tensor

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
            beside = part == "static"
            target_programs = programs_to_fill(
                device, PROGRAMS_BESIDE if beside else PROGRAMS_PER_MULTIPROCESSOR
            )
        require(head_size >= 1, "every size of a decode plan must be positive")
        splits = WorkList.create(
            max_rows, num_layers, num_kv_heads, device, target_programs, min_pages, SPLIT_GRANULE, part
        )
        entries = splits.work.shape[1]
        return cls(
            splits,
            partial_out=torch.zeros((entries, group, head_size), dtype=torch.float32, device=device),
            partial_lse=torch.zeros((entries, group), dtype=torch.float32, device=device),
        )

    def update(
        self, row_slot: Tensor, row_len: Tensor, tables: DecodeTables, recall: RecallTables | None = None
    ) -> None:
        """Plan one step for all layers; see `WorkList.update`.

        Raises:
            ValueError: as there.
        """
        self.splits.update(row_slot, row_len, tables, recall)

    def check(self, rows: int, tables: DecodeTables, group: int, head_size: int) -> None:
        """Check that the plan was made for this model and last updated for N = `rows`.

        Raises:
            ValueError: where it was not.
        """
        self.splits.check(rows, tables)
        mine, theirs = list(self.partial_out.shape[1:]), [group, head_size]
        require(mine == theirs, f"the plan is for group and head size {mine}, not {theirs}")
