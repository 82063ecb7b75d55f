"""The landmark build in plain torch: the reference, and the CPU path."""

import torch
from torch import Tensor

from ..pages import PAGE
from ..recall.landmarks import Landmarks
from ..recall.layout import LandmarkLayout
from ..recall.reading import arena_pages

# A scale is never zero: its sign says what the sketch is taken around.
LEAST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0


def write_positions(
    pool: Tensor, arena_blocks: Tensor, positions: Tensor, landmarks: Landmarks, block_pages: int
) -> None:
    """Write positions [axes, T'] into the arena's first pages; no host sync, so Triton's path uses it too."""
    layout = landmarks.layout
    chunks = positions.shape[1] // PAGE
    count = layout.position_pages(chunks)
    by_chunk = positions.view(layout.position_axes, chunks, PAGE).transpose(0, 1)
    entries = layout.position_places * layout.position_axes * PAGE
    rows = torch.zeros(
        count * layout.position_places, *by_chunk.shape[1:], dtype=torch.int32, device=pool.device
    )
    rows[:chunks] = by_chunk
    pages = arena_pages(arena_blocks, torch.arange(count, device=pool.device), block_pages)
    pool.view(torch.int32).flatten(1)[:, :entries][pages] = rows.view(count, entries)


def landmark_build(
    pool: Tensor,
    source_blocks: Tensor,
    arena_blocks: Tensor,
    extents: Tensor,
    chunk_first: Tensor,
    dest: Tensor,
    landmarks: Landmarks,
    positions: Tensor | None,
) -> None:
    """See `hybridkv_kernels.landmark_build.landmark_build`."""
    layers, heads, _ = extents.shape
    layout = landmarks.layout
    chunks = source_blocks.shape[0]
    if positions is None:
        positions = torch.arange(chunks * PAGE, device=pool.device)[None]
    count = layout.pages(chunks)
    for layer, head in (chunk_first >= 0).nonzero().tolist():
        source = (source_blocks.long() * layers + layer) * heads + head
        keys = pool[source, :, : layout.head_size].float()
        logical = int(extents[layer, head, 0]) - count + torch.arange(count, device=pool.device)
        pages = arena_pages(arena_blocks, logical, layers * heads)
        raw = torch.zeros(count, layout.page_bytes, dtype=torch.uint8, device=pool.device)
        data, scales, centre = _describe(keys, landmarks, positions, pool.dtype)
        _fill(raw, layout, 0, data)
        if scales is not None:
            _fill(raw, layout, layout.scale_offset, scales.contiguous().view(torch.uint8))
        if centre is not None:
            raw[0, : centre.numel() * centre.itemsize] = centre.view(torch.uint8)
        first_token = dest[layer, head, ::PAGE]
        slots = torch.where(first_token >= 0, first_token // PAGE, -1)
        _fill(raw, layout, layout.slot_offset, slots[:, None].contiguous().view(torch.uint8))
        pool.view(torch.uint8).flatten(1)[pages] = raw


def _describe(
    keys: Tensor, landmarks: Landmarks, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Data [n, bytes] uint8, scales [n, 16] fp16 and centre [D] fp32 of a head's chunks, keys [n, 16, D]."""
    kind = landmarks.layout.kind
    if kind == "mean":
        return keys.mean(1).to(dtype).view(torch.uint8), None, None
    if kind == "minmax":
        bounds = torch.cat((keys.amin(1), keys.amax(1)), dim=-1)
        return bounds.to(dtype).view(torch.uint8), None, None
    assert landmarks.rotation is not None
    tokens = keys.flatten(0, 1)
    rope = landmarks.rope
    centre = (tokens if rope is None else rope.unrotate(tokens, positions)).mean(0)
    around = centre[None] if rope is None else rope.rotate(centre[None], positions)
    rest = tokens - around
    centred = rest.square().sum(-1) < tokens.square().sum(-1)
    rest = torch.where(centred[:, None], rest, tokens) @ landmarks.rotation
    size = rest.abs()
    positive = rest > 0
    if landmarks.layout.sketch_bits == 1:
        code = positive.int()
        product = size.sum(-1)
    else:
        # Codes 0 to 3 stand for the levels -3, -1, 1 and 3.
        larger = size > size.mean(-1, keepdim=True)
        code = 2 * positive + (larger == positive)
        product = (size * (1 + 2 * larger)).sum(-1)
    scale = (rest * rest).sum(-1) / product.clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale.clamp(LEAST_SCALE, LARGEST_SCALE)
    scale = torch.where(centred, -scale, scale).half()
    by_place = code.unflatten(-1, (-1, landmarks.layout.span))
    shift = landmarks.layout.sketch_bits * torch.arange(by_place.shape[-2], device=keys.device)
    packed = (by_place << shift[:, None]).sum(-2).to(torch.uint8)
    return packed.view(len(keys), -1), scale.view(len(keys), PAGE), centre


def _fill(raw: Tensor, layout: LandmarkLayout, offset: int, values: Tensor) -> None:
    """Write values [n, bytes] into a field of landmark pages [pages, page_bytes]."""
    size = values.shape[1]
    end = offset + layout.places * size
    flat = torch.zeros(len(raw) * layout.places, size, dtype=torch.uint8, device=raw.device)
    flat[layout.reserved : layout.reserved + len(values)] = values
    raw[:, offset:end] = flat.view(len(raw), -1)
