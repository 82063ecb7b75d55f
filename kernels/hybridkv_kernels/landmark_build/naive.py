"""The landmark build in plain torch: the reference, and the CPU path."""

import torch
from torch import Tensor

from ..pages import PAGE
from ..recall.landmarks import Landmarks
from ..recall.layout import LandmarkLayout
from ..recall.reading import arena_pages

# What a scale is clamped to, as fp16 has it; and the least step of a mean's levels.
LEAST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0
LEAST_STEP = 1e-30


def landmark_build(
    pool: Tensor,
    source_blocks: Tensor,
    arena_blocks: Tensor,
    extents: Tensor,
    chunk_first: Tensor,
    dest: Tensor,
    landmarks: Landmarks,
) -> None:
    """See `hybridkv_kernels.landmark_build.landmark_build`."""
    layers, heads, _ = extents.shape
    layout = landmarks.layout
    count = layout.pages(source_blocks.shape[0])
    for layer, head in (chunk_first >= 0).nonzero().tolist():
        source = (source_blocks.long() * layers + layer) * heads + head
        keys = pool[source, :, : layout.head_size].float()
        logical = int(extents[layer, head, 0]) - count + torch.arange(count, device=pool.device)
        pages = arena_pages(arena_blocks, logical, layers * heads)
        raw = torch.zeros(count, layout.page_bytes, dtype=torch.uint8, device=pool.device)
        if landmarks.rotation is None:
            _fill(raw, layout, 0, _bounds(keys, layout).to(pool.dtype))
        else:
            rotated = keys @ landmarks.rotation
            mean = _page_means(raw, rotated, layout)
            data, scales = _sketch(rotated - mean[:, None], layout)
            _fill(raw, layout, 0, data)
            _fill(raw, layout, layout.scale_offset, scales)
        first_token = dest[layer, head, ::PAGE]
        slots = torch.where(first_token >= 0, first_token // PAGE, -1)
        _fill(raw, layout, layout.slot_offset, slots[:, None])
        pool.view(torch.uint8).flatten(1)[pages] = raw


def _bounds(keys: Tensor, layout: LandmarkLayout) -> Tensor:
    """The mean [n, D] of the keys [n, 16, D] of each chunk, or their bounds [n, 2*D]."""
    if layout.kind == "mean":
        return keys.mean(1)
    return torch.cat((keys.amin(1), keys.amax(1)), dim=-1)


def _page_means(raw: Tensor, rotated: Tensor, layout: LandmarkLayout) -> Tensor:
    """Write the means of each landmark page's rotated keys [n, 16, D] into the pages; each chunk's [n, D]."""
    page = torch.arange(len(rotated), device=raw.device) // layout.places
    total = torch.zeros(len(raw), rotated.shape[-1], device=raw.device).index_add_(0, page, rotated.mean(1))
    mean = total / page.bincount(minlength=len(raw))[:, None]
    step = (mean.abs().amax(-1, keepdim=True) / 127).clamp(min=LEAST_STEP)
    level = (mean / step).round()
    field = torch.cat((step.view(torch.uint8), level.to(torch.int8).view(torch.uint8)), dim=-1)
    raw[:, layout.mean_offset : layout.mean_offset + layout.mean_bytes] = field
    return (level * step)[page]


def _sketch(rest: Tensor, layout: LandmarkLayout) -> tuple[Tensor, Tensor]:
    """Data [n, bytes] uint8 and scales [n, 16] fp16 of what is left of rotated keys [n, 16, D]."""
    size = rest.abs()
    positive = rest > 0
    if layout.sketch_bits == 1:
        code = positive.int()
        product = size.sum(-1)
    else:
        # Codes 0 to 3 stand for the levels -3, -1, 1 and 3.
        larger = size > size.mean(-1, keepdim=True)
        code = 2 * positive + (larger == positive)
        product = (size * (1 + 2 * larger)).sum(-1)
    scale = (rest * rest).sum(-1) / product.clamp(min=torch.finfo(torch.float32).tiny)
    by_place = code.unflatten(-1, (-1, layout.span))
    shift = layout.sketch_bits * torch.arange(by_place.shape[-2], device=rest.device)
    packed = (by_place << shift[:, None]).sum(-2).to(torch.uint8)
    return packed.flatten(1), scale.clamp(LEAST_SCALE, LARGEST_SCALE).half()


def _fill(raw: Tensor, layout: LandmarkLayout, offset: int, values: Tensor) -> None:
    """Write values [n, any] into a field of landmark pages [pages, page_bytes]."""
    values = values.contiguous().view(torch.uint8)
    size = values.shape[1]
    end = offset + layout.places * size
    flat = torch.zeros(len(raw) * layout.places, size, dtype=torch.uint8, device=raw.device)
    flat[: len(values)] = values
    raw[:, offset:end] = flat.view(len(raw), -1)
