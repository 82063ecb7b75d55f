"""A real `vllm serve`: what clients get, what operators see, and that both tell the same story."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import httpx
import numpy as np
import pytest
from hybridkv_kernels.recall.layout import LandmarkLayout
from hybridkv_kernels.recall.tables import STORE_BLOCK
from openai import BadRequestError, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from hybridkv_vllm.cli import main
from hybridkv_vllm.observe.api import HeadsResponse, Stats
from hybridkv_vllm.observe.heads import Head, RequestHeads
from hybridkv_vllm.observe.metrics import METRICS, engine_metrics, prepare_directory
from hybridkv_vllm.plan import PAGE_TOKENS, arena_blocks, make_plan
from hybridkv_vllm.policies import recall_limits
from hybridkv_vllm.server import Server, ServerFailed, serve
from hybridkv_vllm.tiny_model import sample_picture

pytestmark = [pytest.mark.slow, pytest.mark.server]

MODEL = "tiny"
BUDGET = 0.25
MIN_PROMPT_TOKENS = 64
MAX_MODEL_LEN = 1024
# A prompt of this length and its arena fit; at budget 1.0 they do not (see the fallback test).
NUM_BLOCKS = 88
LAYERS, KV_HEADS, HEAD_SIZE = 4, 2, 64  # The tiny model's.
NUM_HEADS = LAYERS * KV_HEADS
THETA = 0.9
WINDOW = 64
# Tokens up to the photograph's end, whatever is asked about it: the template's and its own.
PICTURE_END = 28 + 18 * 21
# Landmarks of the default kind in fp32.
LANDMARKS = LandmarkLayout("sketch2", HEAD_SIZE, 4)
ARGUMENTS = (
    "--attention-backend",
    "hybridkv",
    "--additional-config.hybridkv.budget",
    str(BUDGET),
    "--additional-config.hybridkv.min_prompt_tokens",
    str(MIN_PROMPT_TOKENS),
    "--served-model-name",
    MODEL,
    "--dtype",
    "float32",
    "--max-model-len",
    str(MAX_MODEL_LEN),
    "--max-num-seqs",
    "4",
    "--max-num-batched-tokens",
    "1024",
    "--num-gpu-blocks-override",
    str(NUM_BLOCKS),
    # Random weights may like whitespace so much that no JSON is ever finished.
    "--structured-outputs-config.backend",
    "xgrammar",
    "--structured-outputs-config.disable_any_whitespace",
    "true",
)
# As on a user's machine; tests/conftest.py sets another level for engines in the tests' own process.
LOGGING = {"VLLM_LOGGING_LEVEL": "INFO"}
# On a CPU this gives the worker a process of its own, as with several GPUs.
ENVIRONMENT = {**LOGGING, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
QUESTION = "Who is in the picture, and what does she wear?"
REFUSED = [
    ({"hybridkv_budget": 0}, "option 'hybridkv_budget' is 0: input should be greater than 0"),
    ({"hybridkv_budget": 1.5}, "option 'hybridkv_budget' is 1.5: input should be less than or equal to 1"),
    ({"hybridkv_budget": "abc"}, "option 'hybridkv_budget' is 'abc': input should be a valid number"),
    ({"hybridkv_enabled": 7}, "option 'hybridkv_enabled' is 7: input should be a valid boolean"),
    (
        {"hybridkv_bugdet": 0.2},
        "unknown option 'hybridkv_bugdet' (known: hybridkv_budget, hybridkv_enabled, hybridkv_report)",
    ),
    (
        {"hybridkv_report": "perhaps"},
        "option 'hybridkv_report' is 'perhaps': input should be a valid boolean",
    ),
]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # What an engine in this process has counted must not show up in the server.
    prepare_directory()
    engine_metrics().compressed(make_plan(12345, (), BUDGET, 64), blocks_freed=771)
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(tiny_model, ARGUMENTS, log, environment=ENVIRONMENT) as it:
        assert Counters(it).values["hybridkv_requests_compressed_total"] == 0
        yield it


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


class Counters:
    """What `/metrics` shows now; labels are part of the name, as Prometheus prints them."""

    def __init__(self, server: Server) -> None:
        self.values: dict[str, float] = {}
        self.names: set[str] = set()
        for family in text_string_to_metric_families(server.get("/metrics").text):
            for sample in family.samples:
                if sample.name.startswith(("hybridkv_", "vllm:kv_cache_usage", "vllm:num_requests_running")):
                    own = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
                    label = "".join(f'{{{name}="{value}"}}' for name, value in own.items())
                    self.names.add(sample.name)
                    # How long something took is nothing to be exact about.
                    if not sample.name.endswith(("_seconds_sum", "_seconds_bucket")):
                        self.values[sample.name + label] = sample.value

    def since(self, before: Counters) -> dict[str, float]:
        """What has grown (or shrunk)."""
        changes = {name: value - before.values.get(name, 0.0) for name, value in self.values.items()}
        return {name: change for name, change in changes.items() if change}


class Served(NamedTuple):
    """One compressed request as its client knows it.

    Attributes:
        answer_id: of the response; the server's own id of the request contains it.
        prompt_tokens: from the response's usage.
        decodes: steps after the one that ended the prefill; None where the client does not know.
        budget: the request's, or the server's.
        visual_end: prompt tokens up to the picture's or the video's last; None of a prompt of text alone.
    """

    answer_id: str
    prompt_tokens: int
    decodes: int | None
    budget: float
    visual_end: int | None


def served(
    answer: ChatCompletion | ChatCompletionChunk | Completion,
    budget: float = BUDGET,
    choices: int = 1,
    visual_end: int = PICTURE_END,
) -> list[Served]:
    """The compressions behind an answer that ended at `max_tokens`: one a choice."""
    assert answer.usage is not None
    tokens = answer.usage.completion_tokens
    assert tokens % choices == 0
    # Only chats are about pictures here.
    end = None if isinstance(answer, Completion) else visual_end
    # The step that ends the prefill yields the first token.
    return [Served(answer.id, answer.usage.prompt_tokens, tokens // choices - 1, budget, end)] * choices


class Arena(NamedTuple):
    """What an arena must hold, from the prompt's length and the budget alone.

    Attributes:
        pages: all of them.
        keeps_all: whether every head keeps everything.
        most_recalling: heads that can recall, if they are dynamic.
        landmarks: pages of one recalling head's landmarks.
    """

    pages: int
    keeps_all: bool
    most_recalling: int
    landmarks: int

    @classmethod
    def of(cls, tokens: int, budget: float, visual_end: int | None = PICTURE_END) -> Arena:
        chunks, blocks = tokens // PAGE_TOKENS, arena_blocks(budget, tokens)
        landmarks = LANDMARKS.pages(chunks)
        keeps_all = blocks >= chunks
        pages = blocks * NUM_HEADS
        # Heads are judged by the text's share of the attention, which is all where there is only text.
        limits = None
        if visual_end is not None and not keeps_all:
            # The observation window is the text that follows; its last tokens may be in the tail.
            window = max(0, min(WINDOW, tokens - visual_end) - tokens % PAGE_TOKENS)
            limits = recall_limits(pages, NUM_HEADS, chunks, landmarks, window)
        if limits is None:
            return cls(pages, keeps_all, 0, 0)
        return cls(pages, keeps_all, limits[1], landmarks)


def arena_of(request: Served) -> Arena:
    """The request's arena."""
    return Arena.of(request.prompt_tokens, request.budget, request.visual_end)


def kept_tokens(request: Served, num_dynamic: int) -> float:
    """Tokens kept, mean per head: every page is full, and the partial block is in the tail."""
    arena, in_tail = arena_of(request), request.prompt_tokens % PAGE_TOKENS
    if arena.keeps_all:
        return request.prompt_tokens
    pages = arena.pages - min(num_dynamic, arena.most_recalling) * arena.landmarks
    return PAGE_TOKENS * pages / NUM_HEADS + in_tail


def expected_counts(requests: Sequence[Served], num_dynamic: Sequence[int]) -> dict[str, float]:
    """What compressing these prompts adds to the counters, but for the chunks.

    From their lengths, budgets and numbers of dynamic heads alone.
    """
    pruned = [
        max(0, dynamic - arena.most_recalling)
        for request, dynamic in zip(requests, num_dynamic, strict=True)
        for arena in (arena_of(request),)
        if not arena.keeps_all
    ]
    counts = {
        "hybridkv_requests_compressed_total": len(requests),
        "hybridkv_prompt_tokens_total": sum(request.prompt_tokens for request in requests),
        "hybridkv_blocks_freed_total": sum(request.prompt_tokens // PAGE_TOKENS for request in requests),
        "hybridkv_kept_tokens_total": sum(
            kept_tokens(request, dynamic) for request, dynamic in zip(requests, num_dynamic, strict=True)
        ),
        "hybridkv_compress_seconds_count": len(requests),
        'hybridkv_heads{type="static"}': len(requests) * NUM_HEADS - sum(num_dynamic),
        'hybridkv_heads{type="dynamic"}': sum(num_dynamic),
        'hybridkv_fallbacks_total{reason="landmarks_do_not_fit"}': sum(pruned),
    }
    return {name: count for name, count in counts.items() if count}


def settled(server: Server) -> Counters:
    """The counters once all that was asked before is in them: a step is counted when a next one begins."""
    # One token alone, as the first request, crashes vLLM's CPU build (stock vLLM too).
    body = {"model": MODEL, "prompt": [300] * 10, "max_tokens": 1}
    httpx.post(server.url + "/v1/completions", json=body, timeout=60).raise_for_status()
    return Counters(server)


def heads_reports(server: Server) -> list[RequestHeads]:
    """What `/hybridkv/heads` shows now."""
    return HeadsResponse.model_validate(server.get("/hybridkv/heads").json()).requests


def all_heads(report: RequestHeads) -> list[Head]:
    """The heads of all layers."""
    return [head for layer in report.layers for head in layer]


def hot_chunks(report: RequestHeads) -> int:
    """Chunks that a decode step chooses, over all heads that recall."""
    return sum(head.kept_tokens for head in all_heads(report) if head.recalled) // PAGE_TOKENS


def assert_accounted(report: RequestHeads, request: Served) -> None:
    """The report gives each page of the request's arena to one purpose, and each head what is due to it."""
    tokens = request.prompt_tokens
    arena = arena_of(request)
    assert (report.prompt_tokens, report.arena_pages) == (tokens, arena.pages)
    assert [len(layer) for layer in report.layers] == [KV_HEADS] * LAYERS
    heads = all_heads(report)
    for head in heads:
        assert head.type == ("static" if head.figure >= THETA else "dynamic")
        assert head.kept_tokens == PAGE_TOKENS * (head.pages - head.recalled * arena.landmarks) > 0
    most_dynamic = sorted((head for head in heads if head.type == "dynamic"), key=lambda head: head.figure)
    recalling = most_dynamic[: arena.most_recalling]
    assert [head for head in most_dynamic if head.recalled] == recalling
    assert sum(head.recalled for head in heads) == len(recalling)
    used = sum(head.pages for head in heads)
    if arena.keeps_all:
        assert used <= arena.pages
        assert {head.pages for head in heads} == {tokens // PAGE_TOKENS}
    else:
        assert used == arena.pages
    assert report.dynamic_share == sum(head.type == "dynamic" for head in heads) / NUM_HEADS
    assert report.recalled_share == sum(head.recalled for head in heads) / NUM_HEADS


def assert_counted(server: Server, before: Counters, requests: Sequence[Served]) -> None:
    """Nothing but these compressions has changed the counters, and `/hybridkv/heads` tells the same."""
    changes = settled(server).since(before)
    # vLLM appends to the answer's id, and puts a choice's number before it.
    reports = [
        report
        for report in heads_reports(server)
        if any(request.answer_id in report.request_id for request in requests)
    ]
    assert len(reports) == len(requests)
    num_dynamic, hot = [], 0
    for request in requests:
        report = next(report for report in reports if request.answer_id in report.request_id)
        reports.remove(report)
        assert_accounted(report, request)
        num_dynamic.append(sum(head.type == "dynamic" for head in all_heads(report)))
        hot += hot_chunks(report) * (request.decodes or 0)
    chosen = sum(changes.pop(f"hybridkv_chunks_{how}_total", 0) for how in ("hit", "recalled"))
    if all(request.decodes is not None for request in requests):
        assert chosen == hot
    assert changes == expected_counts(requests, num_dynamic)


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> bool:
    """Polls until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def picture_url(width: int | None = None) -> str:
    """The real photograph, or its left part, as a data URL."""
    png = io.BytesIO()
    photograph = sample_picture()
    photograph.crop((0, 0, width or photograph.width, photograph.height)).save(png, format="PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def picture_message(question: str = QUESTION) -> list[dict[str, Any]]:
    """One user turn: the real photograph and a question."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": picture_url()}},
                {"type": "text", "text": question},
            ],
        }
    ]


def ask(
    client: OpenAI, question: str = QUESTION, xargs: Mapping[str, Any] | None = None, **settings: Any
) -> ChatCompletion:
    """One greedy answer about the photograph."""
    extra = {**({"vllm_xargs": dict(xargs)} if xargs else {}), **settings.pop("extra_body", {})}
    return client.chat.completions.create(
        model=MODEL,
        messages=picture_message(question),
        **{"max_tokens": 12, "temperature": 0, "extra_body": extra, **settings},
    )


def complete(client: OpenAI, tokens: int) -> Completion:
    """Completes a text of this length."""
    prompt = [300 + n % 600 for n in range(tokens)]
    return client.completions.create(model=MODEL, prompt=prompt, max_tokens=3, temperature=0)


def token_logprobs(answer: ChatCompletion) -> list[float]:
    """The log-probability of each answered token."""
    return [place.logprob for place in answer.choices[0].logprobs.content]


def test_streaming_equals_the_whole_answer(client: OpenAI, server: Server) -> None:
    before = settled(server)
    whole = ask(client)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=picture_message(),
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content != ""
    assert sum(bool(piece) for piece in pieces) > 1  # It streamed, and not all at once.
    assert chunks[-1].usage == whole.usage
    # The second time from the prefix cache: the same compression, the same counts.
    assert_counted(server, before, [*served(whole), *served(chunks[-1])])


def test_logprobs_over_http(client: OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    places = answer.choices[0].logprobs.content
    assert len(places) == answer.usage.completion_tokens == 12
    for place in places:
        assert place.logprob <= 0
        # Greedy: the chosen token is the likeliest of those shown.
        assert place.token == place.top_logprobs[0].token
        assert len(place.top_logprobs) == 3


def test_two_answers_are_two_compressions_of_one_prompt(client: OpenAI, server: Server) -> None:
    before = settled(server)
    answer = ask(client, n=2, temperature=1.5, seed=5, extra_body={"ignore_eos": True})
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    assert_counted(server, before, served(answer, choices=2))


def test_structured_output(client: OpenAI) -> None:
    number = "[0-9]{3}-[0-9]{4}"
    answer = ask(client, "A number, please.", extra_body={"structured_outputs": {"regex": number}})
    assert re.fullmatch(number, answer.choices[0].message.content)
    schema = {
        "type": "object",
        "properties": {"hat": {"type": "boolean"}, "colour": {"enum": ["blue", "grey"]}},
        "required": ["hat", "colour"],
        "additionalProperties": False,
    }
    answer = ask(
        client,
        "Describe her as JSON.",
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )
    described = json.loads(answer.choices[0].message.content)
    assert isinstance(described["hat"], bool)
    assert described["colour"] in ("blue", "grey")


def test_a_video(client: OpenAI, server: Server, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    frame = np.asarray(sample_picture().resize((168, 168)))[:, :, ::-1]
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"mp4v"), 4, (168, 168))
    for step in range(16):
        writer.write(np.roll(frame, 8 * step, axis=1))
    writer.release()
    url = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
    before = settled(server)
    answer = client.chat.completions.create(
        model=MODEL,
        max_tokens=4,
        temperature=0,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": url}},
                    {"type": "text", "text": "What happens?"},
                ],
            }
        ],
    )
    assert answer.usage.completion_tokens == 4
    # Fourteen tokens follow the video.
    assert_counted(server, before, served(answer, visual_end=answer.usage.prompt_tokens - 14))


def assert_streams_are_refused(server: Server, xargs: Mapping[str, Any], message: str) -> None:
    """Before they start, with a status and not inside the stream."""
    for endpoint, prompt in (("completions", {"prompt": [1, 2, 3]}), ("responses", {"input": "Hi"})):
        body = {"model": MODEL, **prompt, "vllm_xargs": xargs, "stream": True}
        streamed = httpx.post(f"{server.url}/v1/{endpoint}", json=body, timeout=60)
        assert streamed.status_code == httpx.codes.BAD_REQUEST, endpoint
        assert message in streamed.json()["error"]["message"]


@pytest.mark.parametrize(("xargs", "message"), REFUSED, ids=[json.dumps(xargs) for xargs, _ in REFUSED])
def test_bad_options_are_http_400(
    client: OpenAI, server: Server, xargs: dict[str, Any], message: str
) -> None:
    before = settled(server)
    with pytest.raises(BadRequestError) as caught:
        ask(client, xargs=xargs)
    assert caught.value.status_code == httpx.codes.BAD_REQUEST
    assert message in caught.value.body["message"]
    assert "\n" not in caught.value.body["message"]
    assert caught.value.body["param"] == "vllm_xargs"
    assert not Counters(server).since(before)
    assert_streams_are_refused(server, xargs, message)
    # The server goes on.
    assert ask(client, max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("endpoint", "messages", "kind", "value", "text", "limit"),
    [
        ("chat/completions", "messages", "image_url", {"url": picture_url(width=364)}, "text", "max_tokens"),
        ("responses", "input", "input_image", picture_url(width=336), "input_text", "max_output_tokens"),
    ],
    ids=["chat", "responses"],
)
def test_a_picture_that_came_with_bad_options_is_no_loss(
    server: Server, endpoint: str, messages: str, kind: str, value: Any, text: str, limit: str
) -> None:
    """It had been prepared when the request was refused, and never reached the engine.

    One that the engine has already stays known: the last request sends no pixels.
    """

    def cache_hits() -> float:
        found = re.search(r"^vllm:mm_cache_hits_total{.*} (\S+)$", server.get("/metrics").text, re.M)
        assert found
        return float(found[1])

    content = [{"type": kind, "image_url": value}, {"type": text, "text": QUESTION}]
    body = {"model": MODEL, messages: [{"role": "user", "content": content}], limit: 2}
    before = cache_hits()
    for budget, status in ((7, httpx.codes.BAD_REQUEST), (0.5, httpx.codes.OK)) * 2:
        asked = {**body, "vllm_xargs": {"hybridkv_budget": budget}}
        answer = httpx.post(f"{server.url}/v1/{endpoint}", json=asked, timeout=60)
        assert answer.status_code == status, answer.text
    settled(server)
    assert cache_hits() - before == 2


def test_options_of_others_are_left_alone(client: OpenAI) -> None:
    assert ask(client, xargs={"other": 3}, max_tokens=2).usage.completion_tokens == 2


def test_a_request_can_go_without_compression_or_keep_everything(client: OpenAI, server: Server) -> None:
    start = settled(server)
    exact = ask(client, xargs={"hybridkv_enabled": False}, logprobs=True)
    between = settled(server)
    assert not between.since(start)
    everything = ask(client, xargs={"hybridkv_budget": 1.0}, logprobs=True)
    tokens = exact.usage.prompt_tokens
    changes = settled(server).since(between)
    assert changes["hybridkv_blocks_freed_total"] == tokens // PAGE_TOKENS
    assert changes["hybridkv_kept_tokens_total"] == tokens
    # Heads are dynamic all the same, and have nothing to recall.
    assert changes['hybridkv_heads{type="dynamic"}'] > 0
    assert_counted(server, between, served(everything, 1.0))
    assert not any(head.recalled for head in all_heads(heads_reports(server)[0]))
    assert everything.choices[0].message.content == exact.choices[0].message.content
    assert token_logprobs(everything) == pytest.approx(token_logprobs(exact), abs=1e-3)
    # The server's own budget does drop something: decoding sees it.
    pruned = token_logprobs(ask(client, logprobs=True))
    assert pruned[0] == pytest.approx(token_logprobs(exact)[0], abs=1e-3)
    assert pruned != pytest.approx(token_logprobs(exact), abs=1e-3)


def test_an_answer_says_what_became_of_its_prompt_if_asked(client: OpenAI, server: Server) -> None:
    assert ask(client, max_tokens=3).model_extra["kv_transfer_params"] is None
    before = settled(server)
    answer = ask(client, xargs={"hybridkv_report": True}, max_tokens=3)
    changes = settled(server).since(before)
    tokens = answer.usage.prompt_tokens
    arena = arena_blocks(BUDGET, tokens)
    assert answer.model_extra["kv_transfer_params"] == {
        "hybridkv": {
            "compressed": True,
            "prompt_tokens": tokens,
            "memory_share": round((arena * PAGE_TOKENS + tokens % PAGE_TOKENS) / tokens, 4),
            "arena_blocks": arena,
            "blocks_freed": changes["hybridkv_blocks_freed_total"],
        }
    }
    exact = ask(client, xargs={"hybridkv_report": True, "hybridkv_enabled": False}, max_tokens=3)
    told = exact.model_extra["kv_transfer_params"]
    assert told == {"hybridkv": {"compressed": False, "prompt_tokens": tokens}}
    # An answer of one token ends in the step that compresses: nothing went back early.
    short = ask(client, xargs={"hybridkv_report": True}, max_tokens=1)
    assert short.model_extra["kv_transfer_params"]["hybridkv"]["blocks_freed"] == 0


def test_inspect_draws_the_heads_of_a_prompt(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, map_file = tmp_path / "photo.png", tmp_path / "heads.png"
    sample_picture().save(photo)
    inspect = ["inspect", "--url", f"{server.url}/v1", "--out", str(map_file)]
    asked = ["--picture", str(photo), "--ask", QUESTION, "--budget", "0.5", "--json"]
    assert main([*inspect, *asked]) == 0
    told = json.loads(capsys.readouterr().out)
    newest = heads_reports(server)[0]
    assert RequestHeads.model_validate({name: told[name] for name in RequestHeads.model_fields}) == newest
    assert newest.arena_pages == arena_blocks(0.5, newest.prompt_tokens) * NUM_HEADS
    assert (told["policy"], told["classifier"], told["theta"]) == ("hybridkv", "text_mass", THETA)
    with Image.open(map_file) as drawn:
        assert drawn.width > 500
    # Without a question it is the same prompt, the last one.
    assert main(inspect) == 0
    assert f"{newest.prompt_tokens} tokens, {newest.arena_pages} pages kept" in capsys.readouterr().out
    assert main([*inspect, "--ask", "Short."]) == 1
    assert f"fewer than {MIN_PROMPT_TOKENS} tokens" in capsys.readouterr().err


def test_short_prompts_stay_uncompressed(client: OpenAI, server: Server) -> None:
    for tokens, compressed in ((MIN_PROMPT_TOKENS - 1, False), (MIN_PROMPT_TOKENS, True)):
        before = settled(server)
        done = complete(client, tokens)
        assert done.usage.prompt_tokens == tokens
        assert_counted(server, before, served(done) if compressed else [])


def test_heads_are_static_where_there_is_no_picture(client: OpenAI, server: Server) -> None:
    """Though this prompt is long enough for heads to recall."""
    assert Arena.of(400, BUDGET).most_recalling == NUM_HEADS
    before = settled(server)
    assert_counted(server, before, served(complete(client, 400)))
    assert {(head.type, head.recalled) for head in all_heads(heads_reports(server)[0])} == {("static", False)}


def test_counters_add_up_to_the_responses_usage(client: OpenAI, server: Server) -> None:
    before = settled(server)
    questions = [QUESTION, "What is this?", "Describe the scene in one sentence." * 4, "Why? " * 9] * 2
    budgets = [BUDGET, 0.1, 0.05, 1.0] * 2
    with ThreadPoolExecutor(max_workers=len(questions)) as threads:
        answers = list(
            threads.map(
                lambda question, budget: ask(client, question, {"hybridkv_budget": budget}, max_tokens=8),
                questions,
                budgets,
            )
        )
    prompts = [answer.usage.prompt_tokens for answer in answers]
    assert len(set(prompts)) == 4
    # All heads may recall, a few of those that are dynamic, none, and none needs to.
    limits = [Arena.of(*pair).most_recalling for pair in zip(prompts, budgets, strict=True)]
    assert limits == [NUM_HEADS, 2, 0, 0] * 2
    requests = [served(*pair) for pair in zip(answers, budgets, strict=True)]
    assert_counted(server, before, [request for one in requests for request in one])
    after = Counters(server).values
    assert after["hybridkv_blocks_arena"] == after["hybridkv_host_bytes"] == 0


def test_the_last_steps_chunks_do_not_wait_for_a_next_request(client: OpenAI, server: Server) -> None:
    before = settled(server)
    (request,) = served(ask(client))

    def chosen() -> float:
        changes = Counters(server).since(before)
        return sum(changes.get(f"hybridkv_chunks_{how}_total", 0) for how in ("hit", "recalled"))

    hot = hot_chunks(heads_reports(server)[0])
    assert request.decodes is not None
    assert wait_for(lambda: chosen() == request.decodes * hot > 0), chosen()


def test_heads_tell_of_the_last_requests_and_nothing_of_their_content(client: OpenAI, server: Server) -> None:
    older = ask(client)
    newer = ask(client, "Rosebud and rosebud and rosebud?", {"hybridkv_budget": 0.5}, max_tokens=3)
    settled(server)
    answer = server.get("/hybridkv/heads")
    assert "osebud" not in answer.text
    body = answer.json()
    told = HeadsResponse.model_validate(body)
    assert told.model_dump() == body  # What is declared, and nothing else.
    assert (told.classifier, told.theta) == ("text_mass", THETA)
    for report, request in zip(told.requests, (*served(newer, 0.5), *served(older)), strict=False):
        assert request.answer_id in report.request_id
        assert_accounted(report, request)
        # As the tiny model was made: in each layer one head for pictures, one for text.
        kinds = [[head.type for head in layer] for layer in report.layers]
        assert kinds == [["dynamic", "static"]] * LAYERS
    described = server.get("/openapi.json").json()
    operation = described["paths"]["/hybridkv/heads"]["get"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    fields = described["components"]["schemas"][schema.rpartition("/")[2]]["properties"]
    assert set(fields) == set(body)


def test_metrics_and_stats_show_every_name_and_agree(client: OpenAI, server: Server) -> None:
    # A prompt that would fill the sequence, and an arena as large as the prompt: more than the whole cache.
    start = time.monotonic()
    before = settled(server)
    tokens = ask(client, max_tokens=2, xargs={"hybridkv_enabled": False}).usage.prompt_tokens
    longest = math.ceil(MAX_MODEL_LEN / PAGE_TOKENS)
    assert longest + arena_blocks(BUDGET, MAX_MODEL_LEN) < NUM_BLOCKS <= longest + arena_blocks(1.0, tokens)
    answer = ask(
        client,
        max_tokens=MAX_MODEL_LEN - tokens,
        xargs={"hybridkv_budget": 1.0},
        extra_body={"structured_outputs": {"regex": "[0-9]{3}"}},
    )
    assert len(answer.choices[0].message.content) == 3
    fallback = 'hybridkv_fallbacks_total{reason="pool_too_small"}'
    assert settled(server).since(before) == {fallback: 1}
    ask(client)

    now = settled(server)
    suffixes = {"counter": "_total", "histogram": "_bucket"}
    assert {name + suffixes.get(description.kind, "") for name, description in METRICS.items()} <= now.names
    stats = Stats.model_validate(server.get("/hybridkv/stats").json())
    values = now.values
    assert stats.requests_compressed == values["hybridkv_requests_compressed_total"] > 0
    assert stats.prompt_tokens == values["hybridkv_prompt_tokens_total"] > 0
    assert stats.kept_tokens == values["hybridkv_kept_tokens_total"] > 0
    assert stats.kept_share == stats.kept_tokens / stats.prompt_tokens < 1
    assert stats.blocks_freed == values["hybridkv_blocks_freed_total"] > 0
    assert stats.blocks_arena == values["hybridkv_blocks_arena"] == 0
    assert stats.heads == {kind: values[f'hybridkv_heads{{type="{kind}"}}'] for kind in ("static", "dynamic")}
    assert sum(stats.heads.values()) == NUM_HEADS * stats.requests_compressed
    assert stats.chunks_recalled == values["hybridkv_chunks_recalled_total"] > 0
    assert stats.chunks_hit == values["hybridkv_chunks_hit_total"] > 0
    assert stats.hit_rate == stats.chunks_hit / (stats.chunks_hit + stats.chunks_recalled)
    assert stats.host_bytes == values["hybridkv_host_bytes"] == 0
    assert stats.blocks_replaced == values["hybridkv_blocks_replaced"] == 0
    assert stats.compress_seconds_count == values["hybridkv_compress_seconds_count"]
    assert stats.compress_seconds_count == stats.requests_compressed
    assert 0 < stats.compress_seconds_sum < time.monotonic() - start
    # Prometheus has to see 0 before the first one; who asks for figures sees those that occurred.
    counted = {name: n for name, n in values.items() if name.startswith("hybridkv_fallbacks_total") and n}
    assert {f'hybridkv_fallbacks_total{{reason="{reason}"}}': n for reason, n in stats.fallbacks.items()} == (
        counted
    )
    assert counted[fallback] == 1
    assert stats.options is not None
    assert (stats.options.budget, stats.options.min_prompt_tokens) == (BUDGET, MIN_PROMPT_TOKENS)


def test_a_client_that_goes_away_leaves_nothing_behind(client: OpenAI, server: Server) -> None:
    tokens = ask(client, max_tokens=2).usage.prompt_tokens
    body = {
        "model": MODEL,
        "messages": picture_message(),
        "max_tokens": MAX_MODEL_LEN - tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    for _ in range(3):
        before = settled(server)
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            answer_id = json.loads(next(lines).removeprefix("data: "))["id"]
            for _ in range(9):  # Events and the empty lines between them.
                next(lines)
            during, stats = Counters(server), Stats.model_validate(server.get("/hybridkv/stats").json())
            report = heads_reports(server)[0]
            if Counters(server).values["vllm:num_requests_running"] == 1:
                break
    else:
        pytest.fail("three answers ended before their figures were read: this machine is too busy to tell")
    assert during.values["hybridkv_blocks_arena"] == arena_blocks(BUDGET, tokens)
    assert during.values["hybridkv_blocks_replaced"] == tokens // PAGE_TOKENS
    assert during.values["vllm:num_requests_running"] == 1
    assert answer_id in report.request_id
    chunks = sum(head.recalled for head in all_heads(report)) * (tokens // PAGE_TOKENS)
    store_block_bytes = STORE_BLOCK * PAGE_TOKENS * 2 * HEAD_SIZE * 4
    host_bytes = math.ceil(chunks / STORE_BLOCK) * store_block_bytes
    assert during.values["hybridkv_host_bytes"] == host_bytes > 0
    assert stats.host_bytes == host_bytes
    assert wait_for(lambda: Counters(server).values["hybridkv_blocks_arena"] == 0)
    assert Counters(server).values["hybridkv_blocks_replaced"] == 0
    assert wait_for(lambda: Counters(server).values["hybridkv_host_bytes"] == 0)
    assert wait_for(lambda: Counters(server).values["vllm:num_requests_running"] == 0)
    assert wait_for(lambda: Counters(server).values["vllm:kv_cache_usage_perc"] == 0)
    assert_counted(server, before, [Served(answer_id, tokens, None, BUDGET, PICTURE_END)])
    assert ask(client).usage.completion_tokens == 12


def test_engines_and_api_servers_count_together_also_without_the_routes(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Two engines of a data-parallel server, each asked by name, behind two API servers."""
    # vLLM 0.33 wants a NUMA node for each engine on a CPU, unless told to simulate them; 0 simulates nothing.
    environment = {**LOGGING, "VLLM_PLUGINS": "hybridkv", "VLLM_CPU_SIM_MULTI_NUMA": "0"}
    # Several API servers share vLLM's own directory of counters: another way for ours to /metrics.
    arguments = (*ARGUMENTS, "--api-server-count", "2", "--data-parallel-size", "2")
    with serve(tiny_model, arguments, tmp_path / "log", environment=environment) as it:
        for path in ("/hybridkv", "/hybridkv/", "/hybridkv/stats", "/hybridkv/requests", "/hybridkv/heads"):
            assert httpx.get(it.url + path, timeout=60).status_code == httpx.codes.NOT_FOUND
        xargs, message = REFUSED[0]
        assert_streams_are_refused(it, xargs, message)
        before = settled(it)
        with OpenAI(base_url=it.url + "/v1", api_key="none", max_retries=0) as client:
            given = [ask(client, extra_headers={"X-data-parallel-rank": str(rank)}) for rank in (0, 1)]
        changes = settled(it).since(before)
        generated = re.findall(
            r'vllm:generation_tokens_total\{engine="(\d)".* (\S+)', it.get("/metrics").text
        )
        assert {engine: float(tokens) >= 12 for engine, tokens in generated} == {"0": True, "1": True}
        assert given[0].choices[0].message.content == given[1].choices[0].message.content
        assert changes.pop("hybridkv_chunks_recalled_total") > 0
        assert changes.pop("hybridkv_chunks_hit_total") > 0
        num_dynamic = round(changes['hybridkv_heads{type="dynamic"}']) // 2
        requests = [request for answer in given for request in served(answer)]
        assert changes == expected_counts(requests, [num_dynamic] * 2)


def test_a_server_that_ends_is_reported_with_its_log(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    start = time.monotonic()
    reason = r"(?s)exit code 2.* ends with:.*unrecognized arguments: --no-such-flag"
    with (
        pytest.raises(ServerFailed, match=reason) as caught,
        serve(tiny_model, ["--no-such-flag"], log, environment=ENVIRONMENT, timeout=120),
    ):
        pytest.fail("the server cannot have started")
    assert str(log) in str(caught.value)
    assert time.monotonic() - start < 60
