"""Torch's dense attention for prompt rows, against the definition, in eager and in compiled models."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from hybridkv_vllm.attention import dense
from hybridkv_vllm.attention.dense import TorchDenseImpl, TorchRow, dense_backend, slice_rows

HEAD_SIZE, KV_HEADS, GROUP, BLOCKS = 16, 2, 3, 9


def attend(query: torch.Tensor, pages: torch.Tensor, scale: float) -> torch.Tensor:
    """Each of the last `len(query)` tokens attends to itself and all before it, `[Q, Hq, D]`."""
    keys, values = pages.double().repeat_interleave(GROUP, dim=0).split(HEAD_SIZE, dim=-1)
    logits = torch.einsum("qhd,htd->hqt", query.double(), keys) * scale
    position = torch.arange(keys.shape[1])
    own = position[keys.shape[1] - len(query) :]
    logits.masked_fill_(position[None, :] > own[:, None], -torch.inf)
    return torch.einsum("hqt,htd->qhd", logits.softmax(-1), values)


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(nullcontext, id="eager"),
        # Around a graph that vLLM had compiled, where weights are tensors of a subclass.
        pytest.param(torch._C.DisableTorchFunctionSubclass, id="compiled"),
    ],
)
def test_prompts_whole_in_chunks_and_of_one_token(context: type[AbstractContextManager[None]]) -> None:
    rows = [(33, 33), (1, 20), (7, 41), (1, 1)]
    cache = torch.randn(BLOCKS, KV_HEADS, 16, 2 * HEAD_SIZE)
    query = torch.randn(sum(count for count, _ in rows), KV_HEADS * GROUP, HEAD_SIZE)
    metadata, want, first = [], [], 0
    for count, tokens in rows:
        blocks = torch.randperm(BLOCKS)[: -(-tokens // 16)].int()
        queries = slice(first, first + count)
        metadata.append(TorchRow(queries, tokens, blocks))
        pages = cache[blocks.long()].transpose(0, 1).flatten(1, 2)[:, :tokens]
        want.append(attend(query[queries], pages, 0.3))
        first += count
    out = torch.full_like(query, torch.nan)
    impl = TorchDenseImpl(HEAD_SIZE, 0.3)
    with context():
        impl.forward(None, query, query, query, cache, metadata, out)
    torch.testing.assert_close(out.double(), torch.cat(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "version", "head_size", "backend"),
    [
        ((9, 0), 3, 256, FlashAttentionBackend),
        ((10, 0), 4, 128, FlashAttentionBackend),
        # Its kernel would take our pages of 16 tokens for pages of 128.
        ((10, 0), 4, 256, TritonAttentionBackend),
    ],
)
def test_flash_attention_serves_where_it_reads_our_pages(
    capability: tuple[int, int], version: int, head_size: int, backend: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM says of other cards than this machine's; its kernels are not in the CPU build."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cuda", lambda _: True)
    monkeypatch.setattr(platform, "get_device_capability", lambda *_, **__: DeviceCapability(*capability))
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: version)
    monkeypatch.setattr(dense, "is_flash_attn_varlen_func_available", lambda: True)
    assert dense_backend("triton", torch.bfloat16, head_size) is backend


def test_a_run_of_rows_has_its_own_limits() -> None:
    """Those of the second and third row, whose tokens are 1 to 23 of the step's."""
    starts = torch.tensor([0, 1, 4, 24, 30], dtype=torch.int32)
    seq_lens = torch.tensor([90, 33, 20, 70], dtype=torch.int32)
    step = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=4,
        num_actual_tokens=30,
        max_query_len=20,
        max_seq_len=90,
        block_table_tensor=torch.arange(4)[:, None],
        slot_mapping=torch.arange(30),
        req_idx=None,
    )
    rows = slice_rows(step, slice(1, 3))
    assert (rows.max_query_len, rows.max_seq_len, rows.num_reqs, rows.num_actual_tokens) == (20, 33, 2, 23)
    assert rows.query_start_loc.tolist() == rows.query_start_loc_cpu.tolist() == [0, 3, 23]
    assert rows.seq_lens.tolist() == [33, 20]
    assert rows.slot_mapping.tolist() == list(range(1, 24))
    assert rows.block_table_tensor.flatten().tolist() == [1, 2]
