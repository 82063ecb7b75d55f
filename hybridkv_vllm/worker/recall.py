"""What a rank holds for heads that recall chunks, and how a prompt's heads come to recall."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hybridkv_kernels import Backend
from hybridkv_kernels.chunk_offload import chunk_offload
from hybridkv_kernels.extent_decode import DecodeTables
from hybridkv_kernels.landmark_build import landmark_build
from hybridkv_kernels.recall.landmarks import Landmarks
from hybridkv_kernels.recall.tables import STORE_BLOCK, RecallTables
from hybridkv_kernels.recall.work import RecallWork
from hybridkv_kernels.recall_decode import RecallPlan, recall_decode
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.observe.metrics import FallbackReason
from hybridkv_vllm.plan import PromptPlan
from hybridkv_vllm.policies import Recall, recall_limits
from hybridkv_vllm.worker.host_tier import HostTier, Reservation
from hybridkv_vllm.worker.tables import CacheShape

# Reasons under which dynamic heads that had to be pruned are counted.
NO_ROOM_FOR_LANDMARKS: FallbackReason = "landmarks_do_not_fit"
NO_ROOM_ON_HOST: FallbackReason = "host_pool_full"


@dataclass
class RecallState:
    """One rank's tables, buffers and tier; slot-indexed and allocated once, so that CUDA graphs can hold on.

    Attributes:
        tables: which heads recall, and where their chunks are.
        work: buffers of one layer's recall.
        plan: how the running step's decode is split over programs; None where the kernels in use need none.
        landmarks: what describes a chunk.
        options: the server's.
        backend: kernel backend, `triton` or `torch`.
        stream: where chunks go to the host while later layers compute; None on a CPU.
        tier: the host tier, once the cache exists; None where chunks stay in the prompt's blocks.
    """

    tables: RecallTables
    work: RecallWork
    plan: RecallPlan | None
    landmarks: Landmarks
    options: ServerOptions
    backend: Backend
    stream: torch.cuda.Stream | None
    tier: HostTier | None = None

    @classmethod
    def create(
        cls,
        shape: CacheShape,
        options: ServerOptions,
        landmarks: Landmarks,
        *,
        slots: int,
        max_rows: int,
        max_chunks: int,
        backend: Backend,
        device: torch.device,
    ) -> RecallState:
        """Allocates empty tables, and no tier yet.

        Args:
            slots: request slots.
            max_rows: decode rows of a step, at most.
            max_chunks: chunks of the longest prompt.
        """
        heads = shape.num_layers * shape.num_kv_heads
        on_host = options.recall_tier == "host"
        columns = -(-heads * max_chunks // STORE_BLOCK) if on_host else 1
        tables = RecallTables(
            chunk_first=torch.full(
                (slots, shape.num_layers, shape.num_kv_heads), -1, dtype=torch.int32, device=device
            ),
            store_blocks=torch.zeros(slots, columns, dtype=torch.int32, device=device),
            prompt_len=torch.zeros(slots, dtype=torch.int32, device=device),
        )
        work = RecallWork.create(
            max_rows, shape.num_kv_heads, shape.num_query_heads, landmarks, max_chunks, slots, device
        )
        stream = torch.cuda.Stream(device) if device.type == "cuda" and on_host else None
        plan = None
        if backend == "triton":
            plan = RecallPlan.create(
                max_rows,
                shape.num_layers,
                shape.num_kv_heads,
                shape.num_query_heads,
                landmarks.layout,
                device,
            )
        return cls(tables, work, plan, landmarks, options, backend, stream)

    def reset(self, slot: int) -> None:
        """The slot's request is gone: none of its heads recalls, its host memory is free."""
        self.tables.chunk_first[slot].fill_(-1)
        if self.tier is not None:
            self.tier.release(slot)

    def update_plan(self, row_slot: Tensor, row_len: Tensor, decode: DecodeTables) -> None:
        """Splits the coming step's decode rows over programs, where the kernels in use need that."""
        if self.plan is not None:
            self.plan.update(row_slot, row_len, decode, self.tables, self.options.recall_interval)

    def decode(
        self,
        query: Tensor,
        pool: Tensor,
        out: Tensor,
        row_slot: Tensor,
        row_len: Tensor,
        decode: DecodeTables,
        layer: int,
        scale: float,
    ) -> None:
        """One layer's decode rows, with the chunks that they need; see `recall_decode`."""
        recall_decode(
            query,
            pool,
            out,
            self.tier.store if self.tier is not None else None,
            row_slot,
            row_len,
            decode,
            self.tables,
            layer,
            scale,
            self.landmarks,
            self.work,
            self.plan,
            interval=self.options.recall_interval,
            pin_first=self.options.pin_first_chunks,
            pin_recent=self.options.pin_recent_chunks,
            backend=self.backend,
            early=True,
        )


class RecallBeginning:
    """One prompt's heads on their way to recalling, alive during the forward that ends the prefill.

    Which heads are dynamic is known on the device only. The host reserves store blocks for all heads, or as
    many as are free; dynamic heads take their share in (layer, KV head) order until it is used up. Which of
    these recall is known after the last layer, when the others' chunks are in the tier already.

    Attributes:
        reservation: the request's store blocks; None where chunks stay in the prompt's blocks.
        store_end: `[L, H]` int32, once finished: the store page after the head's last one, 0 of a head that
            found no room in the tier. Of heads that recall, and of those that do not after all.
    """

    store_end: Tensor

    def __init__(
        self,
        state: RecallState,
        shape: CacheShape,
        slot: int,
        plan: PromptPlan,
        least_pages: int,
        most_heads: int,
    ) -> None:
        """Reserves host memory; see `begin_recall`."""
        self._state = state
        self._shape = shape
        self._slot = slot
        self._chunks = plan.num_full_blocks
        self._least_pages = least_pages
        self._most_heads = most_heads
        layout = state.landmarks.layout
        self._landmark_pages = layout.pages(self._chunks)
        self._heads: list[Tensor] = []
        device = state.tables.chunk_first.device
        self._next_chunk = torch.zeros((), dtype=torch.int32, device=device)
        self.reservation: Reservation | None = None
        state.tables.prompt_len[slot].fill_(plan.num_tokens)
        if state.tier is not None:
            wanted = shape.num_layers * shape.num_kv_heads * self._chunks
            self.reservation = state.tier.reserve(slot, wanted)
            blocks = async_tensor_h2d(
                list(self.reservation.blocks.values()), device=device, dtype=torch.int32
            )
            state.tables.store_blocks[slot, : len(blocks)].copy_(blocks)

    def take_layer(self, layer: int, dynamic: Tensor, pool: Tensor, blocks: Tensor) -> None:
        """Gives the layer's dynamic heads room in the tier, and starts the copies of their chunks.

        Args:
            layer: its keys and values are written.
            dynamic: `[1, H]` bool.
            pool: all pages.
            blocks: `[n]` int32, the prompt's full blocks.
        """
        tables = self._state.tables
        place = dynamic[0].cumsum(0, dtype=torch.int32) * self._chunks
        first = self._next_chunk + place - self._chunks
        takes = dynamic[0]
        if self.reservation is not None:
            takes = takes & (first + self._chunks <= self.reservation.num_pages)
        tables.chunk_first[self._slot, layer].copy_(torch.where(takes, first, -1))
        self._next_chunk = self._next_chunk + takes.sum(dtype=torch.int32) * self._chunks
        self._heads.append(takes[None])
        if self._state.tier is not None:
            stream = self._state.stream
            if stream is None:
                self._offload(layer, pool, blocks)
            else:
                stream.wait_stream(torch.cuda.current_stream(pool.device))
                with torch.cuda.stream(stream):
                    self._offload(layer, pool, blocks)

    def _offload(self, layer: int, pool: Tensor, blocks: Tensor) -> None:
        state = self._state
        assert state.tier is not None
        chunk_offload(
            pool,
            state.tier.store,
            blocks,
            state.tables.store_blocks[self._slot],
            state.tables.chunk_first[self._slot, layer],
            layer,
            self._shape.num_layers,
            backend=state.backend,
        )

    def recall(self) -> Recall:
        """What the policy allocates for, once all layers have been taken."""
        return Recall(torch.cat(self._heads), self._landmark_pages, self._least_pages, self._most_heads)

    def chunks_so_far(self) -> Tensor:
        """What the slot's counters hold, `[2]` int64: earlier requests have counted there too."""
        return self._state.work.counters[self._slot].clone()

    def finish(
        self,
        recalled: Tensor,
        pool: Tensor,
        blocks: Tensor,
        arena: Tensor,
        extents: Tensor,
        dest: Tensor,
    ) -> None:
        """Builds the landmarks, and lets the main stream wait for the copies: after it the blocks may go.

        Args:
            recalled: `[L, H]` bool, heads that recall, of those in the tier.
            pool: all pages.
            blocks: `[n]` int32, the prompt's full blocks.
            arena: `[A]` int32, the arena's blocks.
            extents: `[L, H, 2]` int32, as the decode will read them.
            dest: `[L, H, 16 * n]` int32, as `compact` was given.
        """
        state = self._state
        chunk_first = state.tables.chunk_first[self._slot]
        self.store_end = torch.where(chunk_first >= 0, chunk_first + self._chunks, 0)
        # A copy still under way may see it: it is of no use to a head that does not recall.
        chunk_first.masked_fill_(~recalled, -1)
        landmark_build(
            pool,
            blocks,
            arena,
            extents,
            chunk_first,
            dest,
            state.landmarks,
            backend=state.backend,
        )
        if state.stream is not None:
            torch.cuda.current_stream(pool.device).wait_stream(state.stream)


def begin_recall(
    state: RecallState | None, shape: CacheShape, slot: int, plan: PromptPlan
) -> RecallBeginning | None:
    """Begins the recall of a prompt; None where its heads will not.

    That is so without a tier, where the arena holds every chunk as it is, and where it cannot hold a single
    head's landmarks and a handful of chunks beside the other heads (`recall_limits`).
    """
    if state is None or not plan.recalls:
        return None
    chunks = plan.num_full_blocks
    layout = state.landmarks.layout
    heads = shape.num_layers * shape.num_kv_heads
    pages = plan.arena_size * heads
    limits = recall_limits(pages, heads, chunks, layout.pages(chunks), plan.window_in_arena)
    return None if limits is None else RecallBeginning(state, shape, slot, plan, *limits)
