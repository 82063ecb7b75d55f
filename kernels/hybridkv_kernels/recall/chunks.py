"""Where chunks and their hot slots are, in plain torch: what the naive kernels that move chunks share."""

import torch
from torch import Tensor

from ..tables import DecodeTables
from .layout import INDEX_BYTES, LandmarkLayout
from .reading import arena_pages, landmark_pages
from .tables import STORE_BLOCK


def hot_slot_entries(
    slot: int, layer: int, heads: Tensor, chunks: int, decode: DecodeTables, layout: LandmarkLayout
) -> Tensor:
    """Where the landmarks of `heads` hold their hot slots: [Hr, chunks] indices into the pool's int32s."""
    pages = landmark_pages(slot, layer, heads, chunks, decode, layout)
    place = torch.arange(chunks, device=pages.device)
    first = (pages * layout.page_bytes + layout.slot_offset) // INDEX_BYTES
    return first[:, place // layout.places] + place % layout.places


def store_pages(store_blocks: Tensor, logical: Tensor) -> Tensor:
    """Physical store pages (int64) of one slot's logical ones; any shape."""
    return arena_pages(store_blocks, logical, STORE_BLOCK)
