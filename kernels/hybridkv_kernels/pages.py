"""The page size, the backend choice and the argument checks that every operation shares."""

from typing import Literal

import torch
from torch import Tensor

PAGE = 16
"""Tokens of one KV head of one layer that a page holds."""

MAX_GROUP = 16
"""Most query heads that may share a KV head."""

MAX_CHUNKS = (1 << 16) - 1
"""Most chunks of a prompt that a head can recall: `chunk_select` counts them in 16 bits."""

MAX_HEAD_SIZE = 256
# What the kernels are compiled and tested for.
HEAD_SIZES = f"16 to {MAX_HEAD_SIZE}, a multiple of 8"

Backend = Literal["auto", "torch", "triton"]


POOL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def use_triton(backend: Backend, tensor: Tensor) -> bool:
    """Whether `backend` means Triton for `tensor`; `auto` is Triton on CUDA and torch elsewhere.

    Raises:
        ValueError: for a backend that does not exist.
    """
    if backend == "auto":
        return tensor.is_cuda
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', not {backend!r}")
    return backend == "triton"


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_pool(pool: Tensor, head_size: int, *like_pool: Tensor) -> None:
    """Check the pool's layout, and that `like_pool` fit it: same dtype and device, last dim contiguous.

    Raises:
        ValueError: for a pool that is not contiguous [P, 16, 2*head_size] in a float dtype, or a mismatch.
    """
    if pool.shape[1:] != (PAGE, 2 * head_size) or not pool.is_contiguous():
        raise ValueError(f"pool must be contiguous [P, {PAGE}, {2 * head_size}], not {list(pool.shape)}")
    require(pool.dtype in POOL_DTYPES, "pool must be bf16, fp16 or fp32")
    require(head_size <= MAX_HEAD_SIZE, f"head size {head_size} is over {MAX_HEAD_SIZE}")
    for tensor in like_pool:
        if tensor.dtype != pool.dtype or tensor.device != pool.device:
            raise ValueError(f"expected the pool's dtype and device, not {tensor.dtype} on {tensor.device}")
        require(tensor.stride(-1) == 1, "the last dimension must be contiguous")


def check_index(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Check an index tensor: contiguous, of `dtype`, of `shape` (-1 for any size).

    Raises:
        ValueError: where it is not.
    """
    # Called at every layer: most shapes are exact, and the message is only put together where it is needed.
    fits = tensor.shape == shape or (
        tensor.dim() == len(shape)
        and all(want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True))
    )
    if not fits or tensor.dtype != dtype or not tensor.is_contiguous():
        actual = f"{tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}"
        raise ValueError(f"{name} must be contiguous, {dtype} {list(shape)}, not {actual}")


def supports_head_size(head_size: int) -> bool:
    """Whether head_size is one of `HEAD_SIZES`."""
    return 16 <= head_size <= MAX_HEAD_SIZE and head_size % 8 == 0


def group_size(num_q_heads: int, num_kv_heads: int) -> int:
    """Query heads per KV head.

    Raises:
        ValueError: if the heads do not divide, or a group is larger than `MAX_GROUP`.
    """
    require(
        num_kv_heads > 0 and num_q_heads % num_kv_heads == 0,
        f"{num_q_heads} query heads do not divide over {num_kv_heads} KV heads",
    )
    group = num_q_heads // num_kv_heads
    require(1 <= group <= MAX_GROUP, f"a query group of {group} heads is not within 1..{MAX_GROUP}")
    return group
