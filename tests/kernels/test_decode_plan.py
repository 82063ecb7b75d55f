"""The plan's work list covers every page of every head exactly once, within its bounds."""

from itertools import pairwise
from typing import get_args

import torch
from hybridkv_kernels import PAGE
from hybridkv_kernels.extent_decode import DecodePlan, DecodeTables
from hybridkv_kernels.extent_decode.plan import SPLIT_GRANULE, Part
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAYERS, HEADS, SLOTS = 2, 3, 3

lengths = st.lists(st.integers(0, 40_000), min_size=SLOTS * LAYERS * HEADS, max_size=SLOTS * LAYERS * HEADS)
starts = st.lists(st.integers(0, 200), min_size=SLOTS, max_size=SLOTS)
recalling = st.lists(st.booleans(), min_size=SLOTS * LAYERS * HEADS, max_size=SLOTS * LAYERS * HEADS)
rows = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 5000)), min_size=1, max_size=6)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lengths, starts, rows, recalling, st.sampled_from(get_args(Part)), st.integers(1, 300), st.integers(1, 20)
)
def test_covers_every_page_once(
    device: torch.device,
    lengths: list[int],
    starts: list[int],
    rows: list[tuple[int, int]],
    recalling: list[bool],
    part: Part,
    target: int,
    min_pages: int,
) -> None:
    extents = torch.zeros(SLOTS, LAYERS, HEADS, 2, dtype=torch.int32)
    extents[..., 1] = torch.tensor(lengths).view(SLOTS, LAYERS, HEADS)
    tail_start = torch.tensor(starts, dtype=torch.int32) * PAGE
    nothing = torch.zeros(SLOTS, 1, dtype=torch.int32)
    tables = DecodeTables(*(t.to(device) for t in (extents, nothing, tail_start, nothing)))
    row_slot, row_len = torch.tensor(rows, dtype=torch.int32).T.contiguous().to(device)
    recalls = torch.tensor(recalling).view(SLOTS, LAYERS, HEADS)
    chunk_first = torch.where(recalls, 5, -1).int().to(device)
    plan = DecodePlan.create(8, LAYERS, HEADS, HEADS, 64, device, target, min_pages, part)
    plan.work.fill_(-7)
    plan.offsets.fill_(-7)
    plan.update(row_slot, row_len, tables, chunk_first)

    items = len(rows) * HEADS
    for layer in range(LAYERS):
        pages, planned = [], []
        for slot, length in rows:
            tail = max(length - starts[slot] * PAGE, 0)
            for head in range(HEADS):
                extent = int(extents[slot, layer, head, 1])
                ours = part == "all" or (slot >= 0 and bool(recalls[slot, layer, head])) == (
                    part == "recalling"
                )
                planned.append(ours)
                pages.append(-(-extent // PAGE) - (-tail // PAGE) if slot >= 0 and ours else 0)
        most = -(-max(min_pages, -(-sum(pages) // target)) // SPLIT_GRANULE) * SPLIT_GRANULE

        offsets = plan.offsets[layer, : items + 1].tolist()
        total = offsets[-1]
        assert offsets[0] == 0
        assert total <= plan.programs(len(rows)) <= plan.partial_out.shape[0]
        assert plan.work[layer, total:].eq(-7).all()

        covered: list[list[int]] = [[] for _ in range(items)]
        for program, item in enumerate(plan.work[layer, :total].tolist()):
            assert offsets[item] <= program < offsets[item + 1]
            # As the decode kernel does.
            share = -(-pages[item] // (offsets[item + 1] - offsets[item]) // SPLIT_GRANULE) * SPLIT_GRANULE
            begin = (program - offsets[item]) * share
            run = range(begin, min(begin + share, pages[item]))
            assert len(run) <= most
            assert len(run) or not pages[item]
            covered[item].extend(run)
        assert covered == [list(range(count)) for count in pages]
        # Whoever sees nothing still has somebody to write its zeros, and no one else has idle splits.
        splits = [max(-(-count // most), 1) * ours for count, ours in zip(pages, planned, strict=True)]
        assert [end - begin for begin, end in pairwise(offsets)] == splits
