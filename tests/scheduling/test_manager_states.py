"""Random lives of requests over the real block manager and BlockPool: no block is lost or shared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pools import SPEC, make_pool, make_request
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request, RequestStatus

from hybridkv_vllm.config import parse_server_options
from hybridkv_vllm.plan import PAGE_TOKENS, PromptPlan, Tier, ceil_pages, make_plan

POOL_BLOCKS = 40


@dataclass
class Life:
    """What an outside observer knows of one request.

    Attributes:
        in_flight: tokens scheduled but not processed.
    """

    request: Request
    plan: PromptPlan | None
    in_flight: int = 0

    @property
    def processed(self) -> int:
        return int(self.request.num_computed_tokens) - self.in_flight


class ManagerMachine(RuleBasedStateMachine):
    """Admits, schedules, processes, preempts, resumes and finishes requests in any order."""

    @initialize(caching=st.booleans())
    def start(self, caching: bool) -> None:
        self.manager, self.ours = make_pool(POOL_BLOCKS, 512, caching=caching)
        self.pool = self.manager.block_pool
        self.free_at_start = self.pool.get_num_free_blocks()
        self.lives: dict[str, Life] = {}
        self.count = 0
        self.exact: dict[int, tuple[int, ...]] = {}

    @rule(
        length=st.integers(1, 200),
        family=st.integers(0, 2),
        budget=st.sampled_from([None, 0.1, 0.25, 1.0]),
        tier=st.sampled_from(["off", "host", "gpu"]),
    )
    def arrive(self, length: int, family: int, budget: float | None, tier: Tier) -> None:
        """Prompts of one family share their prefix, so prefix hits occur."""
        self.count += 1
        request = make_request(
            range(family * 1000, family * 1000 + length),
            max_tokens=64,
            name=f"r{self.count}",
            block_hasher=get_request_block_hasher(PAGE_TOKENS, sha256),
        )
        plan = None
        if budget is not None and length >= PAGE_TOKENS:
            plan = make_plan(length, (), budget, 24, tier)
            self.ours.add_plan(request.request_id, plan)
        self.lives[request.request_id] = Life(request, plan)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), chunk=st.integers(1, 96))
    def schedule(self, data: st.DataObject, chunk: int) -> None:
        """Schedules a chunk or a decode of one request, as far as the pool allows."""
        life = self._pick(data)
        request, plan = life.request, life.plan
        first = request.request_id not in self.ours.num_cached_block and not self._holds(request)
        computed, hits, hit_blocks = request.num_computed_tokens, 0, None
        if first:
            hit_blocks, hits, _ = self.manager.get_computed_blocks(request)
            if plan is not None:
                longest = plan.last_chunk_start // PAGE_TOKENS * PAGE_TOKENS
                if hits > longest:
                    hits, hit_blocks = longest, self.manager.truncate_computed_blocks(hit_blocks, longest)
        start = computed + hits
        length = min(chunk, request.num_tokens - start)
        if plan is not None:
            length = plan.clip_chunk(start, length)
        if length <= 0:
            return
        blocks = self.manager.allocate_slots(
            request,
            length,
            num_new_computed_tokens=hits,
            new_computed_blocks=hit_blocks,
            full_sequence_must_fit=first,
        )
        if blocks is None:
            return
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = start + length
        request.num_in_flight_tokens += length
        life.in_flight += length
        for grant in self.ours.take_grants():
            assert grant.request_id == request.request_id
            assert plan is not None
            assert request.num_computed_tokens == plan.num_tokens, "granted on the step that ends the prefill"
            assert len(grant.block_ids) == plan.arena_size

    @precondition(lambda self: any(life.in_flight for life in self.lives.values()))
    @rule(data=st.data())
    def process(self, data: st.DataObject) -> None:
        """A step's output arrives: its tokens are processed, and a full sequence grows by one token."""
        life = data.draw(st.sampled_from([life for life in self.lives.values() if life.in_flight]))
        request = life.request
        life.in_flight, request.num_in_flight_tokens = 0, 0
        self.manager.remove_skipped_blocks(
            request.request_id, request.num_computed_tokens, request.num_prompt_tokens
        )
        if request.num_computed_tokens >= request.num_tokens:
            request.append_output_token_ids(7)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        life = self._pick(data)
        self.manager.free(life.request)
        life.request.num_computed_tokens = life.request.num_in_flight_tokens = life.in_flight = 0
        life.request.status = RequestStatus.PREEMPTED

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Finished or aborted, at any point of its life."""
        life = self._pick(data)
        self.manager.free(life.request)
        self.ours.drop_plan(life.request.request_id)
        del self.lives[life.request.request_id]

    @invariant()
    def blocks_are_conserved(self) -> None:
        if not hasattr(self, "pool"):
            return
        holders = Counter(
            block.block_id
            for blocks in (*self.ours.req_to_blocks.values(), *self.ours.arenas.values())
            for block in blocks
            if not block.is_null
        )
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == holders[block.block_id]
        assert self.pool.get_num_free_blocks() == self.free_at_start - len(holders)
        if not self.lives:
            assert not holders
            assert not self.ours.plans

    @invariant()
    def arenas_are_private(self) -> None:
        if not hasattr(self, "pool"):
            return
        tables = self.ours.req_to_blocks.values()
        ordinary = {block.block_id for blocks in tables for block in blocks if not block.is_null}
        arenas = [block for blocks in self.ours.arenas.values() for block in blocks]
        assert len({block.block_id for block in arenas}) == len(arenas)
        assert not ordinary & {block.block_id for block in arenas}
        assert all(block.block_hash is None for block in arenas), "an arena block is never a prefix-cache hit"

    @invariant()
    def requests_hold_what_they_should(self) -> None:
        for request_id, life in getattr(self, "lives", {}).items():
            plan, blocks = life.plan, self.ours.req_to_blocks.get(request_id, [])
            if plan is None:
                assert request_id not in self.ours.arenas
                continue
            reached = life.request.num_computed_tokens >= plan.num_tokens
            assert (request_id in self.ours.arenas) == reached
            released = life.processed >= plan.num_tokens and reached
            held = sum(not block.is_null for block in blocks)
            if plan.keeps_prompt_blocks:
                # Chunks are recalled from them to the request's end.
                assert held == len(blocks) >= ceil_pages(life.request.num_computed_tokens)
            elif released and life.in_flight == 0:
                tail = ceil_pages(life.request.num_computed_tokens) - plan.num_full_blocks
                assert held == tail
            elif reached and life.processed < plan.num_tokens:
                assert held >= plan.num_full_blocks, "given back before the step was processed"
            for block in blocks[plan.num_full_blocks :]:
                assert block.block_hash is None, "a tail block of a compressed request was registered"

    def teardown(self) -> None:
        for request_id in list(getattr(self, "lives", {})):
            life = self.lives.pop(request_id)
            self.manager.free(life.request)
            self.ours.drop_plan(request_id)
        if hasattr(self, "pool"):
            assert self.pool.get_num_free_blocks() == self.free_at_start

    def _pick(self, data: st.DataObject) -> Life:
        return self.lives[data.draw(st.sampled_from(sorted(self.lives)))]

    def _holds(self, request: Request) -> bool:
        return bool(self.ours.req_to_blocks.get(request.request_id))


ManagerMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestManagerStates = ManagerMachine.TestCase


@pytest.mark.parametrize(
    ("options", "longest", "blocks"),
    [
        ({"budget": 0.25}, 512, 32 + 8),
        ({"budget": 0.25}, 500, 32 + 8),
        # Its arena is the whole prompt, whatever budget is asked.
        ({"budget": 0.25, "policy": "full"}, 512, 32 + 32),
    ],
)
def test_the_largest_prompt_fits_a_pool_of_what_the_spec_asks_for(
    options: dict[str, Any], longest: int, blocks: int
) -> None:
    """`max_memory_usage_bytes` counts prompt and arena, so that one longest request always fits."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest), additional_config={"hybridkv": options}
    )
    assert SPEC.max_memory_usage_bytes(config) == blocks * SPEC.page_size_bytes
    # The null block comes on top, as in vLLM's own check.
    manager, ours = make_pool(blocks + 1, longest)
    request = make_request(longest - 1, max_tokens=1)
    budget = parse_server_options(options).budget_share
    ours.add_plan("r", make_plan(longest - 1, (), budget, longest_window=64))
    assert manager.allocate_slots(request, longest - 1, full_sequence_must_fit=True) is not None


@pytest.mark.parametrize("budget", [0.1, 0.25, 1.0])
def test_a_compressed_request_holds_its_arena_and_its_tail(budget: float) -> None:
    manager, ours = make_pool(200)
    free = manager.block_pool.get_num_free_blocks()
    request = make_request(1000)
    plan = make_plan(1000, (), budget, longest_window=64)
    ours.add_plan("r", plan)
    assert manager.allocate_slots(request, 1000) is not None
    assert free - manager.block_pool.get_num_free_blocks() == 63 + plan.arena_size
    manager.remove_skipped_blocks("r", 1000, 1000)
    assert free - manager.block_pool.get_num_free_blocks() == 1 + plan.arena_size
    assert plan.arena_size == -(-round(budget * 1000) // 16)


def test_a_request_that_goes_in_the_step_of_its_arena_leaves_no_grant() -> None:
    manager, ours = make_pool(40)
    request = make_request(64)
    ours.add_plan("r", make_plan(64, (), 0.25, longest_window=32))
    assert manager.allocate_slots(request, 64) is not None
    assert ours.num_arena_blocks == 1
    manager.free(request)
    assert ours.take_grants() == []
