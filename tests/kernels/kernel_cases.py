"""Random ragged cases for the kernel tests: pools where everything that must not be read is NaN."""

import math
from dataclasses import dataclass, field

import torch
from hybridkv_kernels import PAGE
from hybridkv_kernels.extent_decode import DecodeTables
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RAGGED_LENGTHS = (0, 1, 15, 16, 17, 63, 1000)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare with the largest expected value as the scale; NaN anywhere fails."""
    error = (actual.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-6)
    assert error <= TOLERANCE[dtype] * scale, f"error {error} at scale {scale}"


def nan_pool(
    blocks: int, layers: int, heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A pool that nobody may read from."""
    return torch.full((blocks * layers * heads, PAGE, 2 * head_size), math.nan, dtype=dtype, device=device)


def strided_heads(rows: int, heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random [rows, heads, head_size] as a view of a wider tensor, the way a fused qkv gives it."""
    return torch.randn(rows, heads + 3, head_size, device=device).to(dtype)[:, 1 : heads + 1]


@dataclass
class DecodeCase:
    """A decode step, and the dense K and V that each slot, layer and head stands for."""

    pool: Tensor
    tables: DecodeTables
    row_slot: Tensor
    row_len: Tensor
    query: Tensor
    layers: int
    heads: int
    extents: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    tails: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """The usual softmax scale."""
        return self.query.shape[-1] ** -0.5

    def nan_out(self) -> Tensor:
        """A strided output to fill."""
        rows, heads, head_size = self.query.shape
        full = torch.full(
            (rows, heads + 2, head_size), math.nan, dtype=self.query.dtype, device=self.query.device
        )
        return full[:, :heads]

    def dense(self, layer: int) -> Tensor:
        """Attention by definition, in fp64, a row and a query head at a time."""
        rows, num_q_heads, head_size = self.query.shape
        out = torch.zeros(rows, num_q_heads, head_size, dtype=torch.float64, device=self.query.device)
        for row, (slot, length) in enumerate(zip(self.row_slot.tolist(), self.row_len.tolist(), strict=True)):
            for q_head in range(num_q_heads if slot >= 0 else 0):
                key = (slot, layer, q_head // (num_q_heads // self.heads))
                tail_len = max(length - int(self.tables.tail_start[slot]), 0)
                kv = torch.cat((self.extents[key], self.tails[key][:tail_len])).double()
                if len(kv):
                    k, v = kv.chunk(2, dim=-1)
                    weights = (k @ self.query[row, q_head].double() * self.scale).softmax(dim=0)
                    out[row, q_head] = weights @ v
        return out


def decode_case(
    extent_lens: list[list[list[int]]],
    tail_starts: list[int],
    rows: list[tuple[int, int]],
    group: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecodeCase:
    """Build a step from each slot's [L][H] extent lengths and tail start, and (slot, row_len) of each row."""
    slots, layers, heads = len(extent_lens), len(extent_lens[0]), len(extent_lens[0][0])
    block_pages = layers * heads
    ends = [max([length for s, length in rows if s == slot], default=0) for slot in range(slots)]
    num_tail = max(*(-(-end // PAGE) for end in ends), 1)
    arena_pages = [sum(-(-n // PAGE) + 1 for layer in lens for n in layer) for lens in extent_lens]
    num_arena = max(-(-pages // block_pages) for pages in arena_pages)

    # Block 0 stays NaN: the tables point there wherever nobody may look.
    ids = (torch.randperm(slots * (num_arena + num_tail)) + 1).int()
    pool = nan_pool(len(ids) + 1, layers, heads, head_size, dtype, device)
    arena = ids[: slots * num_arena].view(slots, num_arena)
    blocks = ids[slots * num_arena :].view(slots, num_tail).clone()
    extents = torch.zeros(slots, layers, heads, 2, dtype=torch.int32)
    tail_start = torch.tensor(tail_starts, dtype=torch.int32)
    row_slot, row_len = torch.tensor(rows, dtype=torch.int32).T.contiguous()
    tables = DecodeTables(*(t.to(device) for t in (extents, arena, tail_start, blocks)))
    query = strided_heads(len(rows), heads * group, head_size, dtype, device)
    case = DecodeCase(pool, tables, row_slot.to(device), row_len.to(device), query, layers, heads)

    for slot in range(slots):
        next_page = 0
        for order in torch.randperm(block_pages).tolist():
            layer, head = divmod(order, heads)
            length = extent_lens[slot][layer][head]
            kv = torch.randn(length, 2 * head_size, device=device).to(dtype)
            for position in range(length):
                page = next_page + position // PAGE
                physical = arena[slot, page // block_pages] * block_pages + page % block_pages
                pool[physical, position % PAGE] = kv[position]
            tables.extents[slot, layer, head] = torch.tensor([next_page, length])
            case.extents[slot, layer, head] = kv
            # A page between two extents belongs to nobody.
            next_page += -(-length // PAGE) + 1
            tail = torch.randn(max(ends[slot] - tail_starts[slot], 0), 2 * head_size, device=device).to(dtype)
            for index in range(len(tail)):
                position = tail_starts[slot] + index
                row = (int(blocks[slot, position // PAGE]) * layers + layer) * heads + head
                pool[row, position % PAGE] = tail[index]
            case.tails[slot, layer, head] = tail
        tables.blocks[slot, : tail_starts[slot] // PAGE] = 0
    return case


def ragged_case(group: int, head_size: int, dtype: torch.dtype, device: torch.device) -> DecodeCase:
    """Compressed, uncompressed, empty and padding rows, repeated slots, and heads of very unequal length."""
    a, b, c, d, e, f, g = RAGGED_LENGTHS
    extent_lens = [
        [[g, a, c], [b, e, f]],
        [[0, 0, 0], [0, 0, 0]],
        [[f, d, b], [a, a, a]],
        [[a, a, e], [c, d, a]],
    ]
    tail_starts = [1040, 0, 96, 48]
    rows = [(0, 1075), (1, 37), (-1, 99), (0, 1041), (2, 112), (2, 97), (3, 48), (1, 1), (-1, 0)]
    return decode_case(extent_lens, tail_starts, rows, group, head_size, dtype, device)
