"""A work list covers every page of its heads exactly once, within its bounds."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from hybridkv_kernels import PAGE
from hybridkv_kernels.extent_decode import DecodeTables
from hybridkv_kernels.extent_decode.work_list import Part, WorkList
from hybridkv_kernels.recall.tables import RecallTables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAYERS, HEADS, SLOTS, PLACES = 2, 3, 3, 14

lengths = st.lists(st.integers(0, 40_000), min_size=SLOTS * LAYERS * HEADS, max_size=SLOTS * LAYERS * HEADS)
starts = st.lists(st.integers(0, 200), min_size=SLOTS, max_size=SLOTS)
recalling = st.lists(st.booleans(), min_size=SLOTS * LAYERS * HEADS, max_size=SLOTS * LAYERS * HEADS)
rows = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 5000)), min_size=1, max_size=6)


def lie(
    extents: list[int], starts: list[int], recalling: list[bool], device: torch.device
) -> tuple[DecodeTables, RecallTables]:
    """Tables of requests whose prompts end where their tails start."""
    both = torch.zeros(SLOTS, LAYERS, HEADS, 2, dtype=torch.int32)
    both[..., 1] = torch.tensor(extents).view(SLOTS, LAYERS, HEADS)
    tail_start = torch.tensor(starts, dtype=torch.int32) * PAGE
    nothing = torch.zeros(SLOTS, 1, dtype=torch.int32)
    recalls = torch.tensor(recalling).view(SLOTS, LAYERS, HEADS)
    decode = DecodeTables(*(t.to(device) for t in (both, nothing, tail_start, nothing)))
    recall = RecallTables(*(t.to(device) for t in (torch.where(recalls, 5, -1).int(), nothing, tail_start)))
    return decode, recall


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lengths,
    starts,
    rows,
    recalling,
    st.sampled_from(get_args(Part)),
    st.integers(1, 300),
    st.integers(1, 20),
    st.sampled_from([1, 4]),
    st.integers(1, 4),
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
    granule: int,
    interval: int,
) -> None:
    decode, recall = lie(lengths, starts, recalling, device)
    row_slot, row_len = torch.tensor(rows, dtype=torch.int32).T.contiguous().to(device)
    listed = WorkList.create(8, LAYERS, HEADS, device, target, min_pages, granule, part, PLACES)
    listed.work.fill_(-7)
    listed.offsets.fill_(-7)
    listed.update(row_slot, row_len, decode, recall, interval)

    def pages_of(layer: int, slot: int, length: int, head: int) -> int | None:
        """Pages of a head in this list; None of a head that it is not for."""
        index = (slot * LAYERS + layer) * HEADS + head
        recalls = slot >= 0 and recalling[index]
        if part == "selecting":
            selects = recalls and starts[slot] > 0 and (length - 1 - starts[slot] * PAGE) % interval == 0
            return -(-starts[slot] // PLACES) if selects else None
        if part != "all" and recalls != (part == "recalling"):
            return None
        tail = max(length - starts[slot] * PAGE, 0)
        return -(-lengths[index] // PAGE) - (-tail // PAGE) if slot >= 0 else 0

    items = len(rows) * HEADS
    for layer in range(LAYERS):
        found = [pages_of(layer, slot, length, head) for slot, length in rows for head in range(HEADS)]
        pages = [count or 0 for count in found]
        most = -(-max(min_pages, -(-sum(pages) // target)) // granule) * granule

        offsets = listed.offsets[layer, : items + 1].tolist()
        total = offsets[-1]
        assert offsets[0] == 0
        assert total <= listed.programs(len(rows)) <= listed.work.shape[1]
        assert listed.work[layer, total:].eq(-7).all()

        covered: list[list[int]] = [[] for _ in range(items)]
        for program, item in enumerate(listed.work[layer, :total].tolist()):
            assert offsets[item] <= program < offsets[item + 1]
            # As the kernels do.
            share = -(-pages[item] // (offsets[item + 1] - offsets[item]) // granule) * granule
            begin = (program - offsets[item]) * share
            run = range(begin, min(begin + share, pages[item]))
            assert len(run) <= most
            assert len(run) or not pages[item]
            covered[item].extend(run)
        assert covered == [list(range(count)) for count in pages]
        # Whoever sees nothing still has somebody to write its zeros, and no one else has idle splits.
        splits = [0 if count is None else max(-(-count // most), 1) for count in found]
        assert [end - begin for begin, end in pairwise(offsets)] == splits


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    decode, recall = lie([0] * 18, [1] * 3, [True] * 18, device)
    row_slot, row_len = torch.tensor([[0, 1], [17, 17]], dtype=torch.int32, device=device)
    listed = WorkList.create(1, LAYERS, HEADS, device, 1, 1, part="selecting", places=PLACES)
    with pytest.raises(ValueError, match="2 rows are more than the plan's 1"):
        listed.update(row_slot, row_len, decode, recall)
    with pytest.raises(ValueError, match="plan of selecting heads needs the recall tables"):
        listed.update(row_slot[:1], row_len[:1], decode)
    with pytest.raises(ValueError, match="interval must be at least 1, not 0"):
        listed.update(row_slot[:1], row_len[:1], decode, recall, 0)
    with pytest.raises(ValueError, match=r"for \(1, 3\) layers"):
        WorkList.create(1, 1, HEADS, device, 1, 1).update(row_slot[:1], row_len[:1], decode)
    with pytest.raises(ValueError, match="every size of a work list must be positive"):
        WorkList.create(1, LAYERS, HEADS, device, 1, 0)
