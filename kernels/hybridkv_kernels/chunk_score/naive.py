"""The chunk scores in plain torch: the reference, and the CPU path."""

import math

import torch
from torch import Tensor

from ..extent_decode.tables import DecodeTables
from ..pages import PAGE
from ..recall.landmarks import Landmarks
from ..recall.reading import field, landmark_pages, positions_of, recalling_rows
from ..recall.tables import RecallTables
from ..recall.work import RecallWork

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
            positions = positions_of(slot, chunks, pool, decode, landmarks.layout)
            logits = _sketch_logits(queries, pool, pages, chunks, landmarks, positions)
            weight = logits.unflatten(-1, (chunks, PAGE)).logsumexp(-1)
        else:
            weight = _bound_logits(queries, pool, pages, chunks, landmarks)
        work.log_weight[row * heads_all + heads, :, :chunks] = weight / LN2


def _sketch_logits(
    queries: Tensor, pool: Tensor, pages: Tensor, chunks: int, landmarks: Landmarks, positions: Tensor
) -> Tensor:
    """Estimated products [Hr, G, T'] of queries [Hr, G, D] with all keys."""
    layout, rope = landmarks.layout, landmarks.rope
    assert landmarks.rotation is not None
    inside = slice(layout.reserved, layout.reserved + chunks)
    packed = field(pool, pages, layout, 0, layout.data_bytes)[:, inside]
    packed = packed.reshape(len(pages), chunks * PAGE, 1, layout.span)
    bits = layout.sketch_bits
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=pool.device)
    # Codes stand for odd levels around zero.
    code = packed >> shift[:, None] & (2**bits - 1)
    levels = code.flatten(2).float() * 2 - (2**bits - 1)
    raw = field(pool, pages, layout, layout.scale_offset, layout.scale_bytes)[:, inside]
    scales = raw.contiguous().view(torch.float16).flatten(1).float()
    rotated = queries @ landmarks.rotation
    centre_bytes = pool.view(torch.uint8).flatten(1)[pages[:, 0], : 4 * layout.head_size]
    centre = centre_bytes.contiguous().view(torch.float32)
    if rope is None:
        around = (queries @ centre[:, :, None]).expand(-1, -1, chunks * PAGE)
    else:
        around = queries @ rope.rotate(centre[:, None], positions).transpose(1, 2)
    around = around.masked_fill(scales[:, None] > 0, 0)
    return around + (rotated @ levels.transpose(1, 2)) * scales[:, None].abs()


def _bound_logits(queries: Tensor, pool: Tensor, pages: Tensor, chunks: int, landmarks: Landmarks) -> Tensor:
    """Products [Hr, G, n] of queries [Hr, G, D] with the mean keys, or the largest that the bounds allow."""
    layout = landmarks.layout
    raw = field(pool, pages, layout, 0, layout.data_bytes)[:, layout.reserved : layout.reserved + chunks]
    values = raw.contiguous().view(pool.dtype).float()
    if layout.kind == "mean":
        return queries @ values.transpose(1, 2)
    least, largest = values.chunk(2, dim=-1)
    return queries.clamp(max=0) @ least.transpose(1, 2) + queries.clamp(min=0) @ largest.transpose(1, 2)
