"""What became of each KV head of the last compressed prompts: workers write it down, the API server reads it.

A rank writes one JSON file into the metrics directory, anew for each prompt. It is replaced in one go, so
that a reader sees the old or the new one, never part of one.
"""

from __future__ import annotations

import glob
import logging
import os
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field, TypeAdapter

from hybridkv_vllm.observe.metrics import is_alive, metrics_directory

# vLLM configures loggers below its own name only.
logger = logging.getLogger(f"vllm.{__name__}")

KEPT_REQUESTS = 16


class RankRecord(BaseModel):
    """One request as one rank saw it: its own layers, in each its own KV heads (`[L][H]`)."""

    request_id: str
    recorded_at: float
    prompt_tokens: int
    arena_pages: int
    figure: list[list[float]]
    dynamic: list[list[bool]]
    recalled: list[list[bool]]
    pages: list[list[int]]
    kept_tokens: list[list[int]]


class HeadsReport:
    """One rank's file.

    A failed write is logged once and does not reach the caller: serving goes on without the report.
    """

    def __init__(self, directory: str, dp_rank: int, pp_rank: int, tp_rank: int) -> None:
        """Writes a file without requests: readers wait for this rank's share of a request from now on."""
        self._start = os.path.join(directory, f"heads-{dp_rank}-{pp_rank}-{tp_rank}")
        self._records: dict[str, str] = {}
        self._failed = False
        self._write()

    def record(
        self,
        request_id: str,
        prompt_tokens: int,
        arena_pages: int,
        figure: list[list[float]],
        dynamic: list[list[bool]],
        recalled: list[list[bool]],
        pages: list[list[int]],
        kept_tokens: list[list[int]],
    ) -> None:
        """Adds a compressed request; the 16 latest stay, a request compressed again replaces itself.

        All lists are `[L][H]`, this rank's layers and KV heads.

        Args:
            request_id: vLLM's id, the same on all ranks.
            prompt_tokens: T.
            arena_pages: pages of this rank's arena, A * L * H.
            figure: what the classifier held against theta.
            dynamic: its verdict.
            recalled: whether the head recalls chunks while decoding.
            pages: pages of the arena that are the head's.
            kept_tokens: prompt tokens in them.

        Raises:
            pydantic.ValidationError: a value of another type.
        """
        record = RankRecord(
            request_id=request_id,
            recorded_at=time.time(),
            prompt_tokens=prompt_tokens,
            arena_pages=arena_pages,
            figure=figure,
            dynamic=dynamic,
            recalled=recalled,
            pages=pages,
            kept_tokens=kept_tokens,
        )
        self._records.pop(request_id, None)
        self._records[request_id] = record.model_dump_json()
        if len(self._records) > KEPT_REQUESTS:
            del self._records[next(iter(self._records))]
        self._write()

    def _write(self) -> None:
        # The id is asked for here: a forked child must not write its parent's file.
        path = f"{self._start}-{os.getpid()}.json"
        try:
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                file.write(f"[{','.join(self._records.values())}]")
            os.replace(f"{path}.new", path)
        except OSError as error:
            if not self._failed:
                logger.warning("hybridkv: /hybridkv/heads will lack requests, %s; free some space", error)
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


def read_heads() -> list[RequestHeads]:
    """The last requests that all ranks of this node have reported, newest first.

    A replica's ranks are put together, tensor ranks side by side in each layer, pipeline ranks one after the
    other. Files of dead processes do not count.

    Raises:
        pydantic.ValidationError: a file that no `HeadsReport` has written.
        ValueError: ranks that disagree on a request's shape.
    """
    replicas: dict[int, list[_RankFile]] = {}
    for file in _living_files(metrics_directory()):
        replicas.setdefault(file.dp_rank, []).append(file)
    merged = [entry for files in replicas.values() for entry in _merge_ranks(files)]
    merged.sort(key=lambda entry: entry[0], reverse=True)
    return [request for _, request in merged]


class _RankFile(NamedTuple):
    """One rank's file as it was read; sorts by rank."""

    dp_rank: int
    pp_rank: int
    tp_rank: int
    records: dict[str, RankRecord]


_RECORDS = TypeAdapter(list[RankRecord])


def _living_files(directory: str) -> list[_RankFile]:
    """Each rank's newest file, of living processes, in the order of ranks."""
    newest: dict[tuple[int, int, int], tuple[float, _RankFile]] = {}
    for path in glob.glob(os.path.join(directory, "heads-*.json")):
        stem = os.path.basename(path).removesuffix(".json")
        dp_rank, pp_rank, tp_rank, pid = (int(part) for part in stem.split("-")[1:])
        if not is_alive(pid):
            continue
        rank = dp_rank, pp_rank, tp_rank
        written_at = os.stat(path).st_mtime
        if rank not in newest or written_at > newest[rank][0]:
            with open(path, "rb") as file:
                records = _RECORDS.validate_json(file.read())
            by_request = {record.request_id: record for record in records}
            newest[rank] = written_at, _RankFile(*rank, by_request)
    return [file for _, (_, file) in sorted(newest.items())]


def _merge_ranks(files: Sequence[_RankFile]) -> list[tuple[float, RequestHeads]]:
    """One replica's requests that all its ranks have reported, each with the time of the last report."""
    stages: dict[int, list[_RankFile]] = {}
    for file in files:
        stages.setdefault(file.pp_rank, []).append(file)
    complete = set.intersection(*(set(file.records) for file in files))
    return [
        (
            max(file.records[request_id].recorded_at for file in files),
            _merge_request([[file.records[request_id] for file in stage] for stage in stages.values()]),
        )
        for request_id in complete
    ]


def _merge_request(stages: Sequence[Sequence[RankRecord]]) -> RequestHeads:
    """Puts a request's records together: `stages` is pipeline ranks, in each its tensor ranks."""
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
        arena_pages=sum(record.arena_pages for stage in stages for record in stage),
        dynamic_share=sum(head.type == "dynamic" for head in heads) / len(heads),
        recalled_share=sum(head.recalled for head in heads) / len(heads),
        layers=layers,
    )


def _layers(record: RankRecord) -> list[list[Head]]:
    """One rank's heads, `[L][H]`."""
    tables = (record.figure, record.dynamic, record.recalled, record.pages, record.kept_tokens)
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
