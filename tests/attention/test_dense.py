"""Torch's dense attention for prompt rows, against the definition, in eager and in compiled models."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from hybridkv_vllm.attention.dense import TorchDenseImpl, TorchRow

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
