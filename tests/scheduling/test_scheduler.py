"""What the scheduler plans for a prompt: whether it is compressed, its visual tokens, its place in a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from pools import make_pool, make_request
from vllm.multimodal.inputs import PlaceholderRange

from hybridkv_vllm.config import parse_server_options
from hybridkv_vllm.observe.metrics import EngineMetrics
from hybridkv_vllm.plan import ceil_pages, make_plan
from hybridkv_vllm.scheduling.scheduler import HybridKVScheduler, visual_spans


class Planner(HybridKVScheduler):
    """Our scheduler without vLLM's, which wants a whole engine; notes its fallbacks."""

    def __init__(self, *, num_blocks: int = 200, max_model_len: int = 2048, **options: Any) -> None:
        self.hybridkv_options = parse_server_options({"min_prompt_tokens": 16, **options})
        _, self.hybridkv_manager = make_pool(num_blocks, max_model_len)
        self.fallbacks: list[str] = []
        self.hybridkv_metrics = cast(EngineMetrics, SimpleNamespace(fallback=self.fallbacks.append))
        self.max_model_len = max_model_len
        self.num_prefill_lookahead = 0
        self._ending_tokens = 0
        self._reports = {}


@pytest.mark.parametrize(("option", "shortest"), [(100, 100), (16, 16), (1, 16)])
def test_the_shortest_prompt_that_is_compressed(option: int, shortest: int) -> None:
    """As the option says, and never less than a block, which is what there is to give back."""
    planner = Planner(min_prompt_tokens=option)
    assert planner._plan(make_request(shortest)) is not None
    assert planner._plan(make_request(shortest - 1)) is None
    assert planner.fallbacks == []


@pytest.mark.parametrize(("tokens", "max_tokens"), [(256, 1024), (250, 70)])
def test_a_plan_fits_the_pool_to_the_last_block(tokens: int, max_tokens: int) -> None:
    """Its longest answer and its arena; with a block less it could never end. The null block is nobody's."""
    needed = ceil_pages(min(tokens + max_tokens, 512)) + make_plan(tokens, (), 0.25, 64).arena_size
    for num_blocks, fits in ((needed + 1, True), (needed, False)):
        planner = Planner(num_blocks=num_blocks, max_model_len=512, budget=0.25)
        assert (planner._plan(make_request(tokens, max_tokens)) is not None) == fits
        assert planner.fallbacks == ([] if fits else ["pool_too_small"])


def test_what_cannot_be_planned_is_served_uncompressed_and_counted() -> None:
    planner = Planner()
    assert planner._plan(make_request(100, extra_args={"hybridkv_budget": 7})) is None
    assert planner._plan(make_request(100, resumable=True)) is None
    assert planner.fallbacks == ["bad_request_options", "streaming_input"]


def test_visual_spans_are_exactly_the_embedded_tokens() -> None:
    """Ascending, whatever order the kinds come in; embeddings in place of text are no picture."""
    request = make_request(100)
    request.mm_features = [
        SimpleNamespace(modality=kind, mm_position=PlaceholderRange(offset=offset, length=length))
        for kind, offset, length in (("video", 40, 10), ("prompt_embeds", 60, 9), ("image", 5, 20))
    ]
    assert visual_spans(request) == ((5, 25), (40, 50))


def test_prompts_that_end_in_a_step_have_at_most_a_longest_prompts_scores() -> None:
    """The third waits before its window."""
    planner, window = Planner(max_model_len=450), 64
    for name in "abc":
        planner.hybridkv_manager.add_plan(name, make_plan(200, (), 0.25, window))
    lengths = [planner._reserve_prefill_lookahead(make_request(200, name=name), 0, 200) for name in "abc"]
    assert lengths == [200, 200, 200 - window]
