"""The plan of a step's scores: how the landmark pages of heads that select are split over programs."""

import torch

from ..extent_decode.work_list import WorkList, programs_to_fill
from ..recall.layout import LandmarkLayout

# Of one warp each, as many as have registers on a multiprocessor, so that equal splits make one wave.
PROGRAMS_PER_MULTIPROCESSOR = 24
# Least chunks of a split where a page's chunks are no tile of their own.
LEAST_CHUNKS = 64


def score_plan(
    max_rows: int,
    num_layers: int,
    num_kv_heads: int,
    layout: LandmarkLayout,
    device: torch.device | str,
) -> WorkList:
    """Allocate the work list of `chunk_score`, for up to `max_rows` rows; head counts are those of this rank.

    Raises:
        ValueError: for a size that is not positive.
    """
    return WorkList.create(
        max_rows,
        num_layers,
        num_kv_heads,
        device,
        programs_to_fill(torch.device(device), PROGRAMS_PER_MULTIPROCESSOR),
        min_pages=1 if layout.sketch_bits else -(-LEAST_CHUNKS // layout.places),
        part="selecting",
        places=layout.places,
    )
