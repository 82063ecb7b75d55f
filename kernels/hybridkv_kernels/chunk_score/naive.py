"""The chunk scores in plain torch: the reference, and the CPU path."""

import math

import torch
from torch import Tensor

from ..pages import PAGE
from ..recall.landmarks import Landmarks
from ..recall.reading import field, landmark_pages, page_means, recalling_rows
from ..recall.tables import RecallTables
from ..recall.work import RecallWork
from ..tables import DecodeTables

LN2 = math.log(2)


def chunk_score(
    query: Tensor,
    pool: Tensor,
    row_slot: Tensor,
    row_len: Tensor,
    decode: DecodeTables,
    recall: RecallTables,
    layer: int,
    scale: float,
    landmarks: Landmarks,
    work: RecallWork,
    interval: int,
) -> None:
    """See `hybridkv_kernels.chunk_score.chunk_score`; reads the rows' slots and lengths on the host."""
    heads_all = decode.num_kv_heads
    grouped = query.reshape(len(query), heads_all, -1, query.shape[-1])
    for row, slot, chunks, heads in recalling_rows(row_slot, row_len, recall, layer, interval):
        pages = landmark_pages(slot, layer, heads, chunks, decode, landmarks.layout)
        queries = grouped[row, heads].float() * scale
        if landmarks.layout.sketch_bits:
            logits = _sketch_logits(queries, pool, pages, chunks, landmarks)
            weight = logits.unflatten(-1, (chunks, PAGE)).logsumexp(-1)
        else:
            weight = _bound_logits(queries, pool, pages, chunks, landmarks)
        work.log_weight[row * heads_all + heads, :, :chunks] = weight / LN2


def _sketch_logits(queries: Tensor, pool: Tensor, pages: Tensor, chunks: int, landmarks: Landmarks) -> Tensor:
    """Estimated products [Hr, G, T'] of queries [Hr, G, D] with all keys."""
    layout = landmarks.layout
    assert landmarks.rotation is not None
    packed = field(pool, pages, layout, 0, layout.data_bytes)[:, :chunks]
    packed = packed.reshape(len(pages), chunks * PAGE, 1, layout.span)
    bits = layout.sketch_bits
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=pool.device)
    # Codes stand for odd levels around zero.
    code = packed >> shift[:, None] & (2**bits - 1)
    levels = code.flatten(2).float() * 2 - (2**bits - 1)
    raw = field(pool, pages, layout, layout.scale_offset, layout.scale_bytes)[:, :chunks]
    scales = raw.contiguous().view(torch.float16).flatten(1).float()
    rotated = queries @ landmarks.rotation
    around = rotated @ page_means(pool, pages, layout).transpose(1, 2)
    by_token = around.repeat_interleave(layout.places * PAGE, dim=-1)[..., : chunks * PAGE]
    return by_token + (rotated @ levels.transpose(1, 2)) * scales[:, None]


def _bound_logits(queries: Tensor, pool: Tensor, pages: Tensor, chunks: int, landmarks: Landmarks) -> Tensor:
    """Products [Hr, G, n] of queries [Hr, G, D] with the mean keys, or the largest that the bounds allow."""
    layout = landmarks.layout
    raw = field(pool, pages, layout, 0, layout.data_bytes)[:, :chunks]
    values = raw.contiguous().view(pool.dtype).float()
    if layout.kind == "mean":
        return queries @ values.transpose(1, 2)
    least, largest = values.chunk(2, dim=-1)
    return queries.clamp(max=0) @ least.transpose(1, 2) + queries.clamp(min=0) @ largest.transpose(1, 2)
