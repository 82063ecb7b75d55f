"""The observation window's attention in plain torch: the reference, and the CPU path."""

import math

import torch
from torch import Tensor

VOTE_SHARE = 0.01
"""A key gets a pair's vote from this share of the pair's largest probability on."""


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
) -> None:
    """See `hybridkv_kernels.window_scores.window_scores`."""
    window, _, head_size = query.shape
    num_kv_heads = mass.shape[0]
    first_page = (blocks.long() * num_layers + layer) * num_kv_heads
    position = torch.arange(num_tokens - window, num_tokens, device=pool.device)
    unseen = torch.arange(num_tokens, device=pool.device) > position[:, None]
    grouped = query.reshape(window, num_kv_heads, -1, head_size).transpose(0, 1).float()
    # A head at a time: the scores of one head are the largest thing here.
    for head in range(num_kv_heads):
        keys = pool[first_page + head, :, :head_size].flatten(0, 1)[:num_tokens].float()
        scores = (grouped[head] @ keys.T * scale).masked_fill_(unseen[:, None], -math.inf)
        best = scores.amax(dim=-1, keepdim=True)
        votes[head] = (scores >= best + math.log(VOTE_SHARE)).sum(dim=(0, 1))
        mass[head] = scores.softmax(dim=-1).mean(dim=(0, 1))
