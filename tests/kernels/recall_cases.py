"""Random ragged cases for the recall kernels: chunks in the store or in the blocks, NaN everywhere else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hybridkv_kernels import PAGE
from hybridkv_kernels.extent_decode import DecodeTables
from hybridkv_kernels.recall.layout import INDEX_BYTES, LandmarkKind, LandmarkLayout
from hybridkv_kernels.recall.tables import STORE_BLOCK, RecallTables
from hybridkv_kernels.recall.work import WEIGHTS_PAST_END, RecallWork
from kernel_cases import nan_pool
from torch import Tensor

STALE = -7
LARGEST = torch.finfo(torch.float32).max
LEAST_SHARE = -64.0


def bits(tensor: Tensor) -> Tensor:
    """The tensor as int32, to compare bit for bit where it may be NaN."""
    return tensor.view(torch.int32)


def index(values: Sequence[int], device: torch.device) -> Tensor:
    """A list as int32."""
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass
class RecallCase:
    """A decode step over recalling heads, and what the test knows of them.

    `chunks` has each recalling head's pages, `resident` the chunk in each of its hot slots. A head is
    (slot, layer, head).
    """

    pool: Tensor
    store: Tensor | None
    decode: DecodeTables
    recall: RecallTables
    layout: LandmarkLayout
    work: RecallWork
    row_slot: Tensor
    row_len: Tensor
    prompt_lens: list[int]
    chunks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    resident: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)

    def arena_page(self, slot: int, logical: int) -> int:
        """Physical page of one logical arena page."""
        block_pages = self.decode.num_layers * self.decode.num_kv_heads
        return int(self.decode.arena[slot, logical // block_pages]) * block_pages + logical % block_pages

    def hot_page(self, head: tuple[int, int, int], hot_slot: int) -> int:
        """Physical page of a hot slot."""
        return self.arena_page(head[0], int(self.decode.extents[(*head, 0)]) + hot_slot)

    def entry(self, head: tuple[int, int, int], chunk: int) -> tuple[int, int]:
        """Physical page and int32 within it that hold a chunk's hot slot."""
        layout = self.layout
        first = int(self.decode.extents[(*head, 0)]) - layout.pages(len(self.chunks[head]))
        page, place = divmod(chunk, layout.places)
        return self.arena_page(head[0], first + page), layout.slot_offset // INDEX_BYTES + place

    def put(self, pool: Tensor, head: tuple[int, int, int], chunk: int, hot_slot: int) -> None:
        """Write a chunk's hot slot into a pool like the case's."""
        page, word = self.entry(head, chunk)
        bits(pool).flatten(1)[page, word] = hot_slot

    def items(self, layer: int) -> list[tuple[int, tuple[int, int, int]]]:
        """(item, head) of each recalling head of the rows that are not padding."""
        heads = self.decode.num_kv_heads
        return [
            (row * heads + head, (slot, layer, head))
            for row, slot in enumerate(self.row_slot.tolist())
            for head in range(heads)
            if (slot, layer, head) in self.chunks
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a kernel may write."""
        work = self.work
        written = {
            "pool": bits(self.pool),
            "num_missing": work.num_missing,
            "missing": work.missing,
            "freed": work.freed,
            "counters": work.counters,
        }
        return written if self.store is None else {**written, "store": bits(self.store)}


def recall_case(
    prompt_lens: list[int],
    hot: list[list[list[int]]],
    rows: list[tuple[int, int]],
    layout: LandmarkLayout,
    dtype: torch.dtype,
    device: torch.device,
    with_store: bool = True,
    group: int = 1,
) -> RecallCase:
    """Build a step from each slot's prompt length and [L][H] hot slots (0 = does not recall), and the rows.

    A row is (slot, steps since the prompt ended). Which chunks are hot is random, as is the order in which
    everything lies in the arena and in the store.
    """
    slots, layers, heads = len(hot), len(hot[0]), len(hot[0][0])
    block_pages = layers * heads
    num_chunks = [length // PAGE for length in prompt_lens]
    width = 2 * layout.head_size
    num_arena = max(
        -(-sum(layout.pages(chunks) + n + 1 for layer in lens for n in layer) // block_pages)
        for chunks, lens in zip(num_chunks, hot, strict=True)
    )
    num_store = -(-max(num_chunks) * block_pages // STORE_BLOCK) + 1
    num_blocks = max(num_chunks) + 1

    # Block 0 stays NaN, of the pool and of the store: the tables point there wherever nobody may look.
    ids = (torch.randperm(slots * (num_arena + num_blocks)) + 1).int()
    pool = nan_pool(len(ids) + 1, layers, heads, layout.head_size, dtype, device)
    store_ids = (torch.randperm(slots * num_store) + 1).int().view(slots, num_store)
    store = nan_pool((len(store_ids.flatten()) + 1) * STORE_BLOCK, 1, 1, layout.head_size, dtype, device)
    blocks = ids[slots * num_arena :].view(slots, num_blocks).clone()
    (blocks if with_store else store_ids).zero_()
    decode = DecodeTables(
        torch.zeros(slots, layers, heads, 2, dtype=torch.int32, device=device),
        ids[: slots * num_arena].view(slots, num_arena).to(device),
        index([length // PAGE * PAGE for length in prompt_lens], device),
        blocks.to(device),
    )
    recall = RecallTables(
        torch.full((slots, layers, heads), -1, dtype=torch.int32, device=device),
        store_ids.to(device),
        index(prompt_lens, device),
    )
    # Longer than any prompt, and not a round number.
    work = RecallWork.create(len(rows) + 1, heads, heads * group, None, max(num_chunks) + 3, slots, device)
    # Would be chosen, and NaN would not; also where a kernel reads past the last weight.
    last = work.log_weight.numel() + WEIGHTS_PAST_END
    work.log_weight.as_strided((last,), (1,)).fill_(1e30)
    for tensor in (work.num_missing, work.missing, work.freed):
        tensor.fill_(STALE)
    row_slot = index([slot for slot, _ in rows], device)
    row_len = index([step + 1 + (prompt_lens[slot] if slot >= 0 else 0) for slot, step in rows], device)
    case = RecallCase(
        pool, store if with_store else None, decode, recall, layout, work, row_slot, row_len, prompt_lens
    )

    for slot in range(slots):
        next_page, next_store = 1, 1
        for order in torch.randperm(block_pages).tolist():
            layer, head = divmod(order, heads)
            count, chunks = hot[slot][layer][head], num_chunks[slot]
            key = (slot, layer, head)
            if not count:
                # A head that was pruned: an extent of a page and a bit, with nothing before it.
                decode.extents[key] = index([next_page, PAGE + 3], device)
                next_page += 2
                continue
            decode.extents[key] = index([next_page + layout.pages(chunks), count * PAGE], device)
            next_page += layout.pages(chunks) + count
            recall.chunk_first[key] = next_store
            next_store += chunks
            case.chunks[key] = torch.randn(chunks, PAGE, width, device=device).to(dtype)
            case.resident[key] = torch.randperm(chunks)[:count].tolist()
            for chunk, page in enumerate(case.chunks[key]):
                if with_store:
                    logical = int(recall.chunk_first[key]) + chunk
                    block = int(store_ids[slot, logical // STORE_BLOCK])
                    store[block * STORE_BLOCK + logical % STORE_BLOCK] = page
                else:
                    pool[(int(blocks[slot, chunk]) * layers + layer) * heads + head] = page
                case.put(pool, key, chunk, -1)
            for hot_slot, chunk in enumerate(case.resident[key]):
                case.put(pool, key, chunk, hot_slot)
                pool[case.hot_page(key, hot_slot)] = case.chunks[key][chunk]
    return case


def ragged_case(
    kind: LandmarkKind,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    with_store: bool = True,
    group: int = 1,
) -> RecallCase:
    """Prompts that fill pages and that do not, heads that hold one chunk or all, and rows of no request."""
    prompt_lens = [1100, 16, 400, 95]
    hot = [
        [[7, 0, 20], [1, 68, 0]],
        [[1, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 0, 0]],
        [[5, 3, 1], [0, 2, 4]],
    ]
    rows = [(3, 0), (-1, 5), (0, 2), (2, 4), (1, 8), (-1, 0)]
    layout = LandmarkLayout(kind, head_size, dtype.itemsize)
    return recall_case(prompt_lens, hot, rows, layout, dtype, device, with_store, group)


def chosen_chunks(weights: Tensor, count: int, pin_first: int = 0, pin_recent: int = 0) -> list[int]:
    """The choice by definition: the `count` largest of [G, C] weights, each member's normalised."""
    chunks = weights.shape[1]
    shares = [-math.inf] * chunks
    for member in weights.double().tolist():
        usable = [-math.inf if math.isnan(weight) else min(weight, LARGEST) for weight in member]
        best = max(usable)
        if best == -math.inf:
            continue
        total = best + math.log2(math.fsum(2.0 ** (weight - best) for weight in usable))
        shares = [max(share, weight - total) for share, weight in zip(shares, usable, strict=True)]
    # In steps of 2^-24.
    shares = [math.trunc(max(share, LEAST_SHARE) * 2**24) for share in shares]
    pinned = [chunk < pin_first or chunk >= chunks - pin_recent for chunk in range(chunks)]
    shares = [math.inf if pin else share for share, pin in zip(shares, pinned, strict=True)]
    order = sorted(range(chunks), key=lambda chunk: (-shares[chunk], chunk))
    return sorted(order[:count])
