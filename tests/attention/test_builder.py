"""How a step's rows are sorted: decodes, dense runs, replays and prompts that end."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from hybridkv_kernels.extent_decode import DecodeTables
from vllm.v1.attention.backend import CommonAttentionMetadata

from hybridkv_vllm.attention.builder import REPLAY_ROWS, HybridKVMetadata, HybridKVMetadataBuilder
from hybridkv_vllm.attention.impl import HybridKVImpl
from hybridkv_vllm.config import ServerOptions
from hybridkv_vllm.plan import ArenaGrant, make_plan
from hybridkv_vllm.worker.tables import CacheShape, RequestTables

SLOTS, WIDTH = 8, 64


class Recorder:
    """Stands where vLLM's dense builder stands, and notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int], bool]] = []

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> int:
        common = common_attn_metadata
        lengths = (common.query_start_loc[1:] - common.query_start_loc[:-1]).tolist()
        self.asked.append((lengths, common.seq_lens.tolist(), fast_build))
        return len(self.asked)


def build(
    rows: list[tuple[int, int, int]], planned: dict[int, int], *, live: bool = True
) -> tuple[HybridKVMetadata, Recorder]:
    """Builds for rows of (slot, computed, query length); `planned` maps slots to prompt lengths."""
    shape = CacheShape(num_layers=1, num_kv_heads=1, num_query_heads=1, head_size=16)
    tables = RequestTables(
        shape=shape,
        pool=torch.zeros(1, 16, 32),
        decode=DecodeTables(
            extents=torch.zeros(SLOTS, 1, 1, 2, dtype=torch.int32),
            arena=torch.zeros(SLOTS, WIDTH, dtype=torch.int32),
            tail_start=torch.zeros(SLOTS, dtype=torch.int32),
            blocks=torch.zeros(SLOTS, WIDTH, dtype=torch.int32),
        ),
        row_slot=torch.full((SLOTS,), -1, dtype=torch.int32),
        plan=None,
        grants={
            slot: ArenaGrant(str(slot), make_plan(tokens, (), 0.25, 64), ())
            for slot, tokens in planned.items()
        },
    )
    slots = torch.tensor([slot for slot, _, _ in rows])
    tables.begin_step(slots if live else None, len(rows))
    builder = object.__new__(HybridKVMetadataBuilder)
    builder.device = torch.device("cpu")
    impl = SimpleNamespace(tables=tables, options=ServerOptions(), kernel_backend="torch")
    builder._impl = cast(HybridKVImpl, impl)
    builder._dense = recorder = Recorder()
    starts = torch.tensor([0, *np.cumsum([length for _, _, length in rows])], dtype=torch.int32)
    seq_lens = torch.tensor([computed + length for _, computed, length in rows], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(length for _, _, length in rows),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.zeros(len(rows), WIDTH, dtype=torch.int32),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        req_idx=slots.numpy(),
    )
    return builder.build(0, common), recorder


def test_decodes_lead_and_prompts_share_one_dense_call() -> None:
    metadata, dense = build([(0, 300, 1), (1, 50, 1), (2, 0, 20), (3, 64, 100)], planned={0: 200, 3: 164})
    (decode,) = metadata.decodes
    assert decode.tokens == slice(0, 2)
    assert decode.row_slot.tolist() == [0, 1]
    assert decode.row_len.tolist() == [301, 51]
    assert dense.asked == [([20, 100], [20, 164], False)]
    assert metadata.dense[0].tokens == slice(2, 122)
    (end,) = metadata.prefill_ends
    assert end.plan.num_tokens == 164


def test_a_replay_splits_the_dense_rows_and_no_run_keeps_a_schedule() -> None:
    """FlashAttention 3 holds one schedule a builder: two runs must not both rely on it."""
    metadata, dense = build([(0, 9, 1), (1, 0, 50), (2, 400, 200), (3, 0, 2000)], planned={2: 400})
    assert dense.asked == [([50], [50], True), ([2000], [2000], True)]
    assert [rows.tokens for rows in metadata.dense] == [slice(1, 51), slice(251, 2251)]
    assert [rows.tokens for rows in metadata.decodes] == [slice(0, 1), slice(51, 251)]
    replay = metadata.decodes[1]
    assert set(replay.row_slot.tolist()) == {2}
    assert replay.row_len.tolist() == list(range(401, 601))
    assert not metadata.prefill_ends


def test_a_long_replay_goes_on_where_its_first_part_ends() -> None:
    tokens = 2 * REPLAY_ROWS + 276
    metadata, _ = build([(2, 400, tokens)], planned={2: 400})
    starts = (0, REPLAY_ROWS, 2 * REPLAY_ROWS, tokens)
    assert [rows.tokens for rows in metadata.decodes] == [slice(*part) for part in pairwise(starts)]
    row_len = torch.cat([rows.row_len for rows in metadata.decodes])
    assert row_len.tolist() == list(range(401, 401 + tokens))


def test_a_dummy_step_takes_no_slot_for_real() -> None:
    """Its row numbers are those of real requests, whose prompts must not be touched."""
    rows = [(0, 300, 1), (1, 100, 64)]
    metadata, _ = build(rows, planned={0: 200, 1: 164})
    assert metadata.prefill_ends
    dummy, _ = build(rows, planned={0: 200, 1: 164}, live=False)
    assert not dummy.prefill_ends
    assert dummy.decodes[0].row_slot.tolist() == [-1]
