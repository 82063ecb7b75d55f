"""The HTTP routes (vLLM endpoint plugin `hybridkv_api`): read-only, nothing of a prompt's content.

vLLM asks for its API key under some prefixes only, and ours is not among them: the routes that tell figures
ask for the same key themselves. The page holds none; it asks its user for the key.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from argparse import Namespace
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Response
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field

from hybridkv_vllm.config import ServerOptions, server_options
from hybridkv_vllm.observe.heads import (
    KEPT_REQUESTS,
    RequestHeads,
    RequestSummary,
    read_heads,
    read_requests,
)
from hybridkv_vllm.observe.metrics import read_samples
from hybridkv_vllm.observe.page import page_headers, page_html

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


Bearer = Annotated[
    HTTPAuthorizationCredentials | None,
    Depends(HTTPBearer(auto_error=False, description="The server's API key, if it has one.")),
]


class Stats(BaseModel):
    """What compression has done since the server started."""

    requests_compressed: int = Field(description="Prompts whose KV cache was compressed.")
    prompt_tokens: int = Field(description="Tokens of those prompts.")
    kept_tokens: float = Field(description="Tokens kept per KV head, mean over heads, summed over prompts.")
    kept_share: float | None = Field(description="kept_tokens / prompt_tokens; null before the first prompt.")
    blocks_freed: int = Field(description="Prompt blocks given back to the pool.")
    blocks_arena: int = Field(description="Blocks that hold compressed prompts now.")
    blocks_replaced: int = Field(
        description="Prompt blocks that running requests have given back. Stock vLLM would hold these now in "
        "place of blocks_arena; what prompts share through the prefix cache is counted for each of them."
    )
    heads: dict[str, int] = Field(description="KV heads classified so far, by type.")
    chunks_recalled: int = Field(description="Chunks copied from their tier into a hot slot while decoding.")
    chunks_hit: int = Field(description="Chosen chunks that were in a hot slot already.")
    hit_rate: float | None = Field(
        description="chunks_hit / (chunks_hit + chunks_recalled); null before the first."
    )
    host_bytes: int = Field(description="Bytes of host memory that hold chunks of dynamic heads now.")
    compress_seconds_count: int = Field(
        description="Compressions timed, one for each prompt and pipeline rank."
    )
    compress_seconds_sum: float = Field(description="Time that the device spent on them.")
    fallbacks: dict[str, int] = Field(
        description="By reason: requests served uncompressed, or KV heads (not requests) that were found "
        "dynamic and yet pruned."
    )
    options: ServerOptions | None = Field(description="The server's options.")


class RequestsResponse(BaseModel):
    """What became of the last compressed prompts."""

    requests: list[RequestSummary] = Field(description="The last 64 requests, newest first.")


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
        elif not labels:
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
        blocks_replaced=int(totals.get("hybridkv_blocks_replaced", 0)),
        heads=labelled["hybridkv_heads"],
        chunks_recalled=chunks_recalled,
        chunks_hit=chunks_hit,
        hit_rate=chunks_hit / chunks_chosen if chunks_chosen else None,
        host_bytes=int(totals.get("hybridkv_host_bytes", 0)),
        compress_seconds_count=int(totals.get("hybridkv_compress_seconds_count", 0)),
        compress_seconds_sum=totals.get("hybridkv_compress_seconds_sum", 0.0),
        fallbacks={reason: n for reason, n in labelled["hybridkv_fallbacks_total"].items() if n},
        options=options,
    )


class HybridKVEndpoints:
    """Implements vLLM's `EndpointPlugin` protocol."""

    name = "hybridkv_api"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def __init__(self) -> None:
        self._options: ServerOptions | None = None
        self._key_digests: list[bytes] = []

    def attach_router(self, app: FastAPI) -> None:
        """Adds the page, `GET /hybridkv`, and what it reads: `/hybridkv/stats`, `/requests` and `/heads`."""

        def check_key(sent: Bearer) -> None:
            if not self._accepts(sent.credentials if sent is not None else ""):
                raise HTTPException(HTTPStatus.UNAUTHORIZED, "send the server's API key as a bearer token")

        page = APIRouter(tags=["hybridkv"])
        figures = APIRouter(prefix="/hybridkv", tags=["hybridkv"], dependencies=[Depends(check_key)])

        @page.get("/hybridkv", summary="What compression does, as a page", response_class=HTMLResponse)
        def show() -> Response:
            return HTMLResponse(page_html(), headers=page_headers())

        @figures.get("/stats", summary="What KV-cache compression has done since the start")
        def stats() -> Stats:
            return current_stats(self._options)

        @figures.get("/requests", summary="What became of the last compressed prompts")
        def requests() -> RequestsResponse:
            return RequestsResponse(requests=read_requests())

        @figures.get("/heads", summary="What became of each KV head of the last compressed prompts")
        def heads(
            limit: Annotated[
                int, Query(ge=1, le=KEPT_REQUESTS, description="Of so many requests.")
            ] = KEPT_REQUESTS,
        ) -> HeadsResponse:
            return HeadsResponse(
                requests=read_heads(limit),
                classifier=self._options.classifier_name if self._options else None,
                theta=self._options.theta if self._options else None,
            )

        app.include_router(page)
        app.include_router(figures)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Keeps the server's options for the answers, and its API keys as vLLM reads them."""
        del state
        config: Any = getattr(engine_client, "vllm_config", None)
        self._options = server_options(config) if config is not None else None
        keys: list[str] = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY", "")]
        self._key_digests = [_digest(key) for key in keys if key]

    def _accepts(self, key: str) -> bool:
        """Whether the key opens the routes; takes the same time whichever key it is."""
        sent = _digest(key)
        matches = [secrets.compare_digest(sent, digest) for digest in self._key_digests]
        return any(matches) or not matches


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
