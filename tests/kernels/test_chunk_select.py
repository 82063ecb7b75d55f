"""The chunks that are chosen, against sorting by definition, and what has to move for them."""

import math
from dataclasses import replace

import pytest
import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.chunk_select import chunk_select
from hybridkv_kernels.chunk_select import triton as fused
from hybridkv_kernels.extent_decode import DecodeTables
from hybridkv_kernels.pages import MAX_CHUNKS
from hybridkv_kernels.recall.layout import LandmarkKind, LandmarkLayout
from hybridkv_kernels.recall.tables import RecallTables
from hybridkv_kernels.recall.work import RecallWork
from recall_cases import RecallCase, chosen_chunks, index, ragged_case, recall_case
from torch import Tensor

BACKENDS = ("torch", "triton")
ANYTHING = -9


def set_weights(case: RecallCase, layer: int, weights: dict[int, Tensor] | None = None) -> None:
    """Random weights, or the given ones of an item, for the chunks that exist; the rest stays as it is."""
    for item, head in case.items(layer):
        shape = (case.work.log_weight.shape[1], len(case.chunks[head]))
        # Each member has a constant of its own.
        random = torch.randn(shape) * 3 + torch.randn(shape[0], 1) * 50
        case.work.log_weight[item, :, : shape[1]] = random if weights is None else weights[item]


def expected(
    case: RecallCase, layer: int, interval: int = 1, pin_first: int = 0, pin_recent: int = 0
) -> dict[str, Tensor]:
    """What everything that a kernel may write holds after one selection."""
    heads = case.decode.num_kv_heads
    want = {name: tensor.clone() for name, tensor in case.tensors().items()}
    want["num_missing"][: len(case.row_slot) * heads] = 0
    for item, head in case.items(layer):
        if (int(case.row_len[item // heads]) - 1 - case.prompt_lens[head[0]]) % interval:
            continue
        resident = case.resident[head]
        weights = case.work.log_weight[item, :, : len(case.chunks[head])].cpu()
        chosen = chosen_chunks(weights, len(resident), pin_first, pin_recent)
        missing = [chunk for chunk in chosen if chunk not in resident]
        evicted = [chunk for chunk in sorted(resident) if chunk not in chosen]
        want["num_missing"][item] = len(missing)
        want["missing"][item, len(missing) : weights.shape[1]] = ANYTHING
        for place, (arriving, leaving) in enumerate(zip(missing, evicted, strict=True)):
            want["missing"][item, place] = arriving
            want["freed"][item, place] = resident.index(leaving)
            case.put(want["pool"], head, leaving, -1)
        counted = torch.tensor([len(chosen) - len(missing), len(missing)])
        want["counters"][head[0]] += counted.to(want["counters"])
    return want


def select(
    case: RecallCase,
    layer: int,
    backend: Backend,
    interval: int = 1,
    pin_first: int = 0,
    pin_recent: int = 0,
) -> None:
    """One selection of a case."""
    chunk_select(
        case.pool,
        case.row_slot,
        case.row_len,
        case.decode,
        case.recall,
        layer,
        case.layout,
        case.work,
        interval=interval,
        pin_first=pin_first,
        pin_recent=pin_recent,
        backend=backend,
    )


def check(
    case: RecallCase,
    layer: int,
    backend: Backend,
    interval: int = 1,
    pin_first: int = 0,
    pin_recent: int = 0,
) -> None:
    """Select, and compare with the definition."""
    want = expected(case, layer, interval, pin_first, pin_recent)
    select(case, layer, backend, interval, pin_first, pin_recent)
    assert_same(case, want)


def assert_same(case: RecallCase, want: dict[str, Tensor]) -> None:
    """Compare all that may have been written; lists may be in any order."""
    got = case.tensors()
    for name in got:
        left, right = got[name].clone(), want[name].clone()
        if name in ("missing", "freed"):
            for item, count in enumerate(want["num_missing"].tolist()):
                for lists in (left, right):
                    lists[item, : max(count, 0)] = lists[item, : max(count, 0)].sort().values
        assert torch.equal(torch.where(right == ANYTHING, ANYTHING, left), right), name


def small_case(device: torch.device, group: int = 1, chunks: int = 37) -> RecallCase:
    """One head, with a third of its chunks hot."""
    layout = LandmarkLayout("sketch", 16, 4)
    return recall_case(
        [chunks * PAGE + 5], [[[chunks // 3]]], [(0, 0)], layout, torch.float32, device, group=group
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "head_size", "dtype", "group"),
    [
        ("sketch", 64, torch.float32, 1),
        ("sketch", 80, torch.bfloat16, 7),
        ("sketch2", 80, torch.bfloat16, 7),
        ("mean", 80, torch.float16, 2),
        ("minmax", 128, torch.bfloat16, 16),
    ],
)
def test_selects_the_largest(
    backend: Backend,
    kind: LandmarkKind,
    head_size: int,
    dtype: torch.dtype,
    group: int,
    device: torch.device,
) -> None:
    case = ragged_case(kind, head_size, dtype, device, group=group)
    for layer in range(case.decode.num_layers):
        set_weights(case, layer)
        check(case, layer, backend)
    assert case.work.counters.sum(0).min() > 0
    # Each slot counts for itself.
    assert case.work.counters.any(1).sum() > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interval", [2, 3, 8])
def test_selects_at_intervals(backend: Backend, interval: int, device: torch.device) -> None:
    case = ragged_case("sketch", 64, torch.float16, device)
    set_weights(case, 0)
    check(case, 0, backend, interval)
    rows = case.work.num_missing[: len(case.row_slot) * 3].view(-1, 3).amax(dim=1)
    # Steps 0 and 2: the second one only selects at an interval of 2.
    assert rows[0] > 0
    assert (rows[2] > 0) == (interval == 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pin_first", "pin_recent"), [(1, 0), (0, 2), (2, 3), (9, 1), (1, 9), (40, 40), (0, 90)]
)
def test_pinned_chunks_come_first(
    backend: Backend, pin_first: int, pin_recent: int, device: torch.device
) -> None:
    case = ragged_case("sketch", 64, torch.bfloat16, device, group=2)
    set_weights(case, 0)
    check(case, 0, backend, 1, pin_first, pin_recent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pin_beats_all_the_weight(backend: Backend, device: torch.device) -> None:
    case = small_case(device, group=2)
    weights = torch.full((2, 37), -1000.0)
    # Both have all the weight of a member: nothing could weigh more.
    weights[0, 3] = weights[1, 8] = 0.0
    set_weights(case, 0, {0: weights})
    check(case, 0, backend, 1, 0, 12)
    assert not set(case.work.missing[0, : case.work.num_missing[0]].tolist()) & {3, 8}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("pins", [(0, 0), (2, 2)])
@pytest.mark.parametrize(
    "weights",
    [
        torch.zeros(37),
        torch.tensor([-0.0, 0.0] * 18 + [0.0]),
        torch.arange(37) % 3 - 1.0,
        torch.tensor([5.0] * 11 + [7.0] * 4 + [5.0] * 22),
        torch.tensor([math.nan] * 37),
        torch.tensor([-math.inf] * 37),
        torch.tensor([math.nan, -math.inf, math.nan, 2.0, math.inf] * 7 + [1.0, math.nan]),
        torch.tensor([-math.inf] * 30 + [0.0] * 7),
        torch.tensor([-1e38, 1e38, 5e37, -5e37, 0.0] * 7 + [1e-40, -1e-40]),
    ],
    ids=["zero", "signed zero", "three", "two", "nan", "-inf", "mixed", "mostly -inf", "huge"],
)
def test_equal_and_odd_weights(
    backend: Backend, group: int, pins: tuple[int, int], weights: Tensor, device: torch.device
) -> None:
    case = small_case(device, group)
    # The last member has a weight for nothing.
    members = [weights] + [weights.flip(0)] * (group == 3) + [torch.full((37,), -math.inf)] * (group == 3)
    set_weights(case, 0, {0: torch.stack(members)})
    check(case, 0, backend, 1, *pins)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_of_any_member_counts(backend: Backend, device: torch.device) -> None:
    """A member's constant does not let it outvote the others."""
    case = small_case(device, group=3)
    weights = torch.zeros(3, 37)
    weights[0] += 500.0
    weights[1, 20:26] = 9.0
    weights[2, 30:36] = 9.0
    set_weights(case, 0, {0: weights})
    want = set(range(20, 26)) | set(range(30, 36))
    before = set(case.resident[0, 0, 0])
    check(case, 0, backend)
    assert set(case.work.missing[0, : case.work.num_missing[0]].tolist()) == want - before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hot", [3, 700, 1900, 1999])
def test_equal_weights_all_over_a_long_prompt(backend: Backend, hot: int, device: torch.device) -> None:
    layout = LandmarkLayout("mean", 16, 2)
    case = recall_case([2001 * PAGE], [[[hot]]], [(0, 0)], layout, torch.float16, device)
    set_weights(case, 0, {0: torch.randint(0, 3, (1, 2001)).float()})
    check(case, 0, backend, 1, 1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pins", [(0, 0), (2, 20)])
@pytest.mark.parametrize("levels", [3, 1000])
def test_keys_that_registers_do_not_hold_are_read_again(
    levels: int,
    pins: tuple[int, int],
    backend: Backend,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts of one tile and of several, full or not, and a group looked at in parts.

    Of few levels, many chunks weigh the same.
    """
    monkeypatch.setattr(fused, "LARGEST_TILE", 16)
    monkeypatch.setattr(fused, "WEIGHTS", 32)
    monkeypatch.setattr(fused, "launch_options", fused.launch_options.__wrapped__)
    prompts = [1, 15, 16, 17, 32, 33, 63, 64, 65, 120]
    hot = [[[1 + chunks // 3]] for chunks in prompts]
    rows = [(slot, 0) for slot in range(len(prompts))]
    layout = LandmarkLayout("sketch", 16, 4)
    lengths = [chunks * PAGE for chunks in prompts]
    case = recall_case(lengths, hot, rows, layout, torch.float32, device, group=3)
    weights = torch.randint(0, levels, (len(prompts), 3, max(prompts))).float() / levels
    set_weights(case, 0, {row: weights[row, :, :chunks] for row, chunks in enumerate(prompts)})
    check(case, 0, backend, 1, *pins)


@pytest.mark.parametrize("group", [4, 12])
@pytest.mark.parametrize("prompts", [[1000], [5000, 1500, 900, 2500]])
def test_backends_agree(prompts: list[int], group: int, device: torch.device) -> None:
    layout = LandmarkLayout("sketch", 16, 2)
    lengths, hot = [chunks * PAGE for chunks in prompts], [[[chunks // 10, 1]] for chunks in prompts]
    rows = [(slot, 0) for slot in range(len(prompts))]
    case = recall_case(lengths, hot, rows, layout, torch.float16, device, group=group)
    set_weights(case, 0)
    before = {name: tensor.clone() for name, tensor in case.tensors().items()}
    select(case, 0, "torch", 1, 1, 4)
    want = {name: tensor.clone() for name, tensor in case.tensors().items()}
    for item, head in case.items(0):
        want["missing"][item, int(want["num_missing"][item]) : len(case.chunks[head])] = ANYTHING
    for name, tensor in case.tensors().items():
        tensor.copy_(before[name])
    select(case, 0, "triton", 1, 1, 4)
    assert_same(case, want)
    for row, chunks in enumerate(prompts):
        assert case.work.num_missing[2 * row] > chunks // 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_longest_prompt_whose_chunks_all_weigh_the_same(backend: Backend, device: torch.device) -> None:
    """Counts are as large as they can be: a few chunks more and 16 bits are full."""
    layout = LandmarkLayout("sketch", 16, 2)
    chunks = MAX_CHUNKS - 3  # The case's buffers are for three more.
    case = recall_case([chunks * PAGE], [[[5]]], [(0, 0)], layout, torch.float16, device, group=1)
    set_weights(case, 0, {0: torch.zeros(1, chunks)})
    check(case, 0, backend, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_past_two_billion_elements(backend: Backend, device: torch.device) -> None:
    """Memory that is never touched is never committed, so a pool this large costs nothing on a CPU."""
    layout = LandmarkLayout("sketch", 64, 2)
    # Two int32 of a page lie further than 2**31 apart, in bytes and in words.
    pages = 2 * (2**31 + 2**22) // (PAGE * 2 * 64)
    pool = torch.empty(pages, PAGE, 128, dtype=torch.bfloat16, device=device)
    last = pages - 3
    # One head: a page of landmarks, and then its two hot slots.
    decode = DecodeTables(
        index([1, 2 * PAGE], device).view(1, 1, 1, 2),
        index([last, last + 1, last + 2], device)[None],
        index([64], device),
        index([0], device)[None],
    )
    recall = RecallTables(index([0], device).view(1, 1, 1), index([0], device)[None], index([64], device))
    entries = pool[last].view(torch.int32).flatten()[layout.slot_offset // 4 :][:4]
    entries.copy_(index([-1, 1, 0, -1], device))
    work = RecallWork.create(1, 1, 1, None, 4, 1, device)
    work.log_weight[0, 0] = torch.tensor([3.0, 0.0, 2.0, 1.0])
    row_slot, row_len = index([0], device), index([65], device)
    chunk_select(pool, row_slot, row_len, decode, recall, 0, layout, work, backend=backend)
    assert entries.tolist() == [-1, -1, 0, -1]
    assert (work.num_missing.tolist(), work.counters.tolist()) == ([1], [[1, 1]])
    assert (int(work.missing[0, 0]), int(work.freed[0, 0])) == (0, 1)


def test_no_rows_are_nothing(device: torch.device) -> None:
    case = small_case(device)
    case.row_slot, case.row_len = case.row_slot[:0], case.row_len[:0]
    before = {name: tensor.clone() for name, tensor in case.tensors().items()}
    select(case, 0, "triton")
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.tensors().items())


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    case = ragged_case("sketch", 64, torch.float32, device)
    with pytest.raises(ValueError, match="interval"):
        select(case, 0, "torch", 0)
    with pytest.raises(ValueError, match="pin_first"):
        select(case, 0, "torch", 1, -1)
    with pytest.raises(ValueError, match="pin_first"):
        select(case, 0, "torch", 1, 0, -1)
    with pytest.raises(ValueError, match="layer 2"):
        select(case, 2, "torch")
    good = case.row_len
    case.row_len = good[1:]
    with pytest.raises(ValueError, match="row_len"):
        select(case, 0, "torch")
    case.row_len = good
    layout = case.layout
    case.layout = LandmarkLayout("sketch", 64, 2)
    with pytest.raises(ValueError, match="elements of 2 bytes"):
        select(case, 0, "torch")
    case.layout = LandmarkLayout("sketch", 128, 4)
    with pytest.raises(ValueError, match="pool"):
        select(case, 0, "torch")
    case.layout = layout
    chunk_first = case.recall.chunk_first
    case.recall = replace(case.recall, chunk_first=chunk_first[:, :1].contiguous())
    with pytest.raises(ValueError, match="chunk_first"):
        select(case, 0, "torch")
    case.recall = RecallTables(chunk_first, case.recall.store_blocks, case.recall.prompt_len)
    case.work = RecallWork.create(5, 3, 3, None, 70, len(case.prompt_lens), device)
    with pytest.raises(ValueError, match="more than the buffers"):
        select(case, 0, "torch")
    case.work = RecallWork.create(50, 3, 3, None, 70, 1, device)
    with pytest.raises(ValueError, match="request slots are more than the buffers' 1"):
        select(case, 0, "torch")
    with pytest.raises(ValueError, match="65536 chunks are more than 65535"):
        RecallWork.create(1, 1, 1, None, MAX_CHUNKS + 1, 1, device)
    case.row_slot = case.row_slot.long()
    with pytest.raises(ValueError, match="row_slot"):
        select(case, 0, "torch")
