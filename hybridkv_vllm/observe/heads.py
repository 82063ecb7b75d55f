"""What became of the last compressed prompts and their KV heads: workers write it, the API server reads it.

A rank has one JSON file in the metrics directory, and writes the next one for each prompt. It gets its name
when it is whole, and then the last one goes: a reader sees the old or the new one, never part of one.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field, TypeAdapter

from hybridkv_vllm.observe.metrics import is_alive, metrics_directory
from hybridkv_vllm.plan import PAGE_TOKENS, PromptPlan

# vLLM configures loggers below its own name only.
logger = logging.getLogger(f"vllm.{__name__}")

# Requests whose heads are kept, and requests that are listed.
KEPT_REQUESTS = 16
LISTED_REQUESTS = 64
# Characters of an id that a report keeps: a client chooses it, and may choose megabytes.
LONGEST_ID = 256
_FILE_NUMBERS = itertools.count(1)


class HeadTables(BaseModel):
    """A rank's heads: each list is `[L][H]`, its own layers and in each its own KV heads.

    Attributes:
        figure: what the classifier held against theta.
        dynamic: its verdict.
        recalled: whether the head recalls chunks while decoding.
        pages: pages of the arena that are the head's.
        kept_tokens: prompt tokens in them.
    """

    figure: list[list[float]]
    dynamic: list[list[bool]]
    recalled: list[list[bool]]
    pages: list[list[int]]
    kept_tokens: list[list[int]]


class RankRecord(BaseModel):
    """One request as one rank saw it; the sums are over the rank's heads, which older requests lack.

    Its chunks are counted when it has ended.
    """

    request_id: str
    recorded_at: float
    prompt_tokens: int
    arena_blocks: int
    blocks_freed: int
    compress_seconds: float
    num_heads: int
    num_dynamic: int
    num_recalled: int
    num_kept: int
    chunks_hit: int | None = None
    chunks_recalled: int | None = None
    heads: HeadTables | None


def _shorten(request_id: str) -> str:
    """Both ends of a long id: what a client calls its request, and what vLLM adds to tell it from others."""
    if len(request_id) <= LONGEST_ID:
        return request_id
    half = LONGEST_ID // 2
    return f"{request_id[: half - 1]}\N{HORIZONTAL ELLIPSIS}{request_id[-half:]}"


class HeadsReport:
    """One rank's file.

    A failed write is logged once and does not reach the caller: serving goes on without the report.
    """

    def __init__(self, directory: str, dp_rank: int, pp_rank: int, tp_rank: int) -> None:
        """Writes a file without requests: readers wait for this rank's share of a request from now on."""
        self._start = os.path.join(directory, f"heads-{dp_rank}-{pp_rank}-{tp_rank}")
        self._last = ""
        # Each request as JSON, with its heads and without.
        self._records: dict[str, tuple[str, str]] = {}
        self._failed = False
        self._write()

    def record(self, request_id: str, plan: PromptPlan, compress_seconds: float, heads: HeadTables) -> None:
        """Adds a compressed request; the 64 latest stay, a request compressed again replaces itself.

        Args:
            request_id: vLLM's id, the same on all ranks; a long one is shortened.
            plan: what the scheduler decided about its prompt.
            compress_seconds: the device's time for this rank's layers.
            heads: what became of them; kept for the 16 latest requests.
        """
        record = RankRecord(
            request_id=_shorten(request_id),
            recorded_at=time.time(),
            prompt_tokens=plan.num_tokens,
            arena_blocks=plan.arena_size,
            blocks_freed=0 if plan.keeps_prompt_blocks else plan.num_full_blocks,
            compress_seconds=compress_seconds,
            num_heads=sum(map(len, heads.dynamic)),
            num_dynamic=sum(map(sum, heads.dynamic)),
            num_recalled=sum(map(sum, heads.recalled)),
            num_kept=sum(map(sum, heads.kept_tokens)),
            heads=heads,
        )
        self._records.pop(record.request_id, None)
        self._put(record)
        if len(self._records) > LISTED_REQUESTS:
            del self._records[next(iter(self._records))]
        self._write()

    def end(self, request_id: str, chunks_hit: int, chunks_recalled: int) -> None:
        """Adds how many chunks an ended request chose that were on the GPU already, and how many others."""
        texts = self._records.get(_shorten(request_id))
        if texts is None:
            return
        record = RankRecord.model_validate_json(texts[0])
        if record.num_recalled:
            self._put(
                record.model_copy(update={"chunks_hit": chunks_hit, "chunks_recalled": chunks_recalled})
            )
            self._write()

    def _put(self, record: RankRecord) -> None:
        short = record.model_copy(update={"heads": None})
        self._records[record.request_id] = record.model_dump_json(), short.model_dump_json()

    def _write(self) -> None:
        # The id is asked for here: a forked child must not touch its parent's file. And each file has a new
        # name: a rename onto one that is there takes milliseconds on ext4, and the next step waits for it.
        own = f"{self._start}-{os.getpid()}-"
        path, before = f"{own}{next(_FILE_NUMBERS)}.json", self._last
        records = list(self._records.values())
        older, latest = records[:-KEPT_REQUESTS], records[-KEPT_REQUESTS:]
        texts = [*(short for _, short in older), *(full for full, _ in latest)]
        try:
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                file.write(f"[{','.join(texts)}]")
            os.rename(f"{path}.new", path)
            self._last = path
            if before.startswith(own):
                os.unlink(before)
        except OSError as error:
            if not self._failed:
                logger.warning(
                    "hybridkv: /hybridkv/requests and /heads will lack requests, %s; free some space", error
                )
            self._failed = True


def heads_report(dp_rank: int, pp_rank: int, tp_rank: int) -> HeadsReport:
    """A worker process's report.

    Args:
        dp_rank: the replica, vLLM's `data_parallel_index` (its `data_parallel_rank` is 0 in every replica of
            a dense model).
        pp_rank: pipeline rank.
        tp_rank: tensor rank.
    """
    return HeadsReport(metrics_directory(), dp_rank, pp_rank, tp_rank)


class Head(BaseModel):
    """One KV head of one layer."""

    figure: float = Field(description="What the classifier held against theta: a share from 0 to 1.")
    type: Literal["static", "dynamic"] = Field(description="The classifier's verdict.")
    recalled: bool = Field(
        description="Whether the head recalls chunks while decoding. A dynamic head that is not recalled was "
        "pruned by votes: its chunks found no room in the host tier, its landmarks and hot slots "
        "did not fit its budget, or there is no dynamic tier."
    )
    pages: int = Field(description="Pages of the request's arena that are the head's.")
    kept_tokens: int = Field(description="Prompt tokens in those pages.")


class RequestHeads(BaseModel):
    """The KV heads of one compressed request."""

    request_id: str = Field(description="vLLM's id of the request.")
    prompt_tokens: int = Field(description="Tokens of the prompt.")
    arena_pages: int = Field(description="Pages of its arena, over all layers and KV heads.")
    dynamic_share: float = Field(description="Share of the heads that the classifier called dynamic.")
    recalled_share: float = Field(description="Share of the heads that recall chunks.")
    layers: list[list[Head]] = Field(
        description="For each layer its KV heads. Where tensor parallelism keeps copies of a head, each copy "
        "is listed."
    )


class RequestSummary(BaseModel):
    """One compressed request, in figures over all its heads."""

    request_id: str = Field(description="vLLM's id of the request.")
    compressed_at: float = Field(description="When its figures came in: seconds since 1970, UTC.")
    prompt_tokens: int = Field(description="Tokens of the prompt.")
    kept_tokens: float = Field(description="Tokens kept per KV head, mean over layers and heads.")
    kept_share: float = Field(description="kept_tokens / prompt_tokens.")
    blocks_freed: int = Field(
        description="Prompt blocks that go back to the pool with the step that compresses; 0 where chunks "
        "are recalled from them."
    )
    arena_blocks: int = Field(description="Blocks of its arena.")
    dynamic_share: float = Field(description="Share of the heads that the classifier called dynamic.")
    recalled_share: float = Field(description="Share of the heads that recall chunks.")
    hit_rate: float | None = Field(
        description="Share of the chunks chosen while decoding that were on the GPU already; null until the "
        "request has ended, where no head recalls, and after an answer of one token."
    )
    compress_seconds: float = Field(
        description="Time that the device spent on compressing the prompt, added up over pipeline ranks as "
        "the first tensor rank of each measured it."
    )


def read_requests() -> list[RequestSummary]:
    """The last 64 requests that all ranks of this node have reported, newest first.

    Files of dead processes do not count.

    Raises:
        pydantic.ValidationError: a file that no `HeadsReport` has written.
    """
    return [_summarise(stages) for stages in _complete_requests()[:LISTED_REQUESTS]]


def read_heads(limit: int = KEPT_REQUESTS) -> list[RequestHeads]:
    """The heads of the last `limit` requests, at most 16, that all ranks have reported, newest first.

    A replica's ranks are put together, tensor ranks side by side in each layer, pipeline ranks one after the
    other. Files of dead processes do not count.

    Raises:
        pydantic.ValidationError: a file that no `HeadsReport` has written.
        ValueError: ranks that disagree on a request's shape.
    """
    with_heads = [
        stages
        for stages in _complete_requests()
        if all(record.heads is not None for stage in stages for record in stage)
    ]
    return [_merge_request(stages) for stages in with_heads[: min(limit, KEPT_REQUESTS)]]


# One request's records: pipeline ranks, in each its tensor ranks.
Stages = list[list[RankRecord]]


def _complete_requests() -> list[Stages]:
    """Requests that all ranks of their replica have reported, newest first."""
    replicas: dict[int, list[_RankFile]] = {}
    for file in _living_files(metrics_directory()):
        replicas.setdefault(file.dp_rank, []).append(file)
    requests = [stages for files in replicas.values() for stages in _join_ranks(files)]
    return sorted(requests, key=_reported_at, reverse=True)


def _reported_at(stages: Stages) -> float:
    """When the last rank reported the request."""
    return max(record.recorded_at for stage in stages for record in stage)


class _RankFile(NamedTuple):
    """One rank's file as it was read; sorts by rank."""

    dp_rank: int
    pp_rank: int
    tp_rank: int
    records: dict[str, RankRecord]


_RECORDS = TypeAdapter(list[RankRecord])


def _living_files(directory: str) -> list[_RankFile]:
    """Each rank's newest file, of living processes, in the order of ranks."""
    while True:
        try:
            return _read_files(directory)
        except FileNotFoundError:
            # The next one has taken its place since the directory was listed.
            continue


def _read_files(directory: str) -> list[_RankFile]:
    newest: dict[tuple[int, int, int], tuple[tuple[float, int], _RankFile]] = {}
    for path in glob.glob(os.path.join(glob.escape(directory), "heads-*.json")):
        stem = os.path.basename(path).removesuffix(".json")
        dp_rank, pp_rank, tp_rank, pid, number = (int(part) for part in stem.split("-")[1:])
        if not is_alive(pid):
            continue
        rank = dp_rank, pp_rank, tp_rank
        # The clock of file systems is coarse: within a process the number tells.
        age = os.stat(path).st_mtime, number
        if rank not in newest or age > newest[rank][0]:
            with open(path, "rb") as file:
                records = _RECORDS.validate_json(file.read())
            by_request = {record.request_id: record for record in records}
            newest[rank] = age, _RankFile(*rank, by_request)
    return [file for _, (_, file) in sorted(newest.items())]


def _join_ranks(files: Sequence[_RankFile]) -> list[Stages]:
    """One replica's requests that all its ranks have reported."""
    stages: dict[int, list[_RankFile]] = {}
    for file in files:
        stages.setdefault(file.pp_rank, []).append(file)
    complete = set.intersection(*(set(file.records) for file in files))
    return [
        [[file.records[request_id] for file in stage] for stage in stages.values()] for request_id in complete
    ]


def _summarise(stages: Stages) -> RequestSummary:
    """A request's records, added up."""
    records = [record for stage in stages for record in stage]
    first = records[0]
    num_heads = sum(record.num_heads for record in records)
    # The prompt's partial last block stays in the tail, for every head.
    kept = sum(record.num_kept for record in records) / num_heads + first.prompt_tokens % PAGE_TOKENS
    return RequestSummary(
        request_id=first.request_id,
        compressed_at=_reported_at(stages),
        prompt_tokens=first.prompt_tokens,
        kept_tokens=kept,
        kept_share=kept / first.prompt_tokens,
        blocks_freed=first.blocks_freed,
        arena_blocks=first.arena_blocks,
        dynamic_share=sum(record.num_dynamic for record in records) / num_heads,
        recalled_share=sum(record.num_recalled for record in records) / num_heads,
        hit_rate=_hit_rate([record for record in records if record.num_recalled]),
        compress_seconds=sum(stage[0].compress_seconds for stage in stages),
    )


def _hit_rate(recalling: Sequence[RankRecord]) -> float | None:
    """Of the ranks that have heads that recall."""
    hit = recalled = 0
    for record in recalling:
        if record.chunks_hit is None or record.chunks_recalled is None:
            return None
        hit += record.chunks_hit
        recalled += record.chunks_recalled
    return hit / (hit + recalled) if hit + recalled else None


def _merge_request(stages: Stages) -> RequestHeads:
    """Puts a request's heads together."""
    layers = [
        [head for rank_heads in layer for head in rank_heads]
        for stage in stages
        for layer in zip(*map(_layers, stage), strict=True)
    ]
    heads = [head for layer in layers for head in layer]
    first = stages[0][0]
    return RequestHeads(
        request_id=first.request_id,
        prompt_tokens=first.prompt_tokens,
        arena_pages=sum(record.arena_blocks * record.num_heads for stage in stages for record in stage),
        dynamic_share=sum(head.type == "dynamic" for head in heads) / len(heads),
        recalled_share=sum(head.recalled for head in heads) / len(heads),
        layers=layers,
    )


def _layers(record: RankRecord) -> list[list[Head]]:
    """One rank's heads, `[L][H]`."""
    heads = record.heads
    assert heads is not None
    tables = (heads.figure, heads.dynamic, heads.recalled, heads.pages, heads.kept_tokens)
    return [
        [
            Head(
                figure=figure,
                type="dynamic" if dynamic else "static",
                recalled=recalled,
                pages=pages,
                kept_tokens=kept_tokens,
            )
            for figure, dynamic, recalled, pages, kept_tokens in zip(*layer, strict=True)
        ]
        for layer in zip(*tables, strict=True)
    ]
