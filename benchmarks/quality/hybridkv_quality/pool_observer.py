"""What requests really hold: read between steps, from the scheduler's own block lists and the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybridkv_vllm.observe.heads import RequestHeads, read_heads
from hybridkv_vllm.plan import PAGE_TOKENS, ceil_pages
from hybridkv_vllm.scheduling.manager import HybridKVManager


@dataclass
class Held:
    """A prompt's memory while its answer was decoded.

    Attributes:
        blocks: the arena, and the prompt's own blocks that had not been given back.
        compressed: whether there was an arena.
        on_host: whether chunks of heads that recall lie in host memory.
        heads: how its KV heads were judged; None until the worker has said so, and where nothing was judged.
    """

    blocks: int
    compressed: bool
    on_host: bool
    heads: RequestHeads | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing more will become known."""
        return not self.compressed or self.heads is not None

    def host_bytes(self, block_bytes: int) -> int | None:
        """Bytes of the prompt's chunks in host memory: its full pages, of each head that recalls."""
        if not self.on_host:
            return 0
        if self.heads is None:
            return None
        verdicts = [head for layer in self.heads.layers for head in layer]
        pages = self.heads.prompt_tokens // PAGE_TOKENS
        return sum(head.recalled for head in verdicts) * pages * (block_bytes // len(verdicts))


class PoolObserver:
    """Looks at an engine in this process (its scheduler, in vLLM 0.32) without changing it."""

    def __init__(self, llm: Any) -> None:
        """Finds the block manager of a started `vllm.LLM` with the backend `hybridkv`.

        Raises:
            RuntimeError: the engine runs in a process of its own, or with another backend.
        """
        core = getattr(llm.llm_engine.engine_core, "engine_core", None)
        if core is None:
            raise RuntimeError("the engine is in another process; set VLLM_ENABLE_V1_MULTIPROCESSING=0")
        self._scheduler = core.scheduler
        (manager,) = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        if not isinstance(manager, HybridKVManager):
            raise RuntimeError(
                f"the block manager is {type(manager).__name__}; start with the backend hybridkv"
            )
        self._manager = manager
        cache = self._scheduler.kv_cache_config
        self.block_bytes: int = sum(tensor.size for tensor in cache.kv_cache_tensors) // cache.num_blocks
        self._held: dict[str, Held] = {}

    def look(self) -> None:
        """Notes the requests whose prompt is settled since the last look; call after each step."""
        for request in self._scheduler.running:
            request_id = request.request_id
            if request_id in self._held or not self._is_settled(request):
                continue
            own = self._manager.req_to_blocks[request_id][: ceil_pages(request.num_prompt_tokens)]
            arena = self._manager.arenas.get(request_id, ())
            plan = self._manager.plans.get(request_id)
            self._held[request_id] = Held(
                blocks=len(arena) + sum(not block.is_null for block in own),
                compressed=bool(arena),
                on_host=plan is not None and plan.tier == "host",
            )
        if not all(held.is_complete for held in self._held.values()):
            # A step later than the scheduler; workers keep the latest 16 requests only.
            for heads in read_heads():
                if heads.request_id in self._held:
                    self._held[heads.request_id].heads = heads

    def _is_settled(self, request: Any) -> bool:
        """Whether the step that ends the prompt is processed, and what can be given back has been."""
        plan = self._manager.plans.get(request.request_id)
        if plan is None or plan.keeps_prompt_blocks:
            return bool(request.num_output_tokens > 0)
        return self._manager.is_released(request.request_id)

    def held(self, request_id: str) -> Held | None:
        """What the request was seen to hold; None if it ended with its first token."""
        return self._held.get(request_id)

    def forget(self, request_id: str) -> None:
        """Drops what was noted of a request that is reported."""
        self._held.pop(request_id, None)
