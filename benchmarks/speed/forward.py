"""One decoder layer's forward over a whole prompt: what the end of a prefill is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speed.layer import DTYPE, HEAD_SIZE, KV_HEADS, QUERY_HEADS, SCALE, Case
from speed.prepared import Prepared

# Qwen2.5-VL-7B's; smaller where only the harness is checked.
HIDDEN, FEED_FORWARD = 3584, 18944
HIDDEN_ON_CPU, FEED_FORWARD_ON_CPU = 256, 512


@dataclass(frozen=True)
class Forward:
    """A layer's weights, `[in, out]`, and the hidden states `[prompt, hidden]` that go in."""

    case: Case
    hidden: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor

    def copy(self) -> Forward:
        """Nothing here is written."""
        return self


def make_forward(case: Case, device: torch.device, seed: int) -> Forward:
    """Random weights, scaled so that a layer's output is about as large as its input."""
    torch.manual_seed(seed)
    on_gpu = device.type == "cuda"
    hidden, feed_forward = (HIDDEN, FEED_FORWARD) if on_gpu else (HIDDEN_ON_CPU, FEED_FORWARD_ON_CPU)

    def weight(into: int, out: int) -> Tensor:
        return torch.randn(into, out, dtype=DTYPE, device=device).mul_(into**-0.5)

    return Forward(
        case,
        torch.randn(case.prompt, hidden, dtype=DTYPE, device=device),
        weight(hidden, (QUERY_HEADS + 2 * KV_HEADS) * HEAD_SIZE),
        weight(QUERY_HEADS * HEAD_SIZE, hidden),
        weight(hidden, 2 * feed_forward),
        weight(feed_forward, hidden),
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    """`[T, heads, HEAD_SIZE]` each."""
    if backend == "fa3":
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        tokens = query.shape[0]
        ends = torch.tensor([0, tokens], dtype=torch.int32).to(query.device)
        mixed: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            max_seqlen_q=tokens,
            cu_seqlens_q=ends,
            max_seqlen_k=tokens,
            cu_seqlens_k=ends,
            softmax_scale=SCALE,
            causal=True,
            fa_version=3,
        )
        return mixed
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def prefill(forward: Forward, backend: str) -> Prepared:
    """One layer: attention by the backend, all else by torch; no rope and no norms, which are cheap."""
    result = torch.full_like(forward.hidden, torch.nan)
    sizes = [QUERY_HEADS, KV_HEADS, KV_HEADS]

    def run() -> None:
        heads = (forward.hidden @ forward.qkv).unflatten(-1, (-1, HEAD_SIZE))
        query, key, value = heads.split(sizes, dim=1)
        mixed = _attend(query, key, value, backend)
        hidden = forward.hidden + mixed.flatten(1) @ forward.out
        gate, up = (hidden @ forward.gate_up).chunk(2, dim=-1)
        torch.add(hidden, (F.silu(gate) * up) @ forward.down, out=result)

    weights = (forward.qkv, forward.out, forward.gate_up, forward.down)
    num_bytes = sum(part.nbytes for part in (forward.hidden, *weights))
    return Prepared(run, result.clone, num_bytes, lambda: result.fill_(torch.nan), eager=True)
