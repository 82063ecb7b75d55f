"""The HTTP routes (vLLM endpoint plugin `hybridkv_api`): read-only, nothing of a prompt's content."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, Field

from hybridkv_vllm.config import ServerOptions, server_options
from hybridkv_vllm.observe.heads import RequestHeads, read_heads
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
    chunks_recalled: int = Field(description="Chunks copied from their tier into a hot slot while decoding.")
    chunks_hit: int = Field(description="Chosen chunks that were in a hot slot already.")
    hit_rate: float | None = Field(
        description="chunks_hit / (chunks_hit + chunks_recalled); null before the first."
    )
    host_bytes: int = Field(description="Bytes of host memory that hold chunks of dynamic heads now.")
    fallbacks: dict[str, int] = Field(
        description="By reason: requests served uncompressed, or KV heads (not requests) that were found "
        "dynamic and yet pruned."
    )
    options: ServerOptions | None = Field(description="The server's options.")


class HeadsResponse(BaseModel):
    """How each KV head of the last compressed prompts was judged, and what it kept."""

    requests: list[RequestHeads] = Field(description="The last requests, newest first.")
    classifier: str | None = Field(description="Figure by which heads are called static or dynamic.")
    theta: float | None = Field(description="A head is static where its figure is at least this.")


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
    chunks_recalled = int(totals.get("hybridkv_chunks_recalled_total", 0))
    chunks_hit = int(totals.get("hybridkv_chunks_hit_total", 0))
    chunks_chosen = chunks_hit + chunks_recalled
    return Stats(
        requests_compressed=int(totals.get("hybridkv_requests_compressed_total", 0)),
        prompt_tokens=prompt_tokens,
        kept_tokens=kept_tokens,
        kept_share=kept_tokens / prompt_tokens if prompt_tokens else None,
        blocks_freed=int(totals.get("hybridkv_blocks_freed_total", 0)),
        blocks_arena=int(totals.get("hybridkv_blocks_arena", 0)),
        heads=labelled["hybridkv_heads"],
        chunks_recalled=chunks_recalled,
        chunks_hit=chunks_hit,
        hit_rate=chunks_hit / chunks_chosen if chunks_chosen else None,
        host_bytes=int(totals.get("hybridkv_host_bytes", 0)),
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
        """Adds `GET /hybridkv/stats` and `GET /hybridkv/heads`."""
        router = APIRouter(prefix="/hybridkv", tags=["hybridkv"])

        @router.get("/stats", summary="What KV-cache compression has done since the start")
        def stats() -> Stats:
            return current_stats(self._options)

        @router.get("/heads", summary="What became of each KV head of the last compressed prompts")
        def heads() -> HeadsResponse:
            return HeadsResponse(
                requests=read_heads(),
                classifier=self._options.classifier_name if self._options else None,
                theta=self._options.theta if self._options else None,
            )

        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Keeps the server's options for the answers."""
        del state, args
        config: Any = getattr(engine_client, "vllm_config", None)
        self._options = server_options(config) if config is not None else None
