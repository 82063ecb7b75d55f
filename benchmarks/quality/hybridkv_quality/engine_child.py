"""One policy's answers from an engine of its own: `python -m hybridkv_quality.engine_child`, a job on stdin.

A fresh interpreter for each policy: the policy is an option of the server, and engines leave memory and
global state behind. Messages go to the file descriptor named as the only argument, one JSON object a line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

# Before vLLM is imported: the block pool is read in this process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# On a CPU vLLM would bind one thread to each core, and refuse any other number.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from hybridkv_quality.chat import engine_chat
from hybridkv_quality.messages import Message
from hybridkv_quality.pool_observer import Held, PoolObserver
from hybridkv_quality.records import HeadsExample, Record
from hybridkv_quality.sample import Sample
from hybridkv_quality.settings import EngineJob, EngineSettings, server_options
from hybridkv_quality.sources import by_context, open_samples
from hybridkv_vllm.config import parse_server_options
from hybridkv_vllm.observe.heads import RequestHeads

# Many prompts at once on a GPU, and more than a picture of the largest size.
BATCHED_TOKENS = 8192
CPU_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Question:
    """One sample at one budget."""

    sample: Sample
    budget: float

    def sampling(self) -> SamplingParams:
        """Greedy, with the request's own budget."""
        return SamplingParams(
            max_tokens=self.sample.max_tokens,
            temperature=0.0,
            extra_args={"hybridkv_budget": self.budget},
        )


class Answered(NamedTuple):
    """A question whose answer is complete."""

    question: Question
    request_id: str
    output: RequestOutput


def start_engine(engine: EngineSettings, policy: str, most_pictures: int) -> LLM:
    """The engine for one policy; the prefix cache is on, the pool is vLLM's own choice on a GPU."""
    on_cpu = not torch.cuda.is_available()
    settings: dict[str, Any] = {}
    if on_cpu:
        torch.set_num_threads(engine.threads)
        settings["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    if engine.max_model_len is not None:
        settings["max_model_len"] = engine.max_model_len
    return LLM(
        engine.model,
        dtype=engine.dtype,
        attention_backend="hybridkv",
        additional_config={"hybridkv": server_options(policy, engine.options)},
        enable_prefix_caching=True,
        max_num_seqs=engine.concurrency,
        max_num_batched_tokens=BATCHED_TOKENS,
        limit_mm_per_prompt={"image": max(most_pictures, 1), "video": 0},
        seed=engine.seed,
        **settings,
    )


class Interview:
    """Asks an engine the questions of a job, and reports each answer as it comes."""

    def __init__(self, job: EngineJob, llm: LLM, send: Callable[[Message], None]) -> None:
        self._job = job
        self._llm = llm
        self._send = send
        self._observer = PoolObserver(llm)
        self._asked: dict[str, Question] = {}
        self._answered: list[Answered] = []
        self._shown: set[tuple[str, float]] = set()

    def run(self) -> None:
        """Answers everything that has no record yet; several requests are always under way.

        Prefixes need no waiting for each other: vLLM lets a request reuse what another computes in the same
        step (measured: waiting for a context's first request caches no more and takes no less time).
        """
        questions = pending_questions(self._job)
        while True:
            room = self._job.engine.concurrency - len(self._asked)
            for question in islice(questions, room):
                (request_id,) = self._llm.enqueue_chat(
                    engine_chat(question.sample), question.sampling(), use_tqdm=False
                )
                self._asked[request_id] = question
            if not self._asked:
                break
            for output in self._llm.llm_engine.step():
                if output.finished:
                    self._take(output)
            self._observer.look()
            self._report()
        self._report(wait=False)

    def _take(self, output: RequestOutput) -> None:
        # vLLM makes its own id of a request's by adding to it.
        own = output.request_id
        request_id = next(name for name in self._asked if name == own or name.startswith(f"{own}-"))
        self._answered.append(Answered(self._asked.pop(request_id), request_id, output))

    def _report(self, *, wait: bool = True) -> None:
        """Sends the answers of which all is known; the worker's figures may come a step later."""
        waiting: list[Answered] = []
        for answer in self._answered:
            held = self._observer.held(answer.request_id)
            if wait and held is not None and not held.is_complete:
                waiting.append(answer)
                continue
            self._send(Message(kind="record", record=self._record(answer, held)))
            if held is not None and held.heads is not None:
                self._show_heads(answer.question, held.heads)
            self._observer.forget(answer.request_id)
        self._answered = waiting

    def _record(self, answer: Answered, held: Held | None) -> Record:
        sample, output = answer.question.sample, answer.output
        completion = output.outputs[0]
        return Record.of(
            sample,
            completion.text,
            configuration=self._job.configuration,
            policy=self._job.policy,
            budget=answer.question.budget,
            prompt_tokens=len(output.prompt_token_ids or ()),
            cached_tokens=output.num_cached_tokens,
            output_tokens=len(completion.token_ids),
            compressed=None if held is None else held.compressed,
            blocks_held=None if held is None else held.blocks,
            block_bytes=self._observer.block_bytes,
            recalled_share=None if held is None or held.heads is None else held.heads.recalled_share,
            host_bytes=None if held is None else held.host_bytes(self._observer.block_bytes),
        )

    def _show_heads(self, question: Question, heads: RequestHeads) -> None:
        """Sends how the heads were judged, for the first prompt of each task and budget."""
        shown = question.sample.task, question.budget
        if shown in self._shown:
            return
        self._shown.add(shown)
        options = parse_server_options(server_options(self._job.policy, self._job.engine.options))
        example = HeadsExample.of(question.sample, self._job.policy, question.budget, options, heads)
        self._send(Message(kind="heads", heads=example))


def pending_questions(job: EngineJob) -> Iterator[Question]:
    """What is still to ask: context by context, in it budget by budget, so that prefixes are still cached."""
    for samples in by_context(open_samples(job.source)):
        for budget in job.budgets:
            for sample in samples:
                if (sample.task, sample.name, budget) not in job.done:
                    yield Question(sample, budget)


def main() -> int:
    """Reads the job, starts the engine, answers; 1 with one line on stderr where that is not possible."""
    job = EngineJob.model_validate_json(sys.stdin.read())
    with os.fdopen(int(sys.argv[1]), "wb") as pipe:

        def send(message: Message) -> None:
            pipe.write(message.model_dump_json().encode() + b"\n")
            pipe.flush()

        llm = start_engine(job.engine, job.policy, job.most_pictures)
        send(Message(kind="ready"))
        try:
            Interview(job, llm, send).run()
        finally:
            llm.llm_engine.engine_core.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
