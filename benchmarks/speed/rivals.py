"""Other libraries' decode attention on the same uncompressed cache, where they can be imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from hybridkv_kernels import PAGE
from torch import Tensor

from speed.layer import HEAD_SIZE, KV_HEADS, QUERY_HEADS, SCALE, Layer

Rival = Callable[[Layer, Tensor], Callable[[], object]]
"""Prepares a step on `Layer.ordinary` that writes `out` `[batch, QUERY_HEADS, HEAD_SIZE]`."""


def caches(layer: Layer) -> tuple[Tensor, Tensor]:
    """Key and value caches `[blocks, 16, KV_HEADS, HEAD_SIZE]`: the same blocks as others lay them out."""
    by_token = layer.pool.view(-1, KV_HEADS, PAGE, 2 * HEAD_SIZE).transpose(1, 2)
    key, value = by_token.chunk(2, dim=-1)
    return key.contiguous(), value.contiguous()


def rows(layer: Layer) -> list[Tensor]:
    """Keys and values `[batch, tokens, KV_HEADS, HEAD_SIZE]`: each row's blocks one after the other."""
    blocks = layer.ordinary.blocks.long()
    return [cache[blocks].flatten(1, 2) for cache in caches(layer)]


def sdpa(layer: Layer, out: Tensor) -> Callable[[], object]:
    """torch's attention over contiguous, padded keys and values."""
    key, value = (row.transpose(1, 2).contiguous() for row in rows(layer))
    inside = torch.arange(key.shape[2], device=key.device) < layer.row_len[:, None]

    def run() -> None:
        mixed = F.scaled_dot_product_attention(
            layer.query[:, :, None],
            key,
            value,
            attn_mask=inside[:, None, None],
            scale=SCALE,
            enable_gqa=True,
        )
        out.copy_(mixed[:, :, 0])

    return run


def flash_attention_3(layer: Layer, out: Tensor) -> Callable[[], object]:
    """FlashAttention 3 as vLLM carries and schedules it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    key, value = caches(layer)
    starts = torch.arange(layer.case.batch + 1, dtype=torch.int32, device=out.device)
    longest = int(layer.row_len.max())
    schedule = get_scheduler_metadata(
        batch_size=layer.case.batch,
        max_seqlen_q=1,
        max_seqlen_k=longest,
        num_heads_q=QUERY_HEADS,
        num_heads_kv=KV_HEADS,
        headdim=HEAD_SIZE,
        cache_seqlens=layer.row_len,
        qkv_dtype=key.dtype,
        cu_seqlens_q=starts,
        page_size=PAGE,
        causal=True,
    )

    def run() -> None:
        flash_attn_varlen_func(
            layer.query,
            key,
            value,
            out=out,
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=longest,
            seqused_k=layer.row_len,
            softmax_scale=SCALE,
            causal=True,
            window_size=[-1, -1],
            block_table=layer.ordinary.blocks,
            scheduler_metadata=schedule,
            fa_version=3,
        )

    return run


def vllm_triton(layer: Layer, out: Tensor) -> Callable[[], object]:
    """vLLM's unified attention in Triton, in segments where vLLM's own backend splits a batch that small."""
    from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    key, value = caches(layer)
    most_rows = MIN_LAUNCH_GRID_SIZE_2D // KV_HEADS
    # HEAD_SIZE is a power of two, so that it needs no padding.
    shape = (most_rows, QUERY_HEADS, NUM_PAR_SOFTMAX_SEGMENTS, HEAD_SIZE)
    segments = torch.empty(shape, dtype=torch.float32, device=out.device)
    largest, total = torch.empty_like(segments[..., 0]), torch.empty_like(segments[..., 0])
    starts = torch.arange(layer.case.batch + 1, dtype=torch.int32, device=out.device)
    one = torch.ones((), dtype=torch.float32, device=out.device).expand(layer.case.batch, KV_HEADS)
    longest = int(layer.row_len.max())

    def run() -> None:
        unified_attention(
            layer.query,
            key,
            value,
            out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=layer.row_len,
            max_seqlen_k=longest,
            softmax_scale=SCALE,
            causal=True,
            window_size=(-1, -1),
            block_table=layer.ordinary.blocks,
            softcap=0.0,
            q_descale=None,
            k_descale=one,
            v_descale=one,
            seq_threshold_3D=most_rows,
            num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
            softmax_segm_output=segments,
            softmax_segm_max=largest,
            softmax_segm_expsum=total,
        )

    return run


def flashinfer(layer: Layer, out: Tensor) -> Callable[[], object]:
    """FlashInfer's paged decode with tensor cores, planned beforehand."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    used = (layer.row_len + PAGE - 1) // PAGE
    ends = torch.cat((torch.zeros_like(used[:1]), used.cumsum(0, dtype=torch.int32)))
    held = torch.arange(layer.ordinary.blocks.shape[1], device=out.device) < used[:, None]
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=out.device)
    indices = layer.ordinary.blocks[held]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=ends.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=torch.empty_like(used),
    )
    wrapper.plan(
        ends,
        indices,
        (layer.row_len - 1) % PAGE + 1,
        QUERY_HEADS,
        KV_HEADS,
        HEAD_SIZE,
        PAGE,
        q_data_type=layer.query.dtype,
        kv_data_type=layer.pool.dtype,
        sm_scale=SCALE,
    )
    cache = caches(layer)
    return lambda: wrapper.run(layer.query, cache, out=out)


def xformers(layer: Layer, out: Tensor) -> Callable[[], object]:
    """xFormers' memory-efficient attention over pages, with its split-KV kernel in Triton.

    That takes no pages of 16 tokens, so the same keys and values are in larger ones here, in order.
    """
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask

    group, page = QUERY_HEADS // KV_HEADS, fmha.triton_splitk.FwOp.BLOCK_N
    padded = [F.pad(row, (0, 0, 0, 0, 0, -row.shape[1] % page)) for row in rows(layer)]
    pages = torch.arange(padded[0][..., 0, 0].numel() // page, dtype=torch.int32, device=out.device)
    bias = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * layer.case.batch,
        kv_seqlen=layer.row_len.tolist(),
        block_tables=pages.view(layer.case.batch, -1),
        page_size=page,
    )
    query = layer.query.view(1, layer.case.batch, KV_HEADS, group, HEAD_SIZE)
    grouped = [cache.view(1, -1, KV_HEADS, 1, HEAD_SIZE).expand(-1, -1, -1, group, -1) for cache in padded]

    def run() -> None:
        mixed = fmha.memory_efficient_attention_forward(
            query, *grouped, attn_bias=bias, scale=SCALE, op=fmha.triton_splitk.FwOp
        )
        out.copy_(mixed.view(out.shape))

    return run


RIVALS: Mapping[str, Rival] = MappingProxyType(
    {
        "sdpa": sdpa,
        "fa3": flash_attention_3,
        "vllm-triton": vllm_triton,
        "flashinfer": flashinfer,
        "xformers": xformers,
    }
)
