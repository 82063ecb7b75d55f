"""The host tier: no store block is lost or shared, and every refusal says in one line what to change."""

from __future__ import annotations

import gc
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hybridkv_kernels.recall.tables import STORE_BLOCK
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.worker import host_tier
from hybridkv_vllm.worker.host_tier import (
    GIB,
    HostTier,
    Reservation,
    default_pool_bytes,
    local_ranks,
    requested_pool_bytes,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEAD_SIZE = 8
BLOCK_BYTES = STORE_BLOCK * 16 * 2 * HEAD_SIZE * 2
POOL_BLOCKS = 12
SLOTS = 4
OPTION = "--additional-config.hybridkv."


def make_tier(num_blocks: int = POOL_BLOCKS, device: torch.device = CPU) -> HostTier:
    return HostTier.create(num_blocks * BLOCK_BYTES, HEAD_SIZE, torch.bfloat16, device)


def refusal(caught: pytest.ExceptionInfo[HybridKVConfigError]) -> str:
    """The message, which must be one line with a remedy."""
    message = str(caught.value)
    assert message.startswith("hybridkv: ")
    assert "\n" not in message
    assert f"{OPTION}host_pool_gib" in message
    assert f"{OPTION}dynamic_tier to gpu or off" in message
    return message


# Runs of used pages, as heads have them, also past the end.
SPANS = st.lists(
    st.builds(
        lambda first, count: range(first, first + count),
        st.integers(0, 8 * STORE_BLOCK),
        st.integers(1, 3 * STORE_BLOCK),
    ),
    max_size=3,
)


def blocks_of(reservation: Reservation) -> list[int]:
    """Ids of its blocks, by place."""
    return list(reservation.blocks.values())


class TierMachine(RuleBasedStateMachine):
    """Reserves, trims and releases in any order; reservations of the past are trimmed late."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = make_tier()
        self.free = set(range(POOL_BLOCKS))
        self.held: dict[int, Reservation] = {}
        self.past: list[Reservation] = []
        self.expected: dict[int, dict[int, int]] = {}

    @rule(slot=st.integers(0, SLOTS - 1), num_pages=st.integers(0, 8 * STORE_BLOCK))
    def reserve(self, slot: int, num_pages: int) -> None:
        """Takes free blocks, fewer where the pool is short; what the slot had goes back first."""
        self._forget(slot)
        count = min((num_pages + STORE_BLOCK - 1) // STORE_BLOCK, len(self.free))
        reservation = self.tier.reserve(slot, num_pages)
        assert reservation.slot == slot
        assert sorted(reservation.blocks) == list(range(count))
        assert self.free.issuperset(reservation.blocks.values())
        self.held[slot], self.expected[slot] = reservation, dict(reservation.blocks)
        self.free -= set(reservation.blocks.values())

    @precondition(lambda self: self.held)
    @rule(data=st.data(), used=SPANS)
    def trim(self, data: st.DataObject, used: list[range]) -> None:
        """A block stays where one of its pages is used; what was given back before stays so."""
        slot = data.draw(st.sampled_from(sorted(self.held)))
        self.tier.trim(self.held[slot], used)
        pages = {page for span in used for page in span}
        blocks = self.expected[slot]
        self.expected[slot] = {
            place: block
            for place, block in blocks.items()
            if pages & set(range(place * STORE_BLOCK, (place + 1) * STORE_BLOCK))
        }
        self.free |= set(blocks.values()) - set(self.expected[slot].values())

    @precondition(lambda self: self.past)
    @rule(data=st.data(), used=SPANS)
    def trim_late(self, data: st.DataObject, used: list[range]) -> None:
        """The figures arrive when the request is gone and another may have its slot and blocks."""
        self.tier.trim(data.draw(st.sampled_from(self.past)), used)

    @rule(slot=st.integers(0, SLOTS - 1))
    def release(self, slot: int) -> None:
        """Also of slots that hold nothing."""
        self.tier.release(slot)
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        self.free |= set(self.expected.pop(slot, {}).values())
        if slot in self.held:
            self.past.append(self.held.pop(slot))

    @invariant()
    def blocks_are_conserved_and_in_one_place(self) -> None:
        assert {slot: reservation.blocks for slot, reservation in self.held.items()} == self.expected
        owned = [block for reservation in self.held.values() for block in reservation.blocks.values()]
        assert len(owned) == len(set(owned))
        assert len(owned) + self.tier.num_free_blocks == self.tier.num_blocks == POOL_BLOCKS
        assert self.tier.bytes_held == len(owned) * BLOCK_BYTES

    def teardown(self) -> None:
        for slot in range(SLOTS):
            self.release(slot)
        assert (self.tier.num_free_blocks, self.tier.bytes_held) == (POOL_BLOCKS, 0)
        assert sorted(blocks_of(self.tier.reserve(0, POOL_BLOCKS * STORE_BLOCK))) == list(range(POOL_BLOCKS))


class TestTierMachine(TierMachine.TestCase):
    settings: ClassVar[settings] = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_the_store_has_whole_blocks_of_pages() -> None:
    tier = HostTier.create(3 * BLOCK_BYTES + BLOCK_BYTES // 2, HEAD_SIZE, torch.bfloat16, CPU)
    assert tier.store.shape == (3 * STORE_BLOCK, 16, 2 * HEAD_SIZE)
    assert tier.store.dtype == torch.bfloat16
    assert tier.store.is_contiguous()
    assert tier.store.nbytes == 3 * BLOCK_BYTES
    assert (tier.num_blocks, tier.num_free_blocks, tier.bytes_held) == (3, 3, 0)


def test_a_full_pool_gives_short_reservations_and_recovers() -> None:
    tier = make_tier(4)
    first = tier.reserve(0, 3 * STORE_BLOCK - 1)
    second = tier.reserve(1, 3 * STORE_BLOCK)
    third = tier.reserve(2, 1)
    assert [blocks_of(r) for r in (first, second, third)] == [[0, 1, 2], [3], []]
    assert (first.num_pages, second.num_pages, third.num_pages) == (3 * STORE_BLOCK, STORE_BLOCK, 0)
    tier.trim(first, [range(STORE_BLOCK - 1), range(2 * STORE_BLOCK, 2 * STORE_BLOCK + 1)])
    assert first.blocks == {0: 0, 2: 2}
    assert blocks_of(tier.reserve(2, 5 * STORE_BLOCK)) == [1]
    tier.release(0)
    tier.release(0)
    assert not first.blocks
    tier.release(1)
    assert sorted(blocks_of(tier.reserve(3, 4 * STORE_BLOCK))) == [0, 2, 3]


def test_a_late_trim_leaves_the_next_owner_alone() -> None:
    tier = make_tier(4)
    late = tier.reserve(0, 4 * STORE_BLOCK)
    tier.release(0)
    current = tier.reserve(0, 3 * STORE_BLOCK)
    before = blocks_of(current)
    tier.trim(late, ())
    assert blocks_of(current) == before
    assert len(before) == 3
    assert tier.num_free_blocks == 1


def test_less_than_a_block_is_refused() -> None:
    with pytest.raises(HybridKVConfigError) as caught:
        HostTier.create(BLOCK_BYTES - 1, HEAD_SIZE, torch.bfloat16, CPU)
    message = refusal(caught)
    assert f"{BLOCK_BYTES / GIB:.6f} GiB" in message
    assert f"larger {OPTION}host_pool_gib" in message


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(HybridKVConfigError) as caught:
        HostTier.create(2**50, HEAD_SIZE, torch.bfloat16, CPU)
    message = refusal(caught)
    assert "1048576.00 GiB" in message
    assert "memlock" in message


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("out of memory\nand a long report"), RuntimeError("no\nmemory")],
    ids=["host", "device", "other"],
)
def test_a_failed_allocation_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(host_tier.torch, "empty", fail)
    with pytest.raises(HybridKVConfigError) as caught:
        HostTier.create(5 * GIB // 2, HEAD_SIZE, torch.bfloat16, CUDA)
    monkeypatch.undo()
    message = refusal(caught)
    assert "2.50 GiB" in message
    assert (str(error).splitlines() or ["MemoryError"])[0] in message


class FakeCuda:
    """CUDA's pinning, without a device: which address ranges are pinned now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0, *, deaf: bool = False) -> None:
        self.pinned: dict[int, int] = {}
        self.error = error
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(
            torch.Tensor, "is_pinned", lambda tensor: not deaf and tensor.data_ptr() in self.pinned
        )
        monkeypatch.setattr(
            host_tier, "get_accelerator_view_from_cpu_tensor", lambda tensor: tensor.view(tensor.shape)
        )

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> SimpleNamespace:
        assert flags == 0
        if not self.error:
            self.pinned[address] = num_bytes
        return SimpleNamespace(value=self.error)

    def cudaHostUnregister(self, address: int) -> SimpleNamespace:
        del self.pinned[address]
        return SimpleNamespace(value=0)


def test_on_cuda_the_store_is_pinned_as_long_as_the_tier_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    tier = make_tier(3, CUDA)
    assert cuda.pinned == {tier.store.data_ptr(): 3 * BLOCK_BYTES}
    assert tier.num_blocks == 3
    del tier
    gc.collect()
    assert cuda.pinned == {}


@pytest.mark.parametrize(("error", "deaf"), [(2, False), (0, True)], ids=["refused", "without effect"])
def test_a_failed_pin_is_refused(monkeypatch: pytest.MonkeyPatch, error: int, deaf: bool) -> None:
    FakeCuda(monkeypatch, error, deaf=deaf)
    with pytest.raises(HybridKVConfigError) as caught:
        make_tier(3, CUDA)
    message = refusal(caught)
    assert "cudaHostRegister" in message
    assert "memlock" in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_reads_and_writes_the_host_store() -> None:
    tier = make_tier(3, torch.device("cuda", 0))
    assert tier.store.is_cuda
    before = torch.cuda.memory_allocated()
    pages = torch.randn(tier.store.shape, device="cuda").to(tier.store.dtype)
    used = torch.cuda.memory_allocated() - before
    tier.store.copy_(pages)
    assert torch.equal(tier.store.clone(), pages)
    # The view is of host memory: nothing but `pages` lies on the device.
    assert torch.cuda.memory_allocated() - before == used


@pytest.fixture
def memory_gib(monkeypatch: pytest.MonkeyPatch) -> int:
    """A container limited to 64 GiB on a machine of 512."""
    monkeypatch.setattr(
        host_tier.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 512 * GIB // 4096}.__getitem__
    )
    monkeypatch.setattr(host_tier, "get_cgroup_memory_limit", lambda: 64 * GIB)
    return 64


@pytest.mark.parametrize(
    ("kv_gib", "budget", "ranks", "expected_gib"),
    [(100, 0.1, 1, 16), (100, 0.1, 4, 4), (1, 0.25, 1, 4), (1, 0.25, 4, 4), (1, 0.25, 8, 2), (3, 1.0, 1, 3)],
)
def test_the_default_size(memory_gib: int, kv_gib: int, budget: float, ranks: int, expected_gib: int) -> None:
    assert default_pool_bytes(kv_gib * GIB, budget, ranks) == expected_gib * GIB


def test_without_a_container_limit_the_machine_counts(
    memory_gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_tier, "get_cgroup_memory_limit", lambda: None)
    assert default_pool_bytes(1000 * GIB, 0.1, 2) == 64 * GIB
    monkeypatch.setattr(host_tier, "get_cgroup_memory_limit", lambda: 2**60)
    assert default_pool_bytes(1000 * GIB, 0.1, 2) == 64 * GIB


def test_a_requested_size_is_exactly_that_up_to_the_memory(memory_gib: int) -> None:
    assert requested_pool_bytes(1.5, 2) == 3 * GIB // 2
    assert requested_pool_bytes(memory_gib / 4, 4) == 16 * GIB
    for gib, ranks in ((memory_gib / 4 + 0.25, 4), (memory_gib + 1, 1)):
        with pytest.raises(HybridKVConfigError) as caught:
            requested_pool_bytes(gib, ranks)
        message = refusal(caught)
        assert re.search(rf"{gib:g} GiB for each of {ranks} ranks .* 64.0 GiB", message)
        assert f"smaller {OPTION}host_pool_gib" in message


# vLLM says 0 of a node that holds no replica.
@pytest.mark.parametrize(("replicas", "ranks"), [(0, 4), (1, 4), (2, 8)])
def test_replicas_share_the_memory_of_their_node(replicas: int, ranks: int) -> None:
    parallel = SimpleNamespace(local_world_size=4, data_parallel_size_local=replicas)
    assert local_ranks(parallel) == ranks


def test_the_real_machine_has_a_default() -> None:
    assert 0 < default_pool_bytes(2**60, 0.1, 1) < 2**50
