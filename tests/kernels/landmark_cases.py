"""Prompts whose heads recall, as the worker lays them out, and landmark scores written out by definition."""

import math
from dataclasses import dataclass

import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.extent_decode import DecodeTables
from hybridkv_kernels.extent_decode.work_list import WorkList
from hybridkv_kernels.landmark_build import landmark_build
from hybridkv_kernels.recall.landmarks import Landmarks
from hybridkv_kernels.recall.layout import LandmarkKind
from hybridkv_kernels.recall.tables import STORE_BLOCK, RecallTables
from hybridkv_kernels.recall.work import RecallWork
from kernel_cases import nan_pool
from torch import Tensor


@dataclass
class RecallCase:
    """Prompts in a pool: [slot][layer, head] keys [T', D], and which heads recall.

    The arena of each slot holds every head's landmarks and hot slots. The hot slots hold the
    chunks of `hot` in ascending order. Everything that is nobody's is NaN.
    """

    pool: Tensor
    decode: DecodeTables
    recall: RecallTables
    landmarks: Landmarks
    keys: list[Tensor]
    values: list[Tensor]
    hot: list[Tensor]
    store: Tensor

    def work(self, rows: int, group: int) -> RecallWork:
        """Buffers full of NaN."""
        chunks = max(keys.shape[2] for keys in self.keys) // PAGE
        heads = self.decode.num_kv_heads
        work = RecallWork.create(
            rows, heads, heads * group, self.landmarks, chunks + 1, rows, self.pool.device
        )
        for buffer in (work.log_weight, work.terms):
            buffer.fill_(math.nan)
        return work

    def plan(
        self, row_slot: Tensor, row_len: Tensor, interval: int = 1, target_programs: int = 16
    ) -> WorkList:
        """The plan of a step's scores."""
        layout, layers, heads = self.landmarks.layout, self.decode.num_layers, self.decode.num_kv_heads
        rows, device = row_slot.shape[0], self.pool.device
        plan = WorkList.create(
            rows, layers, heads, device, target_programs, 1, part="selecting", places=layout.places
        )
        plan.update(row_slot, row_len, self.decode, self.recall, interval)
        return plan

    def expected(self, slot: int, layer: int, head: int, query: Tensor, scale: float) -> Tensor:
        """log2 weights [n] of one query head [D], in fp64, by the definition of the kind."""
        keys = self.keys[slot][layer, head].double()
        chunked = keys.view(-1, PAGE, keys.shape[-1])
        q = query.double() * scale
        kind = self.landmarks.layout.kind
        if kind == "mean":
            logits = chunked.mean(1) @ q
            return logits / math.log(2)
        if kind == "minmax":
            logits = torch.maximum(q * chunked.amin(1), q * chunked.amax(1)).sum(-1)
            return logits / math.log(2)
        rotation = self.landmarks.rotation
        assert rotation is not None
        of_page = chunked.split(self.landmarks.layout.places)
        around = torch.cat([chunks.mean((0, 1)).expand(chunks.shape).flatten(0, 1) for chunks in of_page])
        around = around @ rotation.double()
        step = around.abs().amax(-1, keepdim=True) / 127
        around = (around / step).round() * step
        rest = keys @ rotation.double() - around
        levels = (rest > 0).double() * 2 - 1
        if kind == "sketch2":
            levels *= torch.where(rest.abs() > rest.abs().mean(-1, keepdim=True), 1.5, 0.5)
        scales = ((rest**2).sum(-1) / (rest * levels).sum(-1)).half().double()
        rotated = q @ rotation.double()
        estimate = around @ rotated + scales * (levels @ rotated)
        return estimate.view(-1, PAGE).logsumexp(-1) / math.log(2)


def recall_case(
    prompts: list[int],
    recalling: list[list[list[bool]]],
    kind: LandmarkKind,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    hot: int = 2,
    backend: Backend = "torch",
    keys: list[Tensor] | None = None,
    tail_pages: int = 1,
) -> RecallCase:
    """Lays out prompts of these lengths, [slot][L][H] heads recalling, and builds their landmarks."""
    layers, heads = len(recalling[0]), len(recalling[0][0])
    block_pages = layers * heads
    landmarks = Landmarks.create(kind, head_size, dtype, device)
    layout = landmarks.layout
    counts = [tokens // PAGE for tokens in prompts]
    arena_sizes = [layout.pages(n) + hot + 1 for n in counts]
    width, columns = max(counts) + tail_pages, max(arena_sizes)
    ids = (torch.randperm(len(prompts) * (width + columns)) + 1).int()
    pool = nan_pool(len(ids) + 1, layers, heads, head_size, dtype, device)
    blocks = ids[: len(prompts) * width].view(len(prompts), width).to(device)
    arena = ids[len(prompts) * width :].view(len(prompts), columns).to(device)
    extents = torch.zeros(len(prompts), layers, heads, 2, dtype=torch.int32, device=device)
    chunk_first = torch.full((len(prompts), layers, heads), -1, dtype=torch.int32, device=device)
    store_ids = torch.randperm(len(prompts) * (-(-max(counts) * block_pages // STORE_BLOCK) + 1)).int()
    store_blocks = store_ids.view(len(prompts), -1).to(device)
    store = torch.full(
        (len(store_ids) * STORE_BLOCK, PAGE, 2 * head_size), math.nan, dtype=dtype, device=device
    )
    decode = DecodeTables(
        extents, arena, torch.tensor([n * PAGE for n in counts], dtype=torch.int32, device=device), blocks
    )
    prompt_len = torch.tensor(prompts, dtype=torch.int32, device=device)
    recall = RecallTables(chunk_first, store_blocks, prompt_len)
    case = RecallCase(pool, decode, recall, landmarks, [], [], [], store)
    for slot, n in enumerate(counts):
        tokens = n * PAGE
        own = torch.randn(layers, heads, tokens, head_size) if keys is None else keys[slot]
        values = torch.randn(layers, heads, tokens, head_size)
        case.keys.append(own.to(dtype).to(device))
        case.values.append(values.to(dtype).to(device))
        pages = (blocks[slot, :n].long() * block_pages)[:, None] + torch.arange(block_pages, device=device)
        both = torch.cat((case.keys[slot], case.values[slot]), dim=-1).view(
            block_pages, n, PAGE, 2 * head_size
        )
        pool[pages] = both.transpose(0, 1)
        chosen = torch.randperm(n)[:hot].sort().values.to(device)
        case.hot.append(chosen)
        next_page = next_chunk = 0
        dest = torch.full((layers, heads, tokens), -1, dtype=torch.int32, device=device)
        for layer in range(layers):
            for head in range(heads):
                if recalling[slot][layer][head]:
                    next_page += layout.pages(n)
                    extents[slot, layer, head] = torch.tensor([next_page, hot * PAGE])
                    chunk_first[slot, layer, head] = next_chunk
                    kept = (chosen[:, None] * PAGE + torch.arange(PAGE, device=device)).flatten()
                    dest[layer, head, kept] = torch.arange(hot * PAGE, dtype=torch.int32, device=device)
                    for place, chunk in enumerate(chosen.tolist()):
                        logical = next_page + place
                        physical = arena[slot, logical // block_pages] * block_pages + logical % block_pages
                        pool[physical] = both[layer * heads + head, chunk]
                    for chunk in range(n):
                        j = next_chunk + chunk
                        page = store_blocks[slot, j // STORE_BLOCK] * STORE_BLOCK + j % STORE_BLOCK
                        store[page] = both[layer * heads + head, chunk]
                    next_chunk += n
                    next_page += hot
        landmark_build(
            pool,
            blocks[slot, :n].contiguous(),
            arena[slot].contiguous(),
            extents[slot],
            chunk_first[slot],
            dest,
            landmarks,
            backend,
        )
    return case
