"""The argument checks that the operations on recalling heads share."""

import torch
from torch import Tensor

from ..pages import check_index, check_pool, require
from ..tables import DecodeTables
from .layout import LandmarkLayout
from .tables import RecallTables
from .work import RecallWork


def check_recall(
    pool: Tensor,
    row_slot: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    layout: LandmarkLayout,
    work: RecallWork,
) -> None:
    """Check that one layer's step fits together; indices are not checked.

    Raises:
        ValueError: where it does not.
    """
    check_pool(pool, layout.head_size)
    if pool.itemsize != layout.itemsize:
        raise ValueError(f"the layout is for elements of {layout.itemsize} bytes")
    check_index("row_slot", row_slot, torch.int32, -1)
    check_index("chunk_first", recall.chunk_first, torch.int32, *decode.extents.shape[:3])
    if not 0 <= layer < decode.num_layers:
        raise ValueError(f"layer {layer} is not within 0..{decode.num_layers - 1}")
    items, most = row_slot.shape[0] * decode.num_kv_heads, work.num_missing.shape[0]
    if items > most:
        raise ValueError(f"{items} rows times KV heads are more than the buffers' {most}")
    slots, most = recall.chunk_first.shape[0], work.counters.shape[0]
    if slots > most:
        raise ValueError(f"{slots} request slots are more than the buffers' {most}")


def check_store(pool: Tensor, store: Tensor) -> None:
    """Check that the host store holds pages like the pool's, where the pool's device can reach them.

    Raises:
        ValueError: where it does not.
    """
    require(store.shape[1:] == pool.shape[1:] and store.is_contiguous(), "store must be contiguous pages")
    fits = store.dtype == pool.dtype and store.device == pool.device
    require(fits, f"store must be of the pool's dtype and device, not {store.dtype} on {store.device}")
