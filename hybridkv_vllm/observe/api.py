"""The HTTP routes (vLLM endpoint plugin `hybridkv_api`): read-only, nothing of a prompt's content."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, Field

from hybridkv_vllm.config import ServerOptions, server_options
from hybridkv_vllm.observe.metrics import read_samples

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


class Stats(BaseModel):
    """What compression has done since the server started."""

    requests_compressed: int = Field(description="Prompts whose KV cache was compressed.")
    prompt_tokens: int = Field(description="Tokens of those prompts.")
    kept_tokens: float = Field(description="Tokens kept per KV head, mean over heads, summed over prompts.")
    kept_share: float | None = Field(description="kept_tokens / prompt_tokens; null before the first prompt.")
    blocks_freed: int = Field(description="Prompt blocks given back to the pool.")
    blocks_arena: int = Field(description="Blocks that hold compressed prompts now.")
    heads: dict[str, int] = Field(description="KV heads classified so far, by type.")
    fallbacks: dict[str, int] = Field(description="Requests served uncompressed, by reason.")
    options: ServerOptions | None = Field(description="The server's options.")


def current_stats(options: ServerOptions | None) -> Stats:
    """Reads the counters of all processes of this server."""
    totals: dict[str, float] = {}
    labelled: dict[str, dict[str, int]] = {"hybridkv_heads": {}, "hybridkv_fallbacks_total": {}}
    for name, labels, value in read_samples():
        if name in labelled:
            labelled[name][next(iter(labels.values()))] = int(value)
        else:
            totals[name] = value
    prompt_tokens = int(totals.get("hybridkv_prompt_tokens_total", 0))
    kept_tokens = totals.get("hybridkv_kept_tokens_total", 0.0)
    return Stats(
        requests_compressed=int(totals.get("hybridkv_requests_compressed_total", 0)),
        prompt_tokens=prompt_tokens,
        kept_tokens=kept_tokens,
        kept_share=kept_tokens / prompt_tokens if prompt_tokens else None,
        blocks_freed=int(totals.get("hybridkv_blocks_freed_total", 0)),
        blocks_arena=int(totals.get("hybridkv_blocks_arena", 0)),
        heads=labelled["hybridkv_heads"],
        fallbacks=labelled["hybridkv_fallbacks_total"],
        options=options,
    )


class HybridKVEndpoints:
    """Implements vLLM's `EndpointPlugin` protocol."""

    name = "hybridkv_api"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def __init__(self) -> None:
        self._options: ServerOptions | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Adds `GET /hybridkv/stats`."""
        router = APIRouter(prefix="/hybridkv", tags=["hybridkv"])

        @router.get("/stats", summary="What KV-cache compression has done since the start")
        def stats() -> Stats:
            return current_stats(self._options)

        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Keeps the server's options for the answers."""
        del state, args
        config: Any = getattr(engine_client, "vllm_config", None)
        self._options = server_options(config) if config is not None else None
