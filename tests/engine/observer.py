"""Counts at vLLM's block pool and at the worker's tables what HybridKV's counters have to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import Engine
from hybridkv_kernels.recall.chunks import hot_slot_entries
from torch import Tensor

from hybridkv_vllm.worker.state import HybridKVModelState


class Observer:
    """Looks at an engine from outside, without reading a counter.

    Attributes:
        given_back: request and number of blocks, each time that it gave some back without ending.
        kept: request and tokens on the GPU, mean over KV heads, each time that a compressed one left.
        preempted: ids, once each time.
        chunks: of each compressed request, since it was compressed last, the hot chunks that its steps found
            hot already, and those that they made hot.
    """

    def __init__(self, ours: Engine, patch: pytest.MonkeyPatch) -> None:
        self._ours = ours
        self._prompts: dict[str, int] = {}
        self.given_back: list[tuple[str, int]] = []
        self.kept: list[tuple[str, float]] = []
        self.preempted: list[str] = []
        self.chunks: dict[str, tuple[int, int]] = {}
        self._chunks_before: list[tuple[int, int]] = []
        state = ours.core.model_executor.driver_worker.worker.model_runner.model_state
        assert isinstance(state, HybridKVModelState)
        self._tables = state._tables
        assert self._tables is not None
        assert state._log is not None
        self._log = state._log
        assert self._tables.recall is not None
        for owner, name, see in (
            (ours.scheduler, "add_request", self._see_arrival),
            (ours.scheduler, "_preempt_request", self._see_preemption),
            (ours.manager, "remove_skipped_blocks", self._see_return),
            (self._tables, "reset", self._see_end),
            (self._tables.recall, "decode", self._see_step),
        ):
            patch.setattr(owner, name, seen_by(getattr(owner, name), see))

    def collect(self) -> None:
        """Lets the worker count what has arrived."""
        self._log.collect()

    @property
    def num_kv_heads(self) -> int:
        """Over all layers."""
        return int(self._tables.decode.extents[0, :, :, 0].numel())

    def prompt_tokens(self, request_id: str) -> int:
        """Of a request that has arrived."""
        return self._prompts[request_id]

    def _see_arrival(self, call: Callable[[], Any], request: Any) -> Any:
        self._prompts[given(request.request_id)] = request.num_prompt_tokens
        return call()

    def _see_preemption(self, call: Callable[[], Any], request: Any, *_: Any) -> Any:
        request_id = given(request.request_id)
        self.preempted.append(request_id)
        self._chunks_before.append(self.chunks.pop(request_id, (0, 0)))
        return call()

    def _see_return(self, call: Callable[[], Any], request_id: str, *_: Any) -> Any:
        before = self._references()
        result = call()
        if gone := before - self._references():
            self.given_back.append((given(request_id), gone))
        return result

    def _see_end(self, call: Callable[[], Any], slot: int) -> Any:
        tables = self._tables.decode
        if tail_start := int(tables.tail_start[slot]):
            request_id = given(self._tables.grants[slot].request_id)
            kept = tables.extents[slot, :, :, 1].double().mean()
            self.kept.append((request_id, float(kept) + self._prompts[request_id] - tail_start))

        return call()

    def _see_step(
        self,
        call: Callable[[], Any],
        query: Tensor,
        pool: Tensor,
        out: Tensor,
        row_slot: Tensor,
        row_len: Tensor,
        decode: Any,
        layer: int,
        scale: float,
    ) -> Any:
        """Of one layer. The option `recall_interval` has to be 1: else some steps choose nothing."""
        slots = [slot for slot in row_slot.tolist() if slot in self._tables.grants]
        before = [self._hot_chunks(slot, layer) for slot in slots]
        result = call()
        for slot, hot in zip(slots, before, strict=True):
            now = self._hot_chunks(slot, layer)
            request_id = given(self._tables.grants[slot].request_id)
            seen = self.chunks.get(request_id, (0, 0))
            self.chunks[request_id] = seen[0] + int((now & hot).sum()), seen[1] + int((now & ~hot).sum())
        return result

    @property
    def all_chunks(self) -> tuple[int, int]:
        """Of all requests and all their lives."""
        hit, recalled = zip(*self._chunks_before, *self.chunks.values(), strict=True)
        return sum(hit), sum(recalled)

    def _hot_chunks(self, slot: int, layer: int) -> Tensor:
        """Which chunks of the heads that recall lie in the arena, `[heads, chunks]` bool."""
        recall, pool = self._tables.recall, self._tables.pool
        heads = (recall.tables.chunk_first[slot, layer] >= 0).nonzero().flatten()
        chunks = int(recall.tables.prompt_len[slot]) // 16
        entries = hot_slot_entries(slot, layer, heads, chunks, self._tables.decode, recall.landmarks.layout)
        return pool.view(torch.int32).flatten()[entries] >= 0

    def _references(self) -> int:
        """Holders of all blocks: a block that two requests share counts twice."""
        return sum(block.ref_cnt for block in self._ours.pool.blocks if not block.is_null)

    def num_arena_blocks(self) -> int:
        """Blocks that are held and yet in no request's block list."""
        return self._references() - sum(not block.is_null for block in self._listed())

    def num_replaced_blocks(self) -> int:
        """Places in requests' block lists whose block is gone."""
        return sum(block.is_null for block in self._listed())

    def _listed(self) -> list[Any]:
        return [block for blocks in self._ours.manager.req_to_blocks.values() for block in blocks]


def given(request_id: str) -> str:
    """The id as it was given; vLLM adds a random part."""
    return request_id.partition("-")[0]


def seen_by(method: Callable[..., Any], see: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose calls `see` makes instead: it gets the call, and the arguments by position."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return see(lambda: method(*args, **kwargs), *args)

    return wrapper
