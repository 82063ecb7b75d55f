"""The kernels' benchmark: what it runs is right, what is wrong gets no speed-up, and bytes are counted."""

from __future__ import annotations

import csv
import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hybridkv_quality.environment import environment
from scripts import load
from speed import clock, forward, operations, prefill
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
from speed.prepared import error_of_most_heads, error_of_worst_head, first_results, relative_error
from speed.results import Ratio, Record, Results, find_ratios, plot
from speed.rivals import RIVALS
from torch import Tensor
from triton.runtime.errors import OutOfResources

from hybridkv_vllm.worker import compress, recall

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


def test_what_goes_wrong_only_later_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, launches = operations.extent_decode, 0

    def wrong_from_the_second_on(*args: object) -> None:
        nonlocal launches
        real(*args)
        launches += args[-1] == "triton"
        if launches > 1:
            args[2].fill_(torch.nan)  # type: ignore[attr-defined]

    monkeypatch.setattr(operations, "extent_decode", wrong_from_the_second_on)
    assert kernels._measure("decode", "triton", SMALL, DEVICE, check=True).right is False


def test_one_token_left_out_of_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = operations.extent_decode

    def newest(query, pool, out, slot, length, *rest):  # type: ignore[no-untyped-def]
        real(query, pool, out, slot, length - int(rest[-1] != "torch"), *rest[:-1], "torch")

    def last_kept(query, pool, out, slot, length, tables, *rest):  # type: ignore[no-untyped-def]
        fewer = torch.tensor([0, rest[-1] != "torch"], dtype=torch.int32, device=pool.device)
        tables = replace(tables, extents=tables.extents - fewer)
        real(query, pool, out, slot, length, tables, *rest[:-1], "torch")

    for op, left_out, case in (
        ("dense", newest, Case(1, 32768, 1.0, 1.0)),
        ("decode", newest, Case(1, 32768, 0.1, 16.0)),
        ("decode", last_kept, Case(1, 32768, 0.6, 16.0)),
    ):
        monkeypatch.setattr(operations, "extent_decode", left_out)
        assert kernels._measure(op, "torch", case, DEVICE, check=True).right is True
        # By far, not by chance: one of as many tokens alike is half of what is tolerated.
        assert kernels._measure(op, "triton", case, DEVICE, check=True).error > 5 * operations.TOLERANCE


@pytest.mark.parametrize("fault", ["none", "tenth", "nothing", "landmarks", "host", "move"])
def test_what_is_wrong_at_the_end_of_a_prefill_is_noticed(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prefill.make_prompt(Case(1, 2048, 0.25, skew=1.0, dynamic=0.5, tier="host"), DEVICE, seed=1)
    expected = first_results(prefill.prefill_end(prompt.copy(), "torch"))
    real = compress.window_scores

    def blind_to_a_tenth(*args: Tensor, backend: str) -> None:
        real(*args, backend=backend)
        for scores in args[7:9]:
            scores[:, ::10] = 0

    def nothing(*args: object, **kwargs: object) -> None:
        pass

    module, name, wrong = {
        "none": (compress, "window_scores", real),
        "tenth": (compress, "window_scores", blind_to_a_tenth),
        "nothing": (compress, "window_scores", nothing),
        "landmarks": (recall, "landmark_build", nothing),
        "host": (recall, "chunk_offload", nothing),
        "move": (compress, "compact", nothing),
    }[fault]
    monkeypatch.setattr(module, name, wrong)
    prepared = prefill.prefill_end(prompt, "torch")
    error = prepared.error(first_results(prepared)[0], expected[0])
    assert (error <= operations.TOLERANCE) == (fault == "none")


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


def test_a_choice_is_timed_without_what_lets_it_miss_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(Case(2, 512, 0.8, dynamic=0.25), DEVICE, seed=1)
    chosen = operations.select(layer, "torch")
    # The least to read: 7 weights and a hot slot of each chunk of the one head of each row that recalls.
    assert chosen.num_bytes == 2 * 32 * (7 * 4 + 4)
    assert chosen.restore is not None
    chosen.restore()
    before = layer.pool.clone()
    chosen.run()
    # It brings nothing back itself.
    assert not torch.equal(layer.pool.view(torch.int16), before.view(torch.int16))
    chosen.restore()
    assert torch.equal(layer.pool.view(torch.int16), before.view(torch.int16))


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
    assert error_of_worst_head(found, expected) == float("inf")
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
    with pytest.raises(CaseError, match=r"share of 0\.1 .* multiple of 0\.25"):
        Case(1, 4096, dynamic=0.1)


def test_a_head_as_long_as_the_prompt_leaves_the_rest_of_the_budget_to_others() -> None:
    case = Case(32, 32768, 0.6, skew=16.0)
    pruned, _ = head_pages(case, landmark_pages=147)
    assert sum(pruned) / (KV_HEADS * case.chunks) == pytest.approx(0.6, rel=0.01)
    assert pruned == sorted(pruned, reverse=True)
    assert pruned[0] == case.chunks
    assert pruned[-1] < case.chunks / 8
    # Where no head is as long, and where all are.
    assert head_pages(Case(32, 32768, 0.1, skew=16.0), landmark_pages=147)[0] == [509, 201, 79, 31]
    assert head_pages(Case(8, 8192, 1.0, skew=1.0), landmark_pages=37)[0] == [512] * 4


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


def test_what_the_cache_answers_is_held_against_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    # Sixteen sets at most, of a megabyte and of ten.
    cuda = torch.device("cuda")
    assert [clock.stays_cached(size * 2**20, cuda) for size in (1, 10, 1000)] == [True, False, False]
    assert not clock.stays_cached(1, torch.device("cpu"))
    cached = record("gather", "triton", ms=1.0, num_bytes=10**6)
    assert ratios(cached) != {}
    cached.cached = True
    assert ratios(cached) == {}
    assert cached.cells()[5] == "1 cached"


def test_chunks_to_the_host_are_held_against_a_copy_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def bandwidth(num_bytes: int, device: torch.device, *, to_host: bool = False) -> float:
        return 1e9 if to_host else 1e12

    monkeypatch.setattr(kernels, "pinned_bandwidth", bandwidth)
    case = Case(1, 256, 0.5, skew=1.0, dynamic=0.5, tier="host")
    for op, expected in (("offload", 1e9), ("gather", 1e12)):
        measured = kernels._measure(op, "torch", case, DEVICE, check=False)
        assert measured.num_bytes / measured.link_ms * 1e3 == pytest.approx(expected)


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

    for wrong, said in {
        ("--prompt", "100"): "a prompt has a multiple of 16 tokens, not 100",
        ("--batch", "0"): "a batch has a request at least, not 0",
        ("--op", "decode", "--backends", "sdpa"): "nothing to measure",
    }.items():
        monkeypatch.setattr("sys.argv", ["kernels.py", *wrong])
        assert kernels.main() == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["kernels.py", "--op", "decoding"])
    with pytest.raises(SystemExit, match="2"):
        kernels.main()
    assert "unknown: decoding (operations: dense, decode" in capsys.readouterr().err


def run_grid(monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[int, dict[tuple[str, str, float], Record]]:
    """The command on a grid with a budget that cannot be: its status, and records by operation and budget."""
    arguments = ["--op", "dense,decode,score", "--backends", "torch,sdpa", "--batch", "1", "--prompt", "256"]
    arguments += ["--budget", "0.02,0.5", "--dynamic", "0.5", "--skew", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["kernels.py", *arguments])
    status = kernels.main()
    written = Results.model_validate_json((out / "kernels.json").read_text())
    return status, {(r.op, r.backend, r.case["budget"]): r for r in written.records}


def test_what_fails_keeps_nothing_else_from_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(layer: object, out: object) -> None:
        raise ValueError("not supported:\n  query: bfloat16\n  for want of a card")

    monkeypatch.setattr(operations, "RIVALS", {**RIVALS, "sdpa": refuse})
    status, found = run_grid(monkeypatch, tmp_path)
    assert status == 1
    rival = found["dense", "sdpa", 1.0]
    assert rival.missing == "ValueError: not supported: query: bfloat16 for want of a card"
    assert rival.right is None
    impossible = found["decode", "torch", 0.02]
    assert impossible.right is False
    assert "CaseError: Case(batch=1, prompt=256, budget=0.02" in (impossible.missing or "")
    assert all(found[op, "torch", 0.5].right for op in ("decode", "score"))
    printed = capsys.readouterr().out
    assert "left out: dense by sdpa: ValueError: not supported" in printed
    assert "failed: decode by torch, 1 x 256, 2%, skew 2, 50% recall from gpu: CaseError" in printed

    def too_large(*args: object, **kwargs: object) -> None:
        raise OutOfResources(300000, 232448, "shared memory")

    # Neither of Triton's errors is a RuntimeError.
    monkeypatch.setattr(operations, "RIVALS", {**RIVALS, "sdpa": too_large})
    monkeypatch.setattr(operations, "chunk_score", too_large)
    status, found = run_grid(monkeypatch, tmp_path)
    assert status == 1
    assert found["dense", "sdpa", 1.0].right is None
    assert found["score", "torch", 0.5].right is False
    assert "shared memory" in (found["score", "torch", 0.5].missing or "")
    assert found["decode", "torch", 0.5].right is True


def test_a_lost_device_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(layer: object, out: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(operations, "RIVALS", {**RIVALS, "sdpa": fault})
    monkeypatch.setattr(kernels, "is_lost", lambda device: True)
    status, found = run_grid(monkeypatch, tmp_path)
    assert status == 1
    assert [*found] == [("dense", "torch", 1.0), ("dense", "sdpa", 1.0)]
    assert found["dense", "sdpa", 1.0].right is False
    assert "dense by sdpa has lost the device" in capsys.readouterr().err
