"""The choice of hot chunks in plain torch: the reference, and the CPU path."""

import math

import torch
from torch import Tensor

from ..pages import PAGE
from ..recall.chunks import hot_slot_entries
from ..recall.layout import LandmarkLayout
from ..recall.reading import recalling_rows
from ..recall.tables import RecallTables
from ..recall.work import RecallWork
from ..tables import DecodeTables

NOTHING = -64.0
"""The least log2 of a chunk's share that counts: attention in fp32 does not see what is less."""
STEP = 2.0**-24
"""What such logarithms are told apart by."""


def chunk_select(
    pool: Tensor,
    row_slot: Tensor,
    row_len: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    layout: LandmarkLayout,
    work: RecallWork,
    interval: int,
    pin_first: int,
    pin_recent: int,
) -> None:
    """See `hybridkv_kernels.chunk_select.chunk_select`; reads the rows' slots and lengths on the host."""
    heads = decode.num_kv_heads
    entries = pool.view(torch.int32).flatten()
    work.num_missing[: row_slot.shape[0] * heads] = 0
    for row, slot, chunks, head in recalling_rows(row_slot, row_len, recall, layer, interval):
        item = row * heads + head
        num_hot = decode.extents[slot, layer, head, 1] // PAGE
        chosen = _choose(work.log_weight[item, :, :chunks], num_hot, pin_first, pin_recent)

        entry = hot_slot_entries(slot, layer, head, chunks, decode, layout)
        hot_slot = entries[entry]
        hot = hot_slot >= 0
        missing, evicted = chosen & ~hot, hot & ~chosen
        where, index, number = _numbered(missing)
        work.missing[item[where], number] = index.int()
        work.num_missing[item] = missing.sum(dim=-1, dtype=torch.int32)
        where, index, number = _numbered(evicted)
        work.freed[item[where], number] = hot_slot[where, index]
        entries[entry[where, index]] = -1
        work.counters[slot, 0] += (chosen & hot).sum()
        work.counters[slot, 1] += missing.sum()


def _choose(log_weight: Tensor, count: Tensor, pin_first: int, pin_recent: int) -> Tensor:
    """Which chunks [h, C] the `count` [h] chosen ones of each head are, by the weights [h, G, C]."""
    weight = log_weight.nan_to_num(nan=-math.inf, neginf=-math.inf)
    best = weight.amax(dim=-1, keepdim=True)
    best = torch.where(best == -math.inf, 0.0, best)
    # At least 1, the best chunk's own, unless no chunk has a weight.
    total = (weight - best).exp2().sum(dim=-1, keepdim=True).clamp(min=1.0)
    share = (weight - (best + total.log2())).amax(dim=1)
    share = (share.clamp(NOTHING, 0.0) / STEP).trunc()
    chunks = share.shape[1]
    # Above all others.
    share[:, :pin_first] = 1.0
    share[:, max(chunks - pin_recent, 0) :] = 1.0
    rank = share.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < count[:, None]


def _numbered(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and number within its row of each element that is set."""
    row, column = mask.nonzero(as_tuple=True)
    return row, column, mask.cumsum(dim=-1)[row, column] - 1
