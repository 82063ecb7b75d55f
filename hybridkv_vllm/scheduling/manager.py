"""The block manager: reserves arenas, returns prompt blocks, keeps approximate KV out of the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from hybridkv_vllm.plan import ArenaGrant, PromptPlan


class HybridKVManager(FullAttentionManager):
    """Full attention blocks plus one arena for each request whose prompt is compressed.

    A planned request holds: its prompt's blocks until the step that ends the prefill is processed (with the
    tier `gpu` to its own end), the arena from the moment that step is scheduled, and the ordinary blocks of
    its tail. Everything else is vLLM's `FullAttentionManager` (read in 0.32.0 and 0.33.0).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, PromptPlan] = {}
        self.arenas: dict[str, list[KVCacheBlock]] = {}
        self._new_arenas: set[str] = set()
        # Prompt blocks given back, by request; an encoder-cache connector may hold blocks longer than plans.
        self._released: dict[str, int] = {}

    def add_plan(self, request_id: str, plan: PromptPlan) -> None:
        """Announces a request whose prompt will be compressed; before its first allocation."""
        self.plans[request_id] = plan

    def drop_plan(self, request_id: str) -> None:
        """Forgets a request that has gone for good (a preempted one keeps its plan)."""
        self.plans.pop(request_id, None)

    @property
    def num_arena_blocks(self) -> int:
        """Blocks that arenas hold now."""
        return sum(map(len, self.arenas.values()))

    @property
    def num_replaced_blocks(self) -> int:
        """Prompt blocks that requests have given back and would hold now without compression."""
        return sum(self._released.values())

    def num_usable_blocks(self) -> int:
        """Blocks that requests can hold at all (the null block is nobody's)."""
        return self.block_pool.num_gpu_blocks - 1

    def take_grants(self) -> list[ArenaGrant]:
        """Drains the arenas reserved since the last call, as far as they are still held."""
        grants = [
            ArenaGrant(
                request_id=request_id,
                plan=self.plans[request_id],
                block_ids=tuple(block.block_id for block in self.arenas[request_id]),
            )
            for request_id in sorted(self._new_arenas)
        ]
        self._new_arenas.clear()
        return grants

    def is_released(self, request_id: str) -> bool:
        """Whether the request's prompt blocks have gone back to the pool."""
        return request_id in self._released

    def _missing_arena(self, request_id: str, num_tokens: int) -> int:
        """Arena blocks that must still be reserved for the request to reach `num_tokens`."""
        plan = self.plans.get(request_id)
        if plan is None or request_id in self.arenas or num_tokens < plan.num_tokens:
            return 0
        return plan.arena_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """As in vLLM, plus the arena on the step that ends the prefill (and in the admission check)."""
        ordinary = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        return ordinary + self._missing_arena(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """As in vLLM; the arena is reserved beside and is not part of the returned block table."""
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        missing = self._missing_arena(request_id, num_tokens)
        if missing:
            self.arenas[request_id] = self.block_pool.get_new_blocks(missing)
            self._new_arenas.add(request_id)
        return new_blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As in vLLM, but a compressed request registers its prompt only.

        Its tail was computed from compressed KV: a later turn must not reuse it as exact.
        """
        plan = self.plans.get(request.request_id)
        if plan is not None:
            num_tokens = min(num_tokens, plan.num_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Returns the prompt's full blocks once the step that filled the arena is processed.

        Unless chunks are recalled from them. On *processed* tokens: with async scheduling a step in flight
        may still read the prompt.
        """
        del num_prompt_tokens
        plan = self.plans.get(request_id)
        if (
            plan is None
            or plan.keeps_prompt_blocks
            or request_id not in self.arenas
            or request_id in self._released
            or processed_computed_tokens < plan.num_tokens
        ):
            return
        self._remove_blocks_in_range(request_id, 0, plan.num_full_blocks)
        self._released[request_id] = plan.num_full_blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks, arena first, so that freeing in reverse order gives the tail back first."""
        self._new_arenas.discard(request_id)
        self._released.pop(request_id, None)
        return self.arenas.pop(request_id, []) + super().pop_blocks_for_free(request_id)
