"""Per-request tables on the device: where each request's compressed prompt and its tail are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from hybridkv_kernels.extent_decode import DecodePlan, DecodeTables
from vllm.utils.torch_utils import async_tensor_h2d

from hybridkv_vllm.plan import PAGE_TOKENS, ArenaGrant

if TYPE_CHECKING:
    from hybridkv_vllm.worker.recall import RecallState

# Bounds the partial results of a replay, [rows * H, G, D] in fp32.
REPLAY_ROWS = 512


@dataclass(frozen=True)
class CacheShape:
    """This rank's share of the KV cache.

    Attributes:
        num_layers: L, layers of this rank.
        num_kv_heads: H, KV heads a layer of this rank.
        num_query_heads: query heads a layer of this rank.
        head_size: D.
    """

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_size: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads


def page_pool(caches: list[torch.Tensor], shape: CacheShape) -> torch.Tensor:
    """The whole KV cache as pages `[B * L * H, 16, 2 * D]` (KVCacheLayout.BLHNC).

    Args:
        caches: each layer's view `[B, H, 16, 2 * D]` in layer order, as vLLM bound it.

    Raises:
        RuntimeError: the layers do not lie as BLHNC; then pages of a block could not be shared.
    """
    first = caches[0]
    page = PAGE_TOKENS * 2 * shape.head_size
    layer = shape.num_kv_heads * page
    expected = (shape.num_layers * layer, page, 2 * shape.head_size, 1)
    for index, cache in enumerate(caches):
        offset = first.storage_offset() + index * layer
        if cache.stride() != expected or cache.storage_offset() != offset:
            raise RuntimeError(
                f"hybridkv: KV cache layout is not BLHNC (strides {cache.stride()}, expected {expected}); "
                "unset VLLM_KV_CACHE_LAYOUT"
            )
    num_pages = first.shape[0] * shape.num_layers * shape.num_kv_heads
    return torch.as_strided(
        first,
        (num_pages, PAGE_TOKENS, 2 * shape.head_size),
        (page, 2 * shape.head_size, 1),
        first.storage_offset(),
    )


def make_decode_plan(shape: CacheShape, max_rows: int, device: torch.device) -> DecodePlan:
    """Buffers that split the decode of up to `max_rows` rows over the GPU's programs."""
    return DecodePlan.create(
        max_rows=max_rows,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        num_q_heads=shape.num_query_heads,
        head_size=shape.head_size,
        device=device,
    )


def make_replay_plan(tables: RequestTables, row_slot: torch.Tensor, row_len: torch.Tensor) -> DecodePlan:
    """The split of up to `REPLAY_ROWS` rows of a replay.

    Its buffers have one size: the kernels that the warm-up compiled for its strides serve every replay.

    Args:
        row_slot: `[n]` int32, request slot.
        row_len: `[n]` int32, tokens visible including the row's own.
    """
    plan = make_decode_plan(tables.shape, REPLAY_ROWS, tables.pool.device)
    plan.update(row_slot, row_len, tables.decode)
    return plan


@dataclass
class RequestTables:
    """Slot-indexed tables, allocated once, so that CUDA graphs can hold on to them.

    Attributes:
        shape: this rank's share of the KV cache.
        pool: all pages, `[P, 16, 2 * D]`.
        decode: extents, arenas, tail starts and ordinary blocks by slot.
        row_slot: `[R]` int32, slot of each decode row of the running step, -1 for padding.
        plan: the running step's split of the decode over programs; None where the kernels in use need none,
            and with `recall`, which has its own.
        recall: tables of the heads that recall chunks; None where none ever does.
        profile: `[L, H]` fp32, what calibration says of the heads; None where each prompt says it.
        grants: of each slot whose prompt ends prefill in this step or is compressed (host side).
        live: whether the running step holds requests; a dummy run's slots mean nothing.
    """

    shape: CacheShape
    pool: torch.Tensor
    decode: DecodeTables
    row_slot: torch.Tensor
    plan: DecodePlan | None
    recall: RecallState | None = None
    profile: torch.Tensor | None = None
    grants: dict[int, ArenaGrant] = field(default_factory=dict)
    live: bool = False

    @classmethod
    def create(
        cls,
        shape: CacheShape,
        pool: torch.Tensor,
        blocks: torch.Tensor,
        *,
        max_rows: int,
        plan: DecodePlan | None,
        recall: RecallState | None,
        profile: torch.Tensor | None,
    ) -> RequestTables:
        """Allocates empty tables.

        Args:
            blocks: vLLM's block table by slot, `[S, B]` int32 (shared, not copied).
            max_rows: decode rows of a step, at most.
            plan: see the attribute.
            recall: tables of the heads that recall, for the same slots.
            profile: `[L, H]` fp32, what calibration says of this rank's heads.
        """
        slots, width = blocks.shape
        device = pool.device
        decode = DecodeTables(
            extents=torch.zeros(
                slots, shape.num_layers, shape.num_kv_heads, 2, dtype=torch.int32, device=device
            ),
            arena=torch.zeros(slots, width, dtype=torch.int32, device=device),
            tail_start=torch.zeros(slots, dtype=torch.int32, device=device),
            blocks=blocks,
        )
        row_slot = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        return cls(
            shape=shape,
            pool=pool,
            decode=decode,
            row_slot=row_slot,
            plan=plan,
            recall=recall,
            profile=profile,
        )

    def begin_step(self, slots: torch.Tensor | None, num_rows: int) -> None:
        """Notes which slot each row of the coming step belongs to.

        Args:
            slots: `[n]` integer, n <= num_rows; None for a dummy run.
            num_rows: rows with padding.
        """
        self.live = slots is not None
        used = 0 if slots is None else slots.shape[0]
        if slots is not None:
            self.row_slot[:used].copy_(slots)
        self.row_slot[used:num_rows].fill_(-1)

    def reset(self, slot: int) -> None:
        """Makes the slot's request uncompressed: extents empty, the tail starts at 0, nothing is recalled."""
        if self.grants.pop(slot, None) is not None:
            self.decode.extents[slot].zero_()
            self.decode.tail_start[slot].zero_()
            if self.recall is not None:
                self.recall.reset(slot)

    def grant(self, slot: int, grant: ArenaGrant) -> None:
        """Takes the arena that the scheduler reserved for the step that ends the slot's prefill."""
        self.grants[slot] = grant
        arena = async_tensor_h2d(list(grant.block_ids), device=self.pool.device, dtype=torch.int32)
        self.decode.arena[slot, : len(grant.block_ids)].copy_(arena)
