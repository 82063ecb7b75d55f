"""Landmark pages in plain torch: what the naive kernels share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..pages import PAGE
from ..tables import DecodeTables
from .layout import STEP_BYTES, LandmarkLayout
from .tables import RecallTables


def arena_pages(arena_row: Tensor, logical: Tensor, block_pages: int) -> Tensor:
    """Physical pages (int64) of logical arena pages; any shape."""
    logical = logical.long()
    return arena_row.long()[logical // block_pages] * block_pages + logical % block_pages


def recalling_rows(
    row_slot: Tensor, row_len: Tensor, recall: RecallTables, layer: int, interval: int
) -> Iterator[tuple[int, int, int, Tensor]]:
    """(row, slot, chunks, heads that recall [Hr] int64) of each row that selects chunks in this step."""
    for row, (slot, length) in enumerate(zip(row_slot.tolist(), row_len.tolist(), strict=True)):
        if slot < 0:
            continue
        prompt_len = int(recall.prompt_len[slot])
        heads = (recall.chunk_first[slot, layer] >= 0).nonzero().flatten()
        if len(heads) and (length - 1 - prompt_len) % interval == 0:
            yield row, slot, prompt_len // PAGE, heads


def landmark_pages(
    slot: int, layer: int, heads: Tensor, chunks: int, decode: DecodeTables, layout: LandmarkLayout
) -> Tensor:
    """Physical landmark pages [Hr, n] of `heads` of one slot and layer."""
    count = layout.pages(chunks)
    first = decode.extents[slot, layer, heads, 0].long() - count
    logical = first[:, None] + torch.arange(count, device=first.device)
    return arena_pages(decode.arena[slot], logical, decode.num_layers * decode.num_kv_heads)


def field(pool: Tensor, pages: Tensor, layout: LandmarkLayout, offset: int, size: int) -> Tensor:
    """One field of all places of landmark pages [Hr, n]: [Hr, n * places, size] uint8."""
    raw = pool.view(torch.uint8).flatten(1)[pages]
    return raw[..., offset : offset + layout.places * size].unflatten(-1, (layout.places, size)).flatten(1, 2)


def page_means(pool: Tensor, pages: Tensor, layout: LandmarkLayout) -> Tensor:
    """The mean of each landmark page's rotated keys, pages [Hr, n]: [Hr, n, D] fp32."""
    raw = pool.view(torch.uint8).flatten(1)[pages]
    raw = raw[..., layout.mean_offset : layout.mean_offset + layout.mean_bytes]
    step, level = raw.split((STEP_BYTES, layout.head_size), dim=-1)
    return step.contiguous().view(torch.float32) * level.contiguous().view(torch.int8).float()
