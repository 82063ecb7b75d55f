"""The fetch of missing chunks in plain torch: the reference, and the CPU path."""

import torch
from torch import Tensor

from ..pages import PAGE
from ..recall.chunks import hot_slot_entries, store_pages
from ..recall.layout import LandmarkLayout
from ..recall.reading import arena_pages
from ..recall.tables import RecallTables
from ..recall.work import RecallWork
from ..tables import DecodeTables


def chunk_gather(
    pool: Tensor,
    store: Tensor | None,
    row_slot: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    layout: LandmarkLayout,
    work: RecallWork,
) -> None:
    """See `hybridkv_kernels.chunk_gather.chunk_gather`; reads the rows' slots on the host."""
    layers, heads = decode.num_layers, decode.num_kv_heads
    entries = pool.view(torch.int32).flatten()
    number = torch.arange(work.max_chunks, device=pool.device)
    for row, slot in enumerate(row_slot.tolist()):
        items = slice(row * heads, (row + 1) * heads)
        head, index = (number < work.num_missing[items, None]).nonzero(as_tuple=True)
        if not len(head):
            continue
        chunk, hot_slot = work.missing[items][head, index], work.freed[items][head, index]
        if store is None:
            source = pool[(decode.blocks[slot, chunk].long() * layers + layer) * heads + head]
        else:
            logical = recall.chunk_first[slot, layer, head] + chunk
            source = store[store_pages(recall.store_blocks[slot], logical)]
        logical = decode.extents[slot, layer, head, 0] + hot_slot
        pool[arena_pages(decode.arena[slot], logical, layers * heads)] = source
        chunks = int(recall.prompt_len[slot]) // PAGE
        heads_filled, which = head.unique(return_inverse=True)
        entry = hot_slot_entries(slot, layer, heads_filled, chunks, decode, layout)
        entries[entry[which, chunk]] = hot_slot
