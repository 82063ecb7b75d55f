"""Extent decode in plain torch: the reference, and the CPU path."""

import math

import torch
from torch import Tensor

from ..pages import PAGE
from ..tables import DecodeTables


def extent_decode(
    query: Tensor,
    pool: Tensor,
    out: Tensor,
    row_slot: Tensor,
    row_len: Tensor,
    tables: DecodeTables,
    layer: int,
    scale: float,
) -> None:
    """See `hybridkv_kernels.extent_decode.extent_decode`; reads the rows' slots and lengths on the host."""
    for row, (slot, length) in enumerate(zip(row_slot.tolist(), row_len.tolist(), strict=True)):
        if slot < 0:
            out[row] = 0
        else:
            out[row] = _decode_row(query[row], pool, slot, length, tables, layer, scale)


def _decode_row(
    query: Tensor, pool: Tensor, slot: int, length: int, tables: DecodeTables, layer: int, scale: float
) -> Tensor:
    """Attention of one token: query [Hq, D] to [Hq, D], fp32."""
    num_q_heads, head_size = query.shape
    pages, valid = _head_pages(slot, length, tables, layer)
    heads = pages.shape[0]
    if not valid.any():
        return torch.zeros(num_q_heads, head_size, device=pool.device)
    rows = pool[pages].flatten(1, 2).float()
    # What a page holds past its end may be NaN, which a weight of zero would let through.
    rows[~valid] = 0.0
    keys, values = rows.chunk(2, dim=-1)
    scores = (query.float() * scale).view(heads, -1, head_size) @ keys.transpose(1, 2)
    weights = scores.masked_fill_(~valid[:, None], -math.inf).softmax(dim=-1)
    # A head may see nothing where others see something.
    weights = weights.masked_fill_(~valid[:, None], 0.0)
    return (weights @ values).view(num_q_heads, head_size)


def _head_pages(slot: int, length: int, tables: DecodeTables, layer: int) -> tuple[Tensor, Tensor]:
    """Physical pages [H, V] of every head, padded to the longest, and which tokens [H, V*16] count."""
    heads = tables.num_kv_heads
    block_pages = tables.num_layers * heads
    device = tables.extents.device
    first, extent_len = tables.extents[slot, layer].long().unbind(dim=-1)
    extent_pages = (extent_len + PAGE - 1) // PAGE
    tail_len = max(length - int(tables.tail_start[slot]), 0)
    tail_block = int(tables.tail_start[slot]) // PAGE

    num_pages = int(extent_pages.max()) + -(-tail_len // PAGE)
    page = torch.arange(num_pages, device=device)
    in_extent = page < extent_pages[:, None]
    logical = torch.where(in_extent, first[:, None] + page, 0)
    arena = tables.arena[slot].long()[logical // block_pages] * block_pages + logical % block_pages
    tail_page = page - extent_pages[:, None]
    in_tail = (tail_page >= 0) & (tail_page * PAGE < tail_len)
    block = tables.blocks[slot].long()[torch.where(in_tail, tail_block + tail_page, 0)]
    tail = (block * tables.num_layers + layer) * heads + torch.arange(heads, device=device)[:, None]
    pages = torch.where(in_extent, arena, torch.where(in_tail, tail, 0))

    left = torch.where(in_extent, extent_len[:, None] - page * PAGE, tail_len - tail_page * PAGE)
    valid = torch.arange(PAGE, device=device) < left[:, :, None]
    return pages, valid.flatten(1)
