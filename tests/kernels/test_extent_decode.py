"""Decode over extents and tails against attention written out, with NaN wherever nobody may look."""

import math

import pytest
import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.cache_write import cache_write
from hybridkv_kernels.extent_decode import DecodePlan, DecodeTables, extent_decode
from hybridkv_kernels.extent_decode import plan as planning
from hybridkv_kernels.extent_decode import triton as fused
from kernel_cases import DecodeCase, assert_close, decode_case, ragged_case
from torch import Tensor


def make_plan(case: DecodeCase, target_programs: int = 16, min_pages: int = 8) -> DecodePlan:
    """A plan with room to spare, updated for the case."""
    rows, num_q_heads, head_size = case.query.shape
    plan = DecodePlan.create(
        rows + 3,
        case.layers,
        case.heads,
        num_q_heads,
        head_size,
        case.query.device,
        target_programs=target_programs,
        min_pages=min_pages,
    )
    plan.partial_out.fill_(math.nan)
    plan.partial_lse.fill_(math.nan)
    plan.update(case.row_slot, case.row_len, case.tables)
    return plan


def decode(case: DecodeCase, layer: int, backend: Backend, plan: DecodePlan | None) -> Tensor:
    """One layer's output, written over NaN."""
    out = case.nan_out()
    extent_decode(
        case.query,
        case.pool,
        out,
        case.row_slot,
        case.row_len,
        case.tables,
        layer,
        case.scale,
        plan,
        backend,
    )
    return out


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("group", "head_size"), [(1, 64), (2, 80), (7, 128), (8, 64), (16, 96)])
def test_matches_dense_attention(backend: Backend, group: int, head_size: int, device: torch.device) -> None:
    case = ragged_case(group, head_size, torch.float32, device)
    plan = make_plan(case) if backend == "triton" else None
    for layer in range(case.layers):
        assert_close(decode(case, layer, backend, plan), case.dense(layer), torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "head_size"), [(7, 128), (2, 80)])
def test_matches_dense_attention_in_16_bit(
    backend: Backend, dtype: torch.dtype, group: int, head_size: int, device: torch.device
) -> None:
    case = ragged_case(group, head_size, dtype, device)
    plan = make_plan(case) if backend == "triton" else None
    assert_close(decode(case, 1, backend, plan), case.dense(1), dtype)


@pytest.mark.parametrize("head_size", [256])
def test_largest_head(head_size: int, device: torch.device) -> None:
    case = decode_case([[[40, 3]]], [64], [(0, 85)], 4, head_size, torch.bfloat16, device)
    expected = case.dense(0)
    assert_close(decode(case, 0, "torch", None), expected, torch.bfloat16)
    assert_close(decode(case, 0, "triton", make_plan(case)), expected, torch.bfloat16)


@pytest.mark.parametrize(("target_programs", "min_pages"), [(1, 1), (3, 8), (64, 1), (500, 1)])
def test_any_split_gives_the_same(target_programs: int, min_pages: int, device: torch.device) -> None:
    case = ragged_case(2, 64, torch.float32, device)
    plan = make_plan(case, target_programs, min_pages)
    assert_close(decode(case, 0, "triton", plan), case.dense(0), torch.float32)


def test_a_split_may_end_within_a_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ragged_case(2, 64, torch.float16, device)
    whole_tiles = make_plan(case, target_programs=60, min_pages=3)
    for module in (planning, fused):
        monkeypatch.setattr(module, "SPLIT_GRANULE", 1)
    monkeypatch.setattr(fused, "launch_options", fused.launch_options.__wrapped__)
    plan = make_plan(case, target_programs=60, min_pages=3)
    items = len(case.row_slot) * case.tables.num_kv_heads
    assert plan.splits.offsets[0, items] > whole_tiles.splits.offsets[0, items]
    assert_close(decode(case, 0, "triton", plan), case.dense(0), torch.float16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_and_blind_rows_are_zero(backend: Backend, device: torch.device) -> None:
    # Slot 0 sees nothing of its tail, and one of its heads has no extent either.
    case = decode_case([[[0, 20]]], [32], [(0, 30), (-1, 7), (-1, -5)], 2, 64, torch.float32, device)
    plan = make_plan(case) if backend == "triton" else None
    out = decode(case, 0, backend, plan)
    assert torch.equal(out[0, :2], torch.zeros_like(out[0, :2]))
    assert out[0, 2:].abs().sum() > 0
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))


def test_a_plan_is_updated_in_place_for_another_step(device: torch.device) -> None:
    case = ragged_case(2, 64, torch.float32, device)
    plan = make_plan(case)
    pointers = [tensor.data_ptr() for tensor in (plan.splits.offsets, plan.splits.work)]
    case.row_slot[0], case.row_len[0] = 3, 48
    case.row_slot, case.row_len, case.query = case.row_slot[:5], case.row_len[:5], case.query[:5]
    plan.update(case.row_slot, case.row_len, case.tables)
    assert pointers == [tensor.data_ptr() for tensor in (plan.splits.offsets, plan.splits.work)]
    assert_close(decode(case, 1, "triton", plan), case.dense(1), torch.float32)


def test_an_early_launch_sees_what_the_one_before_writes(device: torch.device) -> None:
    """As in a model: each layer writes its last tokens, then attends; on a GPU as a graph, time and again."""
    case = ragged_case(7, 128, torch.bfloat16, device)
    plan, pages = make_plan(case), case.pool.view(-1, case.layers, case.heads, PAGE, 256)
    row_slot, last = case.row_slot.long(), case.row_len.long() - 1
    writes = (row_slot >= 0) & (last >= case.tables.tail_start[row_slot])
    block = case.tables.blocks[row_slot, last.clamp(min=0) // PAGE].long()
    token = torch.where(writes, block * PAGE + last % PAGE, -1)
    kv = [pages[block, layer, :, last % PAGE] for layer in range(case.layers)]
    expected = [case.dense(layer) for layer in range(case.layers)]
    out = [case.nan_out() for _ in range(case.layers)]

    def spoil() -> None:
        for layer in range(case.layers):
            out[layer].fill_(math.nan)
            pages[block[writes], layer, :, last[writes] % PAGE] = math.nan

    def forward() -> None:
        for layer in range(case.layers):
            key, value = kv[layer].chunk(2, dim=-1)
            cache_write(key, value, case.pool, token, layer, case.layers, "triton")
            inputs = (case.query, case.pool, out[layer], case.row_slot, case.row_len, case.tables)
            extent_decode(*inputs, layer, case.scale, plan, "triton", early=True)

    spoil()
    forward()
    replay, times = forward, 1
    if device.type == "cuda":
        graph, times = torch.cuda.CUDAGraph(), 50
        with torch.cuda.graph(graph):
            forward()
        replay = graph.replay
    for _ in range(times):
        spoil()
        replay()
        for layer in range(case.layers):
            assert_close(out[layer], expected[layer], torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pages_past_two_billion_elements(backend: Backend, device: torch.device) -> None:
    """Memory that is never touched is never committed, so a pool this large costs nothing on a CPU."""
    head_size, heads = 64, 2
    pages = (2**31 + 2**22) // (PAGE * 2 * head_size)
    pool = torch.empty(pages, PAGE, 2 * head_size, dtype=torch.bfloat16, device=device)
    last = pages // heads - 1
    assert (last - 1) * heads * PAGE * 2 * head_size > 2**31
    kv = torch.randn(2 * heads, PAGE, 2 * head_size, device=device).to(pool.dtype)
    pool[(last - 1) * heads : (last + 1) * heads] = kv

    def index(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    # A head's extent is one page of block `last`, and its tail is in the block before.
    tables = DecodeTables(
        index(0, 16, 1, 16).view(1, 1, 2, 2), index(last)[None], index(0), index(last - 1)[None]
    )
    query = torch.randn(1, heads, head_size, device=device).to(pool.dtype)
    out = torch.empty_like(query)
    plan = DecodePlan.create(1, 1, heads, heads, head_size, device, target_programs=1)
    row_slot, row_len = index(0), index(16)
    plan.update(row_slot, row_len, tables)
    extent_decode(query, pool, out, row_slot, row_len, tables, 0, 1.0, plan, backend)
    for head in range(heads):
        k, v = torch.cat((kv[heads + head], kv[head])).double().chunk(2, dim=-1)
        expected = (k @ query[0, head].double()).softmax(dim=0) @ v
        assert_close(out[0, head], expected, pool.dtype)


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    case = decode_case([[[5, 5]]], [16], [(0, 20)], 2, 64, torch.float32, device)
    plan = make_plan(case)
    with pytest.raises(ValueError, match="needs a plan"):
        decode(case, 0, "triton", None)
    with pytest.raises(ValueError, match="layer"):
        decode(case, 1, "torch", None)
    plan.splits.num_rows = 4
    with pytest.raises(ValueError, match="updated for 4 rows"):
        decode(case, 0, "triton", plan)
    other = DecodePlan.create(4, 1, 2, 2, 64, device)
    other.update(case.row_slot, case.row_len, case.tables)
    with pytest.raises(ValueError, match="group and head size"):
        decode(case, 0, "triton", other)
    case.row_len = case.row_len.long()
    with pytest.raises(ValueError, match="row_len"):
        decode(case, 0, "torch", None)


def test_a_plan_refuses_what_does_not_fit(device: torch.device) -> None:
    case = decode_case([[[5, 5]]], [16], [(0, 20), (0, 18)], 1, 64, torch.float32, device)
    with pytest.raises(ValueError, match="positive"):
        DecodePlan.create(0, 1, 2, 2, 64, device)
    with pytest.raises(ValueError, match="divide"):
        DecodePlan.create(1, 1, 2, 3, 64, device)
    with pytest.raises(ValueError, match="more than"):
        DecodePlan.create(1, 1, 2, 2, 64, device).update(case.row_slot, case.row_len, case.tables)
    with pytest.raises(ValueError, match="layers and KV heads"):
        DecodePlan.create(2, 2, 2, 2, 64, device).update(case.row_slot, case.row_len, case.tables)
