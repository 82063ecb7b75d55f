"""Plays conversations against a server, and notes when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from hybridkv_serving.trace import Conversation


@dataclass
class Answer:
    """When a turn's answer came.

    Attributes:
        sent: seconds, on the clock of the run.
        times: seconds at which each token came.
        prompt_tokens, tokens: as the server counts them.
        error: why there is none; empty if there is.
    """

    sent: float
    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""

    @property
    def first_token(self) -> float:
        """Seconds from sending to the first token."""
        return self.times[0] - self.sent

    @property
    def each_token(self) -> float:
        """Seconds from one token to the next, on average."""
        return (self.times[-1] - self.times[0]) / max(1, self.tokens - 1)


@dataclass
class Played:
    """What a run of conversations gave: answers in the order of sending, and seconds from first to last."""

    answers: list[Answer]
    seconds: float


async def play(
    url: str,
    model: str,
    conversations: Sequence[Conversation],
    *,
    clients: int,
    answer_tokens: int,
) -> Played:
    """Plays all conversations, `clients` at a time; every answer has `answer_tokens` tokens."""
    # Not by way of a proxy that the environment names.
    direct = DefaultAsyncHttpxClient(trust_env=False)
    client = AsyncOpenAI(
        base_url=url + "/v1", api_key="none", timeout=3600, max_retries=0, http_client=direct
    )
    answers: list[Answer] = []
    places = asyncio.Semaphore(clients)
    began = time.monotonic()

    async def converse(conversation: Conversation) -> None:
        async with places:
            messages: list[Any] = []
            for turn in conversation.turns:
                messages.append(turn.message())
                answer = Answer(time.monotonic() - began)
                answers.append(answer)
                text = await _ask(client, model, messages, answer_tokens, answer, began)
                if answer.error:
                    return
                messages.append({"role": "assistant", "content": text})

    try:
        await asyncio.gather(*(converse(conversation) for conversation in conversations))
    finally:
        await client.close()
    return Played(answers, time.monotonic() - began)


async def _ask(
    client: AsyncOpenAI, model: str, messages: list[Any], tokens: int, answer: Answer, began: float
) -> str:
    """Streams one answer; its text."""
    text = ""
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        async for piece in stream:
            for choice in piece.choices:
                came = (choice.model_extra or {}).get("token_ids") or []
                answer.times += [time.monotonic() - began] * len(came)
                text += choice.delta.content or ""
            if piece.usage is not None:
                answer.prompt_tokens, answer.tokens = piece.usage.prompt_tokens, piece.usage.completion_tokens
    except (OpenAIError, httpx.HTTPError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    if not answer.error and answer.tokens != tokens:
        answer.error = f"{answer.tokens} tokens came, not {tokens}"
    return text
