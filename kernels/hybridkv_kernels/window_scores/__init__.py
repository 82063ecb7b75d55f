"""Score a prompt's keys by the attention of its observation window."""

import torch
from torch import Tensor

from ..pages import PAGE, Backend, check_index, check_pool, group_size, require, use_triton
from . import naive
from . import triton as fused

__all__ = ["MAX_WINDOW", "VOTE_SHARE", "window_scores"]

VOTE_SHARE = naive.VOTE_SHARE
MAX_WINDOW = 256


def window_scores(
    query: Tensor,
    pool: Tensor,
    blocks: Tensor,
    num_tokens: int,
    layer: int,
    num_layers: int,
    scale: float,
    mass: Tensor,
    votes: Tensor,
    backend: Backend = "auto",
) -> None:
    """Attention that the last W queries of a prompt of T tokens pay to each of its keys, for one layer.

    Query i stands at position `T-W+i` and sees the keys up to there. The result does not depend on the order
    in which programs run: it is the same bits every time.

    Args:
        query: [W, Hq, D], the pool's dtype, 1 <= W <= min(T, 256); any strides in the first two dims.
        pool: [num_blocks*num_layers*H, 16, 2*D], contiguous; bf16, fp16 or fp32.
        blocks: [ceil(T/16)] int32, the prompt's block ids.
        num_tokens: T.
        layer: index of the layer, 0..num_layers-1.
        num_layers: layers in a block.
        scale: factor on query . key, 1/sqrt(D) as a rule.
        mass: [H, T] fp32, written: mean over the window and the query group of a key's softmax probability.
        votes: [H, T] fp32, written: number of (query, group member) pairs whose probability for the key is at
            least 0.01 of that pair's largest. Keys that a query does not see get no vote from it.
        backend: `auto` is Triton on CUDA tensors, torch elsewhere.

    Raises:
        ValueError: for a shape, dtype, stride, window, layer or backend that does not fit.
    """
    require(query.dim() == 3, "query must be [W, Hq, D]")
    window, num_q_heads, head_size = query.shape
    check_pool(pool, head_size, query)
    require(mass.dim() == 2, "mass must be [H, T]")
    group_size(num_q_heads, mass.shape[0])
    require(
        1 <= window <= min(num_tokens, MAX_WINDOW),
        f"a window of {window} queries is not within 1..{min(num_tokens, MAX_WINDOW)}",
    )
    check_index("blocks", blocks, torch.int32, -(-num_tokens // PAGE))
    for name, result in (("mass", mass), ("votes", votes)):
        require(result.shape == (mass.shape[0], num_tokens), f"{name} must be [H, {num_tokens}]")
        require(result.dtype == torch.float32, f"{name} must be fp32, not {result.dtype}")
        require(result.stride(1) == 1, f"{name} must be contiguous in its last dimension")
    require(0 <= layer < num_layers, f"layer {layer} is not within 0..{num_layers - 1}")
    score = fused.window_scores if use_triton(backend, pool) else naive.window_scores
    score(query, pool, blocks, num_tokens, layer, num_layers, scale, mass, votes)
