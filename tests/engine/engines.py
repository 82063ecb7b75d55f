"""Real vLLM engines in this process, the requests they are given, and how answers are compared."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.plugins import load_general_plugins
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.block_pool import BlockPool

from hybridkv_vllm import startup
from hybridkv_vllm.scheduling.manager import HybridKVManager
from hybridkv_vllm.tiny_model import sample_picture

TOLERANCE = 1e-3
LOGPROBS = 3
SCENE = "The old lighthouse stood above the harbour and the boats came home before the storm. "


@dataclass(frozen=True)
class Ask:
    """One request: text, pictures and frames in a ChatML prompt, and how to sample."""

    name: str
    text: str
    pictures: tuple[Image.Image, ...] = ()
    frames: np.ndarray | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False

    def prompt(self) -> dict[str, Any]:
        """What `LLM.generate` takes."""
        vision = "<|vision_start|><|image_pad|><|vision_end|>" * len(self.pictures)
        data: dict[str, Any] = {}
        if self.pictures:
            data["image"] = list(self.pictures)
        if self.frames is not None:
            vision += "<|vision_start|><|video_pad|><|vision_end|>"
            count = len(self.frames)
            data["video"] = (
                self.frames,
                {
                    "fps": 2.0,
                    "duration": count / 2,
                    "total_num_frames": count,
                    "frames_indices": list(range(count)),
                    "do_sample_frames": False,
                },
            )
        chat = f"<|im_start|>user\n{vision}{self.text}<|im_end|>\n<|im_start|>assistant\n"
        text = self.text if self.raw else chat
        return {"prompt": text, "multi_modal_data": data} if data else {"prompt": text}

    def sampling(self, **more: Any) -> SamplingParams:
        """Greedy with log-probabilities, unless the request says otherwise."""
        settings = {
            "max_tokens": 24,
            "temperature": 0.0,
            "logprobs": LOGPROBS,
            "ignore_eos": True,
            **self.params,
            **more,
        }
        return SamplingParams(**settings)


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A part of the real photograph, another one for each seed."""
    photograph = sample_picture()
    left, top = 13 * seed % 200, 29 * seed % 200
    return photograph.crop((left, top, left + 300, top + 300)).resize((width, height))


def video(num_frames: int, seed: int) -> np.ndarray:
    """`[frames, 112, 112, 3]` uint8: the photograph, drifting."""
    return np.stack([np.asarray(picture(112, 112, seed + frame)) for frame in range(num_frames)])


def lifecycle_asks() -> list[Ask]:
    """One request for each kind that a server meets."""
    digits = StructuredOutputsParams(regex="[0-9]{3}-[0-9]{3}-[0-9]{3}")
    return [
        Ask("shorter than a page", "Hi", raw=True),
        Ask("exactly one page and more", SCENE, raw=True),
        Ask("text only", SCENE * 12),
        Ask("one picture", "What is this?", (picture(336, 280, 1),)),
        Ask("several pictures", "Compare them, please.", tuple(picture(224, 168, n) for n in (2, 3, 4))),
        Ask(
            "picture last",
            "<|im_start|>user\nLook: <|vision_start|><|image_pad|>",
            (picture(224, 168, 9),),
            raw=True,
        ),
        Ask("video", "What happens?", frames=video(8, 5)),
        Ask("two answers", SCENE * 3, params={"n": 2, "temperature": 0.9, "seed": 7}),
        Ask(
            "structured", SCENE * 4 + "A number:", params={"structured_outputs": digits, "ignore_eos": False}
        ),
        Ask("prompt log-probabilities", SCENE * 3, params={"prompt_logprobs": 1}),
    ]


def crowd(count: int = 8, repeats: int = 5, max_tokens: int = 80) -> list[Ask]:
    """Prompts of about 100 tokens with long answers: together more than a small pool holds."""
    return [
        Ask(f"crowd {n}", f"{n} ships. " + SCENE * repeats, params={"max_tokens": max_tokens})
        for n in range(count)
    ]


@dataclass(frozen=True)
class Answer:
    """One completion: its tokens, and the log-probability of each at its place."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def answers(output: RequestOutput) -> list[Answer]:
    """All completions of a request."""
    return [
        Answer(
            tuple(completion.token_ids),
            tuple(
                place[token].logprob
                for token, place in zip(completion.token_ids, completion.logprobs, strict=True)
            ),
        )
        for completion in output.outputs
    ]


def assert_same(actual: Sequence[Answer], expected: Sequence[Answer], name: str) -> None:
    """Same tokens, same log-probabilities within `TOLERANCE`."""
    assert len(actual) == len(expected), name
    for got, wanted in zip(actual, expected, strict=True):
        assert got.tokens == wanted.tokens, name
        assert np.allclose(got.logprobs, wanted.logprobs, atol=TOLERANCE, rtol=0), (
            f"{name}: {np.abs(np.subtract(got.logprobs, wanted.logprobs)).max()}"
        )


class Engine:
    """A vLLM engine in this process, with a look at its scheduler."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.preemptions = 0
        preempt = self.scheduler._preempt_request

        def count_preemption(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        self.scheduler._preempt_request = count_preemption

    def shut_down(self) -> None:
        """Lets go of everything, so that a test that still holds this engine holds no memory."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.scheduler

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def manager(self) -> HybridKVManager:
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, HybridKVManager)
        return manager

    def held_blocks(self) -> int:
        """Blocks that requests hold now."""
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()

    def ask(self, asks: Sequence[Ask], **more: Any) -> dict[str, list[Answer]]:
        """Answers of all requests, given at once."""
        outputs = self.llm.generate(
            [ask.prompt() for ask in asks], [ask.sampling(**more) for ask in asks], use_tqdm=False
        )
        return {ask.name: answers(output) for ask, output in zip(asks, outputs, strict=True)}

    def assert_empty(self) -> None:
        """No block is held, no plan or arena is left."""
        self.core.step_fn()  # Lets the workers hear of the last finished requests.
        assert self.held_blocks() == 0
        assert all(block.ref_cnt == 0 for block in self.pool.blocks if not block.is_null)
        if isinstance(self.manager, HybridKVManager):
            assert not self.manager.arenas
            assert not self.manager.plans


@contextmanager
def engine(
    model: Path, *, options: Mapping[str, Any] | None = None, threads: int = 1, **settings: Any
) -> Iterator[Engine]:
    """Starts an engine; with `options` it is HybridKV's, without it stock vLLM's.

    One thread is enough for tensors this small: on a busy machine more of them only wait for each other.
    """
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "num_gpu_blocks_override": 600,
        "seed": 0,
        "limit_mm_per_prompt": {"image": 4, "video": 1},
        **settings,
    }
    if current_platform.is_cuda():
        # Tests of several engines run at a time, and this model needs next to nothing.
        arguments.setdefault("gpu_memory_utilization", 0.1)
    if options is not None:
        arguments["attention_backend"] = "hybridkv"
        arguments["additional_config"] = {"hybridkv": {"min_prompt_tokens": 16, **options}}
    with _modules_no_garbage():
        started = Engine(LLM(str(model), **arguments))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield started
        finally:
            torch.set_num_threads(before)
            started.shut_down()
            cleanup_dist_env_and_memory()
            torch._dynamo.reset()


@contextmanager
def _modules_no_garbage() -> Iterator[None]:
    """vLLM collects garbage whenever it starts and ends: not among all its modules, which it would thaw."""
    gc.freeze()
    try:
        with patch.object(gc, "freeze"), patch.object(gc, "unfreeze"):
            yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class Ended:
    """How requests ended, by id: answered, or aborted by the client."""

    answered: dict[str, RequestOutput] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)


def random_arrivals(
    ours: Engine,
    dice: random.Random,
    new_request: Callable[[int], tuple[Ask, Mapping[str, Any]]],
    *,
    number: int,
    arrives: float,
    aborted: float,
    after_step: Callable[[], None] = lambda: None,
) -> Ended:
    """Requests arrive between steps, and are aborted anywhere: while waiting, in prefill, while decoding.

    Args:
        new_request: the n-th request, and how to sample beyond what it says itself.
        number: of requests.
        arrives: chance of another request before a step.
        aborted: chance that a step begins with one request fewer.
    """
    vllm_engine = ours.llm.llm_engine
    ended = Ended()
    live: list[str] = []
    arrived = 0
    while arrived < number or vllm_engine.has_unfinished_requests():
        while arrived < number and dice.random() < arrives:
            ask, sampling = new_request(arrived)
            vllm_engine.add_request(str(arrived), ask.prompt(), ask.sampling(**sampling))
            live.append(str(arrived))
            arrived += 1
        if live and dice.random() < aborted:
            victim = dice.choice(live)
            vllm_engine.abort_request([victim])
            live.remove(victim)
            ended.aborted.append(victim)
        for output in vllm_engine.step():
            if output.finished:
                ended.answered[output.request_id] = output
                live.remove(output.request_id)
        after_step()
    assert not live
    assert len(ended.answered) + len(ended.aborted) == number
    return ended


def schedule_asynchronously(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns async scheduling on, which vLLM's CPU platform turns off: steps overlap as they do on a GPU."""
    if current_platform.is_cuda():
        return
    # The plugin patches the same method: loaded after this, it would be undone along with it.
    load_general_plugins()
    platform = type(current_platform)
    original = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, config: VllmConfig) -> None:
        del cls
        with monkeypatch.context() as patch:
            # HybridKV's own check runs inside and must see the final value.
            patch.setattr(startup, "configure", lambda _: None)
            original(config)
        config.scheduler_config.async_scheduling = True
        startup.configure(config)

    monkeypatch.setattr(platform, "check_and_update_config", classmethod(check_and_update_config))
