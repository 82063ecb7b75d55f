"""Answers from an OpenAI-compatible server, and what HybridKV's counters on it say of memory."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import httpx
import openai
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybridkv_quality.chat import http_chat
from hybridkv_quality.messages import Message
from hybridkv_quality.records import HeadsExample, Record
from hybridkv_quality.sample import Sample
from hybridkv_quality.settings import AS_SERVED, FULL, EvalError, UsageError
from hybridkv_vllm.observe.api import HeadsResponse, Stats
from hybridkv_vllm.observe.heads import KEPT_REQUESTS, RequestHeads
from hybridkv_vllm.plan import PAGE_TOKENS, arena_blocks, ceil_pages

# The OpenAI client's own.
KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT_SECONDS = 600
# The list of models costs a server nothing.
MODELS_SECONDS = 10
# The client waits longer from try to try: about half a minute in all.
RETRIES = 6
# A prompt's figures may reach the server's files a moment after its answer.
HEADS_SECONDS = 2.0


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    """What is read of a server's list of models."""

    data: list[_Model]


class ServerSettings(BaseModel):
    """Which server is asked, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    model: str | None = None
    concurrency: int = Field(default=16, ge=1)
    kv_bytes_per_token: int | None = Field(default=None, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """One answer of the server, with what its counters say of the group it was asked in.

    Attributes:
        freed: whether the prompt's blocks went back to the pool; None where the counters do not add up.
        heads: how its KV heads were judged; None where it was not compressed.
    """

    sample: Sample
    completion: ChatCompletion
    freed: bool | None = None
    heads: RequestHeads | None = None

    @property
    def prompt_tokens(self) -> int:
        usage = self.completion.usage
        return usage.prompt_tokens if usage else 0

    @property
    def output_tokens(self) -> int:
        usage = self.completion.usage
        return usage.completion_tokens if usage else 0


class OpenAIServer:
    """A server that is asked over HTTP."""

    def __init__(self, settings: ServerSettings) -> None:
        """Finds the model, and HybridKV's counters where there are any.

        Raises:
            UsageError: it is no URL, nothing answers there, or it has no such model.
        """
        self._settings = settings
        key = os.environ.get(KEY_VARIABLE) or "none"
        if not key.isascii():
            raise UsageError(f"{KEY_VARIABLE} has a character that is not ASCII; set it to the server's key")
        try:
            httpx.URL(settings.url)
        except httpx.InvalidURL as error:
            raise UsageError(f"--url {settings.url} is no URL ({error}); correct it") from None
        self._client = openai.OpenAI(
            base_url=settings.url, api_key=key, timeout=TIMEOUT_SECONDS, max_retries=RETRIES
        )
        self.model = self._find_model()
        root = settings.url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=root, timeout=60, headers={"Authorization": f"Bearer {key}"})
        self.options = stats.options if (stats := self.stats()) is not None else None

    @property
    def policy(self) -> str:
        """The policy that the server runs."""
        return AS_SERVED if self.options is None else self.options.policy

    def _find_model(self) -> str:
        url, wanted = self._settings.url, self._settings.model
        client = self._client.with_options(max_retries=0, timeout=MODELS_SECONDS)
        try:
            answer = client.models.with_raw_response.list()
            served = [model.id for model in _Models.model_validate_json(answer.content).data]
        except openai.APITimeoutError:
            raise UsageError(
                f"--url {url}: no list of models within {MODELS_SECONDS} s; wait until the server is ready, "
                "or correct the URL"
            ) from None
        except ValidationError:
            raise UsageError(
                f"--url {url} is no OpenAI server: /models is no list of models; correct the URL"
            ) from None
        except openai.APIConnectionError as error:
            raise UsageError(
                f"--url {url}: no server answers ({error.__cause__ or error}); start it, or correct the URL"
            ) from None
        except openai.APIStatusError as error:
            raise UsageError(
                f"--url {url}: HTTP {error.status_code} for the list of models; does the URL end in /v1, and "
                f"is {KEY_VARIABLE} the server's key, if it has one?"
            ) from None
        if wanted is None and len(served) == 1:
            return served[0]
        if wanted not in served:
            known = ", ".join(served) or "no model"
            raise UsageError(f"--served-model: the server has {known}; name one of them")
        return str(wanted)

    def stats(self) -> Stats | None:
        """HybridKV's counters; None where the server has none, or not all of them."""
        try:
            answer = self._http.get("/hybridkv/stats")
            return Stats.model_validate(answer.json()) if answer.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, ValidationError, ValueError):
            return None

    def heads(self) -> list[RequestHeads]:
        """How the heads of the last compressed prompts were judged."""
        try:
            answer = self._http.get("/hybridkv/heads")
            return HeadsResponse.model_validate(answer.json()).requests
        except (httpx.HTTPError, ValidationError, ValueError):
            return []

    def ask(self, sample: Sample, budget: float | None) -> ChatCompletion:
        """One answer, greedy; transient errors are tried again.

        Raises:
            EvalError: the server refuses the request, answers something else, or not any more.
        """
        extra = {} if budget is None else {"vllm_xargs": {"hybridkv_budget": budget}}
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=http_chat(sample),  # type: ignore[arg-type]
                max_tokens=sample.max_tokens,
                temperature=0,
                extra_body=extra,
            )
        except json.JSONDecodeError:
            raise self._no_completion(sample) from None
        except openai.APIStatusError as error:
            raise EvalError(
                f"{sample.task}/{sample.name}: the server says HTTP {error.status_code}: {error.message}; "
                "answers so far are kept. If the prompt is too long, raise the server's --max-model-len; if "
                "it has too many pictures, --limit-mm-per-prompt; the same command then goes on"
            ) from None
        except openai.APIConnectionError as error:
            raise EvalError(
                f"{self._settings.url} does not answer any more ({error.__cause__ or error}); answers so far "
                "are kept, start the server again and run the same command to go on"
            ) from None
        try:
            # The client hands on whatever came, a page of HTML as well.
            _text(completion)
        except (AttributeError, LookupError, TypeError):
            raise self._no_completion(sample) from None
        return completion

    def _no_completion(self, sample: Sample) -> EvalError:
        return EvalError(
            f"{sample.task}/{sample.name}: {self._settings.url} answers with no chat completion; answers so "
            "far are kept. Correct the URL or the server; the same command then goes on"
        )


def _text(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


class ServerRun:
    """Asks groups of questions at one budget, so that the counters' changes are these questions'."""

    def __init__(self, server: OpenAIServer, settings: ServerSettings, configuration: str) -> None:
        self._server = server
        self._settings = settings
        self._configuration = configuration
        self._shown: set[tuple[str, float | None]] = set()

    def answers(self, samples: Sequence[Sample], budget: float | None) -> Iterator[Message]:
        """Answers of all samples, asked in groups that the server's list of heads can hold.

        Args:
            budget: None to leave it to the server.

        Raises:
            EvalError: see `OpenAIServer.ask`; after the other answers of its group.
        """
        for start in range(0, len(samples), KEPT_REQUESTS):
            replies, failure = self._ask_group(samples[start : start + KEPT_REQUESTS], budget)
            for reply in replies:
                yield Message(kind="record", record=self._record(reply, budget))
                shown = reply.sample.task, budget
                options = self._server.options
                if reply.heads is not None and options is not None and shown not in self._shown:
                    self._shown.add(shown)
                    example = HeadsExample.of(
                        reply.sample, self._policy(budget), budget, options, reply.heads
                    )
                    yield Message(kind="heads", heads=example)
            if failure is not None:
                raise failure

    def _ask_group(
        self, samples: Sequence[Sample], budget: float | None
    ) -> tuple[list[Reply], BaseException | None]:
        """The answers that came, and what went wrong with the first one that did not."""
        before = self._server.stats() if self._server.options else None
        futures = self._ask_all(samples, budget)
        failure = next((error for future in futures if (error := future.exception()) is not None), None)
        replies = [
            Reply(sample, future.result())
            for sample, future in zip(samples, futures, strict=True)
            if future.exception() is None
        ]
        after = self._server.stats() if before is not None else None
        if before is not None and after is not None:
            replies = self._with_memory(replies, before, after)
        return replies, failure

    def _ask_all(self, samples: Sequence[Sample], budget: float | None) -> list[Future[ChatCompletion]]:
        """Asks all samples, so many at once as the settings say, and waits for them.

        The threads are daemons: those of a ThreadPoolExecutor would hold up the end of the command after
        Ctrl-C for as long as the server hangs, and closing the client does not wake a thread that reads.
        """
        futures: list[Future[ChatCompletion]] = [Future() for _ in samples]
        waiting: SimpleQueue[tuple[Sample, Future[ChatCompletion]]] = SimpleQueue()
        for item in zip(samples, futures, strict=True):
            waiting.put(item)

        def work() -> None:
            while True:
                try:
                    sample, future = waiting.get_nowait()
                except Empty:
                    return
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(self._server.ask(sample, budget))
                except Exception as error:
                    # For the thread that waits.
                    future.set_exception(error)

        for _ in range(min(self._settings.concurrency, len(samples))):
            threading.Thread(target=work, daemon=True).start()
        try:
            wait(futures)
        except KeyboardInterrupt:
            for future in futures:
                future.cancel()
            raise
        return futures

    def _with_memory(self, replies: Sequence[Reply], before: Stats, after: Stats) -> list[Reply]:
        """Adds what the counters say, if they changed by just what these prompts account for."""
        count = after.requests_compressed - before.requests_compressed
        heads = self._heads_of(replies, count)
        compressed = [reply for reply in replies if reply.completion.id in heads]
        # An answer of one token may end in the step that would have given its blocks back.
        decoded = sum(reply.prompt_tokens // PAGE_TOKENS for reply in compressed if reply.output_tokens > 1)
        either = sum(reply.prompt_tokens // PAGE_TOKENS for reply in compressed)
        freed = after.blocks_freed - before.blocks_freed
        tokens = after.prompt_tokens - before.prompt_tokens
        adds_up = count == len(compressed) and tokens == sum(reply.prompt_tokens for reply in compressed)
        gave_back: bool | None = None
        if adds_up and decoded <= freed <= either and freed > 0:
            gave_back = True
        elif adds_up and freed == 0:
            gave_back = False
        return [
            Reply(reply.sample, reply.completion, gave_back, heads.get(reply.completion.id))
            for reply in replies
        ]

    def _heads_of(self, replies: Sequence[Reply], count: int) -> dict[str, RequestHeads]:
        """By the answer's id; the server's own id of a request contains it."""
        deadline = time.monotonic() + HEADS_SECONDS
        while True:
            listed = self._server.heads()
            found = {
                reply.completion.id: heads
                for reply in replies
                for heads in listed
                if reply.completion.id in heads.request_id
            }
            if len(found) >= min(count, len(replies)) or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def _policy(self, budget: float | None) -> str:
        return FULL if budget == 1.0 else self._server.policy

    def _record(self, reply: Reply, budget: float | None) -> Record:
        sample, tokens = reply.sample, reply.prompt_tokens
        output = _text(reply.completion)
        usage = reply.completion.usage
        cached = usage.prompt_tokens_details.cached_tokens if usage and usage.prompt_tokens_details else None
        held = self._held(reply, budget)
        per_token = self._settings.kv_bytes_per_token
        block_bytes = None if per_token is None else per_token * PAGE_TOKENS
        recalled = reply.heads.recalled_share if reply.heads is not None else None
        return Record.of(
            sample,
            output,
            configuration=self._configuration,
            policy=self._policy(budget),
            budget=budget,
            prompt_tokens=tokens,
            cached_tokens=cached,
            output_tokens=reply.output_tokens,
            compressed=None if self._server.options is None else reply.heads is not None,
            blocks_held=held,
            block_bytes=block_bytes,
            recalled_share=recalled,
            host_bytes=self._host_bytes(recalled, tokens, block_bytes),
        )

    def _held(self, reply: Reply, budget: float | None) -> int | None:
        """Blocks of the arena, and what was not given back; None where the counters do not tell."""
        blocks = ceil_pages(reply.prompt_tokens)
        if self._server.options is None or budget is None or reply.output_tokens < 2:
            return None
        if reply.heads is None:
            # Served uncompressed.
            return blocks
        if reply.freed is None:
            return None
        given_back = reply.prompt_tokens // PAGE_TOKENS if reply.freed else 0
        return blocks - given_back + arena_blocks(budget, reply.prompt_tokens)

    def _host_bytes(self, recalled: float | None, tokens: int, block_bytes: int | None) -> int | None:
        options = self._server.options
        if options is None or recalled is None or block_bytes is None:
            return None
        if options.recall_tier != "host":
            return 0
        return round(recalled * (tokens // PAGE_TOKENS) * block_bytes)
