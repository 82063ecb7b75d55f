"""The kernels' benchmark: what it runs is right, what is wrong gets no speed-up, and bytes are counted."""

from __future__ import annotations

import csv
import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hybridkv_quality.environment import environment
from scripts import load
from speed import forward, operations, prefill
from speed.layer import (
    KV_HEADS,
    Case,
    CaseError,
    find_misses,
    head_pages,
    make_layer,
    make_missing,
    query_that_misses,
)
from speed.operations import OPERATIONS
from speed.prepared import error_of_most_heads, relative_error
from speed.results import Ratio, Record, Results, find_ratios, plot

kernels = load("kernels")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Case(batch=2, prompt=256, budget=0.5, skew=4.0)


def record(op: str, backend: str, ms: float, num_bytes: int, right: bool = True, **sizes: object) -> Record:
    case = asdict(Case(2, 256)) | sizes
    return Record(op=op, backend=backend, case=case, num_bytes=num_bytes, ms=ms, error=0.0, right=right)


def ratios(*records: Record) -> dict[str, float]:
    results = Results(
        environment=environment("a card"),
        copy_bandwidth=1e12,
        pinned_bandwidth=1e10,
        records=list(records),
    )
    return {ratio.what: ratio.value for ratio in find_ratios(results)}


@pytest.mark.parametrize("tier", ["gpu", "host"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_is_right(op: str, tier: str) -> None:
    operation = OPERATIONS[op]
    case = operation.case(Case(2, 256, 0.5, dynamic=0.5, tier=tier, missed=0.3))
    backend = "triton" if "triton" in operation.backends else "sdpa"
    if not operation.applies(case):
        assert (op, tier) == ("offload", "gpu")
        return
    measured = kernels._measure(op, backend, case, DEVICE, check=True)
    assert (measured.right, measured.missing) == (True, None)
    assert measured.num_bytes > 0
    assert (measured.ms is None) == (DEVICE.type == "cpu")


def test_what_is_wrong_or_not_written_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = operations.extent_decode

    def wrong(*args: object) -> None:
        real(*args)
        if args[-1] == "triton":
            args[2][0, 0, 0] += 1  # type: ignore[index]

    monkeypatch.setattr(operations, "extent_decode", wrong)
    assert kernels._measure("decode", "triton", SMALL, DEVICE, check=True).right is False

    def idle(*args: object) -> None:
        if args[-1] == "torch":
            real(*args)

    monkeypatch.setattr(operations, "extent_decode", idle)
    measured = kernels._measure("decode", "triton", SMALL, DEVICE, check=True)
    assert (measured.right, measured.error) == (False, float("inf"))


@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        ("window", "window_scores"),
        ("move", "compact"),
        ("landmarks", "landmark_build"),
        ("offload", "chunk_offload"),
    ],
)
def test_what_a_prefills_end_does_not_write_is_noticed(
    op: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"hybridkv_kernels.{kernel}.triton")
    monkeypatch.setattr(module, kernel, lambda *args, **kwargs: None)
    case = Case(1, 256, 0.5, skew=1.0, dynamic=0.5, tier="host")
    assert kernels._measure(op, "triton", case, DEVICE, check=True).right is False


def test_the_end_of_a_prefill_is_the_workers_own() -> None:
    prompt = prefill.make_prompt(Case(1, 512, 0.25, skew=1.0, dynamic=0.5, tier="host"), DEVICE, seed=1)
    # The profile's verdict, and the budget: two of four heads recall, all arena pages are somebody's.
    assert (prompt.chunk_first >= 0).tolist() == [[True, True, False, False]] * prompt.layers
    assert prompt.grant.plan.arena_size == 8
    prepared = prefill.prefill_end(prompt, "torch")
    prepared.poison()
    assert not prompt.extents.equal(prompt.tables.decode.extents[0])
    prepared.run()
    assert prompt.extents.equal(prompt.tables.decode.extents[0])
    # Random keys and values: their mean square is 1.
    assert torch.allclose(prepared.result(), torch.ones((), dtype=torch.float64), atol=0.2)
    recalled = prompt.recalling * 512 * 2 * 128 * 2
    assert prepared.num_bytes == prompt.layers * prompt.key_bytes + prompt.kept_bytes + recalled
    with pytest.raises(CaseError, match="smaller budget"):
        prefill.make_prompt(Case(1, 64, 1.0), DEVICE, seed=1)


def test_a_layers_forward_is_a_decoder_layers() -> None:
    made = forward.make_forward(Case(1, 48), torch.device("cpu"), seed=2)
    prepared = forward.prefill(made, "torch")
    prepared.run()
    heads = (made.hidden.double() @ made.qkv.double()).unflatten(-1, (-1, 128))
    query, key, value = heads.split([28, 4, 4], dim=1)
    key, value = (part.repeat_interleave(7, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * 128**-0.5
    scores = scores.masked_fill(torch.ones(48, 48).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
    hidden = made.hidden.double() + mixed @ made.out.double()
    gate, up = (hidden @ made.gate_up.double()).chunk(2, dim=-1)
    expected = hidden + (gate * gate.sigmoid() * up) @ made.down.double()
    assert relative_error(prepared.result(), expected) < 1e-2


@pytest.mark.parametrize("missed", [0.01, 0.4])
def test_a_step_misses_as_many_chunks_as_asked(missed: float) -> None:
    layer = make_layer(Case(2, 512, 0.6, dynamic=0.5, missed=missed), DEVICE, seed=1)
    hot = int(layer.compressed.extents[0, 0, 0, 1]) // 16
    for _ in range(2):
        misses = find_misses(layer)
        before = layer.work.counters.sum(0)
        make_missing(layer, misses)
        layer.run_recall("torch")
        found, missing = (layer.work.counters.sum(0) - before).tolist()
        # Each recalling head of each row: its share, at least one chunk.
        assert missing == 4 * max(1, round(missed * hot)) == misses.slot.numel()
        assert found + missing == 4 * hot
    assert torch.equal(layer.pool[misses.page], layer.copy().pool[misses.page])


def test_two_queries_in_turn_miss_what_was_asked_for() -> None:
    layer = make_layer(Case(2, 1024, 0.5, dynamic=0.5, missed=0.1), DEVICE, seed=1)
    hot = int(layer.compressed.extents[..., 1][layer.recall.chunk_first >= 0].sum()) // 16
    other, pages = query_that_misses(layer)
    assert len(pages) == pytest.approx(0.1 * hot, abs=2)
    for query in (other, layer.query) * 2:
        before = layer.work.counters.sum(0)
        layer.run_recall("torch", query)
        assert (layer.work.counters.sum(0) - before).tolist() == [hot - len(pages), len(pages)]
    # The same for a copy, which another backend works on.
    again, same = query_that_misses(layer.copy())
    assert torch.equal(again, other)
    assert sorted(same.tolist()) == sorted(pages.tolist())
    with pytest.raises(CaseError, match="smaller budget"):
        query_that_misses(make_layer(Case(2, 256, 2.0, dynamic=0.5), DEVICE, seed=1))


def test_a_choice_that_rounding_decides_is_not_an_error_and_more_are() -> None:
    expected = torch.randn(8, 28, 128)
    found = expected * 1.001
    found[3, 7:14] = torch.nan
    found[5, :7] += 1
    assert error_of_most_heads(found, expected) == pytest.approx(1e-3, rel=1e-3)
    found[6, :7] += 1
    assert error_of_most_heads(found, expected) > 0.5
    few = expected[:2].clone()
    few[1, 27] += 1
    assert error_of_most_heads(few, expected[:2]) > 0.1


def test_pages_of_heads_fill_the_budget() -> None:
    pruned, hot = head_pages(Case(1, 4096, 0.25, skew=8.0, dynamic=0.5), landmark_pages=20)
    assert len(pruned) == KV_HEADS // 2
    assert pruned[0] / pruned[1] == pytest.approx(8, rel=0.1)
    used = sum(pruned) + 2 * (20 + hot)
    assert used == 4 * 64
    with pytest.raises(CaseError, match="larger budget"):
        head_pages(Case(1, 4096, 0.05, dynamic=0.5), landmark_pages=20)
    with pytest.raises(CaseError, match="multiple of 16"):
        Case(1, 100)


def test_speed_is_compared_within_the_run_and_only_where_results_are_right() -> None:
    ours = record("decode", "triton", ms=2.0, num_bytes=10**9)
    rivals = (
        record("dense", "triton", ms=12.0, num_bytes=8 * 10**9),
        record("dense", "sdpa", ms=30.0, num_bytes=8 * 10**9),
        record("dense", "fa3", ms=10.0, num_bytes=8 * 10**9),
        record("dense", "flashinfer", ms=1.0, num_bytes=8 * 10**9, right=False),
        record("dense", "fa3", ms=1.0, num_bytes=10**9, prompt=512),
    )
    found = ratios(ours, *rivals)
    assert found["bytes of the full cache / of decode"] == 8
    assert found["decode: speed against fa3 on all"] == 5
    assert found["decode: speed against sdpa on all"] == 15
    assert not any("flashinfer" in what for what in found)
    assert found["decode: bytes over time / bandwidth of a copy"] == pytest.approx(0.5)
    wrong = ratios(ours.model_copy(update={"right": False}), *rivals)
    assert [what for what in wrong if what.startswith("decode")] == []
    unchecked = ratios(ours.model_copy(update={"right": None}), *rivals)
    assert [what for what in unchecked if what.startswith("decode")] == []


def test_the_share_of_recall_and_the_link_of_the_tier() -> None:
    sizes = {"dynamic": 0.5, "tier": "host"}
    attention = record("decode", "triton", 2.0, 10**9, **sizes)
    step = record("step", "triton", 4.0, 10**9, **sizes)
    in_place = record("step_in_place", "triton", 3.6, 10**9, **sizes)
    between = record("step_between", "triton", 2.2, 10**9, **sizes)
    gather = record("gather", "triton", 1.0, 8 * 10**6, **sizes)
    gather.link_ms = 0.8
    found = ratios(attention, step, in_place, between, gather)
    # Fetching is not part of it.
    assert found["step: share of recall, interval 1"] == pytest.approx(1.6 / 4)
    assert found["step: share of recall, interval 4"] == pytest.approx((1.6 + 3 * 0.2) / (4 + 3 * 2.2))
    wrong = between.model_copy(update={"right": False})
    assert not any("share of recall" in what for what in ratios(attention, step, in_place, wrong))
    # A pinned copy of as many bytes takes four fifths of the time.
    assert found["gather: bytes over time / bandwidth of a copy"] == pytest.approx(0.8)


def test_the_end_of_a_prefill_is_held_against_all_its_layers() -> None:
    sizes = {"batch": 1, "dynamic": 0.5}
    end = record("prefill_end", "triton", 28.0, 10**9, **sizes)
    layers = (
        record("prefill", "torch", 40.0, 10**9, batch=1),
        record("prefill", "fa3", 20.0, 10**9, batch=1),
        record("prefill", "fa3", 1.0, 10**9, right=False, batch=1),
    )
    found = ratios(end, *layers)
    assert found["prefill_end: share of that prefill"] == pytest.approx(28 / (28 * 20))
    assert "prefill_end: bytes over time / bandwidth of a copy" not in found
    # In the time of a pinned copy of as many bytes.
    offload = record("offload", "triton", 1.0, 10**7, batch=1, tier="host")
    offload.link_ms = 1.0
    assert ratios(offload)["offload: bytes over time / bandwidth of a copy"] == pytest.approx(1)


def test_times_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    results = Results(environment=environment("a card"), copy_bandwidth=1e12, pinned_bandwidth=1e10)
    plot(results, tmp_path)
    assert list(tmp_path.iterdir()) == []
    results.records.append(record("decode", "triton", ms=2.0, num_bytes=10**9))
    plot(results, tmp_path)
    assert (tmp_path / "kernels.png").stat().st_size > 5000


def test_relative_error_takes_nothing_for_right_that_is_not_a_number() -> None:
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) == 0
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 8.0])) == pytest.approx(5 / 8)
    assert relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["kernels.py", "--op", "dense,decode", "--batch", "1", "--prompt", "256", "--budget", "0.25"]
    arguments += ["--dense-sizes", "2x128,1x512", "--dynamic", "0", "--skew", "2"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path)])
    assert kernels.main() == 0
    printed = capsys.readouterr().out
    assert "bytes of the full cache" in printed.replace("\n", " ")
    written = Results.model_validate_json((tmp_path / "kernels.json").read_text())
    done = {(r.op, r.backend) for r in written.records if r.missing is None}
    assert done >= {("dense", "triton"), ("dense", "sdpa"), ("decode", "triton")}
    assert all(r.right for r in written.records if r.missing is None)
    sizes = {
        op: {(r.case["batch"], r.case["prompt"]) for r in written.records if r.op == op} for op, _ in done
    }
    assert sizes == {"dense": {(1, 256), (2, 128), (1, 512)}, "decode": {(1, 256)}}
    saved = Ratio.model_validate(json.loads((tmp_path / "kernels.json").read_text())["ratios"][0])
    assert 3.7 < saved.value < 4.2
    with (tmp_path / "kernels.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(written.records)

    monkeypatch.setattr("sys.argv", ["kernels.py", "--prompt", "100"])
    assert kernels.main() == 2
    assert "a prompt has a multiple of 16 tokens, not 100" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["kernels.py", "--op", "decoding"])
    with pytest.raises(SystemExit, match="2"):
        kernels.main()
    assert "unknown: decoding (operations: dense, decode" in capsys.readouterr().err
