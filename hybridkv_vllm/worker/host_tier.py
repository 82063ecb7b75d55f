"""The host memory that holds every chunk of the dynamic heads: one pool a worker, given out by blocks."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from hybridkv_kernels.recall.tables import STORE_BLOCK
from torch import Tensor
from vllm.config import ParallelConfig
from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.plan import PAGE_TOKENS

GIB = 2**30
# Share of the machine's memory that all ranks of a node take together where nothing else is said.
DEFAULT_MEMORY_DIVISOR = 4
POOL_OPTION = "--additional-config.hybridkv.host_pool_gib"
OTHER_TIERS = "set --additional-config.hybridkv.dynamic_tier to gpu or off"


@dataclass(eq=False)
class Reservation:
    """The store blocks of one request.

    Attributes:
        slot: the request's slot.
        blocks: ids of store blocks, by place: logical store page j is page `j % 64` of `blocks[j // 64]`.
            Those given back are missing; empty once all is released.
    """

    slot: int
    blocks: dict[int, int]

    @property
    def num_pages(self) -> int:
        """Store pages that the blocks hold."""
        return len(self.blocks) * STORE_BLOCK


class HostTier:
    """Store pages on the host, reserved by request slot in blocks of 64.

    A block may get its next owner while the device has yet to run the last owner's reads: all device work on
    the store is in one order (copies to it wait for the main stream, which then waits for them), so the next
    owner's writes come after them.

    Attributes:
        store: `[num_blocks * 64, 16, 2 * D]` in the pool's dtype, as the device sees it: a view of pinned
            host memory on CUDA, an ordinary tensor on CPU. Valid while the tier lives; not initialised.
    """

    def __init__(self, store: Tensor) -> None:
        """Gives out the blocks of `store`, whose pages are a multiple of 64."""
        self.store = store
        self._block_bytes = STORE_BLOCK * store[0].nbytes
        # A stack: sorting it would cost a millisecond a request in a pool of 64 GiB.
        self._free = list(reversed(range(self.num_blocks)))
        self._reservations: dict[int, Reservation] = {}

    @classmethod
    def create(cls, num_bytes: int, head_size: int, dtype: torch.dtype, device: torch.device) -> HostTier:
        """Allocates the store, and on CUDA pins it (seconds for many GiB).

        Args:
            num_bytes: size, rounded down to whole blocks.
            head_size: D.
            dtype: the KV cache's.
            device: where the kernels run that use the store.

        Raises:
            HybridKVConfigError: less than one block, or the memory is not to be had.
        """
        block_bytes = store_block_bytes(head_size, dtype)
        num_blocks = num_bytes // block_bytes
        if num_blocks < 1:
            raise HybridKVConfigError(
                f"a host pool of {num_bytes / GIB:.6f} GiB is less than its smallest unit, "
                f"{block_bytes / GIB:.6f} GiB; give a larger {POOL_OPTION}, or {OTHER_TIERS}"
            )
        try:
            host = torch.empty(
                num_blocks * STORE_BLOCK, PAGE_TOKENS, 2 * head_size, dtype=dtype, device="cpu"
            )
            if device.type != "cuda":
                return cls(host)
            _pin(host)
            tier = cls(get_accelerator_view_from_cpu_tensor(host))
        except (RuntimeError, MemoryError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise HybridKVConfigError(
                f"{num_bytes / GIB:.2f} GiB of host memory for the chunks of dynamic heads are not to be had "
                f"({reason}); give a smaller {POOL_OPTION}, or the container more memory and a higher limit "
                f"of pinned memory (memlock), or {OTHER_TIERS}"
            ) from None
        # At exit the process' memory goes in any case, and CUDA may be gone by then.
        weakref.finalize(tier, _unpin, host).atexit = False
        return tier

    @property
    def num_blocks(self) -> int:
        """Blocks of the store."""
        return self.store.shape[0] // STORE_BLOCK

    @property
    def num_free_blocks(self) -> int:
        """Blocks in no reservation."""
        return len(self._free)

    @property
    def bytes_held(self) -> int:
        """Bytes of the reserved blocks."""
        return (self.num_blocks - self.num_free_blocks) * self._block_bytes

    def reserve(self, slot: int, num_pages: int) -> Reservation:
        """Reserves blocks for `num_pages` store pages, or as many as are free; perhaps none.

        A reservation that the slot still had is released before.
        """
        self.release(slot)
        count = min(_blocks_of(num_pages), self.num_free_blocks)
        reservation = Reservation(slot, {place: self._free.pop() for place in range(count)})
        self._reservations[slot] = reservation
        return reservation

    def trim(self, reservation: Reservation, used: Iterable[range]) -> None:
        """Gives back the blocks that hold none of the logical store pages in `used`.

        No effect on a reservation released meanwhile, whoever has its slot and blocks now.
        """
        kept = {
            place for pages in used for place in range(pages.start // STORE_BLOCK, _blocks_of(pages.stop))
        }
        unused = [place for place in reservation.blocks if place not in kept]
        self._free += [reservation.blocks.pop(place) for place in unused]

    def release(self, slot: int) -> None:
        """Gives back all that the slot has; no effect where it has nothing."""
        reservation = self._reservations.pop(slot, None)
        if reservation is not None:
            self.trim(reservation, ())


def node_share() -> int:
    """Bytes that all ranks of this node take together by default, at most: a quarter of its memory."""
    return _node_memory() // DEFAULT_MEMORY_DIVISOR


def default_pool_bytes(kv_bytes: int, budget: float, ranks: int) -> int:
    """Size of one rank's host pool in bytes where the option `host_pool_gib` names none.

    The ranks share `node_share`, but no rank takes more than the uncompressed KV of all the prompts whose
    compressed form could fill its cache.

    Args:
        kv_bytes: this rank's KV cache on the device.
        budget: share of a prompt's KV cache that stays on the device, above 0.
        ranks: ranks on this node.
    """
    return min(node_share() // ranks, int(kv_bytes / budget))


def requested_pool_bytes(gib: float, ranks: int) -> int:
    """Size of one rank's host pool in bytes, of `host_pool_gib`; `ranks` ranks are on this node.

    Raises:
        HybridKVConfigError: the sizes asked for exceed, taken together, this node's memory.
    """
    num_bytes, memory = int(gib * GIB), _node_memory()
    if num_bytes * ranks > memory:
        raise HybridKVConfigError(
            f"a host pool of {gib:.9g} GiB for each of {ranks} ranks is more than the "
            f"{memory / GIB:.1f} GiB of this machine or container; "
            f"give a smaller {POOL_OPTION}, or {OTHER_TIERS}"
        )
    return num_bytes


def store_block_bytes(head_size: int, dtype: torch.dtype) -> int:
    """Bytes of a store block, the least that a tier can hold, for heads of size `head_size`."""
    return STORE_BLOCK * PAGE_TOKENS * 2 * head_size * dtype.itemsize


def local_ranks(parallel: ParallelConfig) -> int:
    """Ranks on this node, of all its replicas."""
    return int(parallel.local_world_size * max(parallel.data_parallel_size_local, 1))


def _blocks_of(num_pages: int) -> int:
    """Store blocks that hold `num_pages`."""
    return -(-num_pages // STORE_BLOCK)


def _node_memory() -> int:
    """Bytes of memory that this node, or the container if it is limited, has."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit: int | None = get_cgroup_memory_limit()
    return machine if limit is None else min(machine, limit)


def _pin(host: Tensor) -> None:
    """Pins a tensor where it is (`pin_memory=True` would round its size up to a power of two).

    Raises:
        RuntimeError: CUDA refuses.
    """
    error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    if error.value != 0:
        raise RuntimeError(f"cudaHostRegister: {error}")
    # vLLM's view of a tensor that torch does not take for pinned would be a view of a second, pinned copy.
    if not host.is_pinned():
        raise RuntimeError("cudaHostRegister did not pin it")


def _unpin(host: Tensor) -> None:
    """Undoes `_pin`: memory freed while pinned would stay with the driver."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
