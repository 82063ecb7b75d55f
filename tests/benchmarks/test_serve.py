"""Stock vLLM against hybridkv over HTTP: the conversations, the figures, and a small run of it all."""

from __future__ import annotations

import argparse
import base64
import csv
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hybridkv_serving import clients, command, trace
from hybridkv_serving.clients import Answer, Played
from hybridkv_serving.figures import OURS, STOCK, Comparison, Figures, Report, compare, figures_of
from hybridkv_serving.kinds import Kind
from hybridkv_serving.trace import CELL, Conversation, make_trace
from PIL import Image

from hybridkv_vllm import exit_codes
from hybridkv_vllm.cli import main
from hybridkv_vllm.server import Server


def pictures(kind: Kind, tokens: int, seed: int = 0) -> list[list[Image.Image]]:
    shown = []
    for conversation in make_trace(kind, 2, tokens, seed):
        urls = conversation.turns[0].pictures
        data = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
        shown.append([Image.open(io.BytesIO(content)) for content in data])
    return shown


def changed(one: Image.Image, other: Image.Image) -> float:
    return float((np.asarray(one) != np.asarray(other)).any(-1).mean())


@pytest.mark.parametrize("tokens", [300, 1536, 32768])
@pytest.mark.parametrize("kind", ["images", "video", "chat"])
def test_conversations_have_about_the_tokens_asked_for(kind: Kind, tokens: int) -> None:
    for shown in pictures(kind, tokens):
        visual = sum(picture.width * picture.height for picture in shown) / CELL**2
        assert visual == pytest.approx(tokens, rel=0.1)
        assert all(side % CELL == 0 for picture in shown for side in picture.size)


def test_conversations_differ_and_can_be_repeated() -> None:
    first, second = pictures("images", 600)
    assert changed(first[0], second[0]) > 0.2
    assert changed(first[0], first[1]) > 0.2
    assert changed(first[0], pictures("images", 600)[0][0]) == 0
    assert changed(first[0], pictures("images", 600, seed=1)[0][0]) > 0.2
    frames = np.mean([changed(*pair) for shown in pictures("video", 600) for pair in pairwise(shown)])
    assert 0 < frames < 0.5
    turns = [len(conversation.turns) for conversation in make_trace("chat", 1, 300, 0)]
    assert turns == [2]


def arguments_of(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(text.split())


def test_no_scenario_asks_what_another_has_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would have it in its caches."""
    asked: list[Conversation] = []

    async def play(
        url: str, model: str, conversations: Sequence[Conversation], *, clients: int, answer_tokens: int
    ) -> Played:
        asked.extend(conversations)
        return Played([answer(0, 1, 2)], seconds=2)

    monkeypatch.setattr(clients, "play", play)
    args = arguments_of("--clients 1,3,1 --requests 4 --prompt-tokens 64")
    measured = list(command._measure(STOCK, Server("http://nowhere", Path("no.log")), args))
    assert [(f.scenario, f.clients) for f in measured[:2]] == [("batch", 1), ("batch", 3)]
    pictures = [picture for conversation in asked for picture in conversation.turns[0].pictures]
    assert len(asked) == 1 + 1 + 3 + 3 * 4
    assert len(set(pictures)) == len(pictures)


def test_a_server_takes_as_many_pictures_as_a_conversation_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_data_url", lambda picture: "")
    for tokens in (1, 1536, 66560):
        (conversation,) = make_trace("video", 1, tokens, 0)
        given = command._server_arguments(OURS, arguments_of(f"--prompt-tokens {tokens}"))
        shown = len(conversation.turns[0].pictures)
        assert given[given.index("--limit-mm-per-prompt") + 1] == f'{{"image": {shown}}}'
        # Two marks for each, and the question and its template.
        assert int(given[given.index("--max-model-len") + 1]) >= tokens + 2 * shown + 2 * 48 + 128


def answer(sent: float, *times: float, error: str = "") -> Answer:
    return Answer(sent, list(times), prompt_tokens=100, tokens=len(times), error=error)


def test_figures_are_of_what_was_answered() -> None:
    played = Played([answer(0, 1, 2, 3, 4), answer(0, 2, 4, 5, 6), answer(1, error="full")], seconds=8)
    figures = figures_of(OURS, "batch", 3, played, first_token=1.5, each_token=1.0)
    assert (figures.answers, figures.failed, figures.decoding_at_once) == (2, 1, 2)
    assert figures.tokens_per_second == 1
    assert figures.first_token_p50 == 1.5
    # One failed: what is left is no batch of three.
    assert figures.ms_per_token is None
    # The second came too late, and slowly.
    assert figures.goodput == pytest.approx(1 / 8)
    both = Played(played.answers[:2], seconds=8)
    # From 2 to 4 s: tokens at 3, 4 and at 4.
    assert figures_of(OURS, "batch", 2, both, 9, 9).ms_per_token == pytest.approx(1e3 * 2 * 2 / 3)
    assert figures_of(OURS, "batch", 3, both, 9, 9).ms_per_token is None
    apart = Played([answer(0, 1, 2), answer(5, 6, 7)], seconds=7)
    assert figures_of(STOCK, "batch", 2, apart, 9, 9).ms_per_token is None
    with pytest.raises(RuntimeError, match="no answer at all: full"):
        figures_of(STOCK, "chat", 1, Played([answer(0, error="full")], 1), 9, 9)


def test_an_answer_that_waits_is_not_being_decoded() -> None:
    steady = answer(0, *range(1, 21))
    preempted = answer(0, 1, 2, 3, 18, 19, 20)
    late = answer(0, *range(8, 15))
    assert figures_of(STOCK, "chat", 3, Played([steady, late, preempted], 20), 9, 9).decoding_at_once == 2
    assert figures_of(STOCK, "chat", 3, Played([steady, late, steady], 20), 9, 9).decoding_at_once == 3
    next_one = answer(0, *(time + 0.5 for time in range(20, 30)))
    assert figures_of(STOCK, "chat", 3, Played([steady, late, next_one], 30), 9, 9).decoding_at_once == 2


def test_comparisons_are_above_one_where_we_are_ahead() -> None:
    played = Played([answer(0, 1, 2, 3)], seconds=4)
    stock = figures_of(STOCK, "video", 1, played, 9, 9)
    ours = stock.model_copy(
        update={"server": OURS, "decoding_at_once": 3, "ms_per_token": 500.0, "first_token_p50": 2.0}
    )
    other = stock.model_copy(update={"server": OURS, "clients": 2})
    found = {c.what: c.value for c in compare([stock, ours, other])}
    assert found["decoding_at_once"] == 3
    assert found["ms_per_token"] == 2
    assert found["first_token_p50"] == 0.5
    assert found["tokens_per_second"] == 1


@pytest.mark.parametrize("failing", [STOCK, OURS])
def test_who_failed_is_not_compared(failing: str) -> None:
    """A server that answers less is quick."""
    whole, part = Played([answer(0, 1, 2)] * 2, 2), Played([answer(0, 1, 2), answer(0, error="500")], 2)
    both = [figures_of(name, "batch", 2, part if name == failing else whole, 9, 9) for name in (STOCK, OURS)]
    assert list(compare(both)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients", "8", "--prompts-in-memory", "4"], "more at once than --prompts-in-memory"),
        (["--clients", "0"], "--clients must be at least 1, got 0"),
        (["--requests", "0"], "--requests must be at least 1, got 0"),
        (["--budget", "0"], "--budget must be above 0 and at most 1, got 0.0"),
        (["--out", f"{__file__}/results"], "name another folder"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[0],
)
def test_arguments_that_cannot_be(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", *arguments]) == exit_codes.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients", "two"], "'two': write whole numbers with commas, such as 1,32"),
        (["--scenarios", "batch,films"], "unknown: films (known: batch, images, video, chat)"),
    ],
)
def test_arguments_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == exit_codes.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.server
def test_a_server_that_does_not_start_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows -- is the servers'; here something that vLLM does not know."""
    assert main(["bench", "--out", str(tmp_path), "--", "--no-such-flag"]) == exit_codes.PROBLEM
    said = capsys.readouterr().err
    assert "hybridkv bench: the server stopped with exit code 2" in said
    assert "--no-such-flag" in said


@pytest.mark.slow
@pytest.mark.server
def test_more_requests_run_at_once_in_the_same_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "bench --scenarios batch,chat --requests 7 --prompt-tokens 1200 --prompts-in-memory 2 --clients 2"
    assert main([*asked.split(), "--answer-tokens", "40", "--out", str(tmp_path), "--json"]) == exit_codes.OK
    report = Report.model_validate_json((tmp_path / "serve.json").read_text())
    assert Report.model_validate_json(capsys.readouterr().out) == report
    by_name: dict[tuple[str, str], Figures] = {(f.server, f.scenario): f for f in report.figures}
    assert set(by_name) == {(server, scenario) for server in (STOCK, OURS) for scenario in ("batch", "chat")}
    assert all(f.failed == 0 and f.prompt_tokens > 1100 for f in report.figures)
    assert [by_name[name, "chat"].answers for name in (STOCK, OURS)] == [14, 14]
    assert by_name[STOCK, "chat"].decoding_at_once == 2
    assert by_name[OURS, "chat"].decoding_at_once >= 4
    ratio = next(c for c in report.comparisons if (c.scenario, c.what) == ("chat", "decoding_at_once"))
    assert ratio == Comparison(
        scenario="chat", clients=8, what="decoding_at_once", value=by_name[OURS, "chat"].decoding_at_once / 2
    )
    with (tmp_path / "serve.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(report.figures)
    assert (tmp_path / "serve.png").stat().st_size > 5000
