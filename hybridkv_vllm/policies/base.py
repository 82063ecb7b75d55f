"""What every policy is given and what it must return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from hybridkv_vllm.plan import PAGE_TOKENS

DynamicTier = Literal["off", "host", "gpu"]


@dataclass(frozen=True)
class PromptScores:
    """What the observation window's attention says about a prompt of T tokens, for one rank's heads.

    Attributes:
        mass: `[L, H, T]` fp32, attention mass from the observation window to each prompt token, mean over the
            window's queries and the query group; each row sums to 1.
        votes: `[L, H, T]` fp32, number of (window query, group member) pairs whose probability for the token
            is at least 0.01 of that pair's largest.
        is_visual: `[T]` bool, image and video tokens.
        window: W, queries of the observation window: the prompt's last W tokens.
        group: query heads per KV head.
        compressible: T', a multiple of 16 and at most T. Tokens `[0, T')` move to the arena, as far as they
            are kept; the others stay in the tail whatever a policy says.

    Raises:
        ValueError: shapes that do not fit together, or a count out of range.
    """

    mass: Tensor
    votes: Tensor
    is_visual: Tensor
    window: int
    group: int
    compressible: int

    def __post_init__(self) -> None:
        if self.mass.ndim != 3 or self.mass.shape != self.votes.shape:
            raise ValueError(
                f"mass and votes must both be [L, H, T], got {list(self.mass.shape)} "
                f"and {list(self.votes.shape)}"
            )
        if self.is_visual.shape != self.mass.shape[-1:]:
            raise ValueError(f"is_visual must be [{self.tokens}], got {list(self.is_visual.shape)}")
        if self.window < 1 or self.group < 1:
            raise ValueError(f"window and group must be at least 1, got {self.window} and {self.group}")
        if self.compressible % PAGE_TOKENS or not PAGE_TOKENS <= self.compressible <= self.tokens:
            raise ValueError(
                f"compressible must be a multiple of {PAGE_TOKENS} in [{PAGE_TOKENS}, {self.tokens}], "
                f"got {self.compressible}"
            )

    @property
    def tokens(self) -> int:
        """T, the prompt's length."""
        return self.mass.shape[-1]

    @property
    def heads(self) -> int:
        """L * H, KV heads of this rank over all layers."""
        return self.mass.shape[0] * self.mass.shape[1]

    @property
    def capacity(self) -> int:
        """Pages with which one KV head keeps all of `[0, T')`."""
        return self.compressible // PAGE_TOKENS

    @property
    def past(self) -> int:
        """Tokens before the observation window."""
        return max(0, self.tokens - self.window)

    @property
    def window_in_arena(self) -> int:
        """Window tokens that lie in `[0, T')`; those in the tail need no pages."""
        return max(0, self.compressible - self.past)


@dataclass(frozen=True)
class PolicyOptions:
    """The server options that policies see.

    Attributes:
        classifier: name in `classify.CLASSIFIERS`.
        theta: a KV head is static where its figure is at least this, in [0, 1]. The paper's 0.9.
        dynamic_share: r, what dynamic heads get of an equal share of the budget, in [0, 1]; 0.4 is our
            reading.
        dynamic_tier: where the chunks of dynamic heads live; `off` prunes every head.

    Raises:
        ValueError: a number or tier out of range.
    """

    classifier: str = "text_mass"
    theta: float = 0.9
    dynamic_share: float = 0.4
    dynamic_tier: DynamicTier = "off"

    def __post_init__(self) -> None:
        for name in ("theta", "dynamic_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.dynamic_tier not in get_args(DynamicTier):
            raise ValueError(
                f"dynamic_tier must be one of {', '.join(get_args(DynamicTier))}, got {self.dynamic_tier!r}"
            )


@dataclass(frozen=True)
class Selection:
    """Which prompt tokens each KV head keeps, and where its extent begins.

    Attributes:
        keep: `[L, H, T']` bool.
        lengths: `[L, H]` int32, tokens kept.
        first_page: `[L, H]` int32, first logical arena page of the extent: the exclusive prefix sum of
            `ceil(lengths / 16)` in (layer, KV head) order.
        dynamic: `[L, H]` bool, the classifier's verdict (whether or not the allocation used it).
        figure: `[L, H]` fp32, what the classifier holds against theta.
        sparsity: `[L, H]` fp32, S of `scoring.sparsity`.
    """

    keep: Tensor
    lengths: Tensor
    first_page: Tensor
    dynamic: Tensor
    figure: Tensor
    sparsity: Tensor

    def dest(self) -> Tensor:
        """`[L, H, T']` int32, each kept token's position in its extent (ascending token order), else -1."""
        position = self.keep.cumsum(-1, dtype=torch.int32) - 1
        return position.masked_fill(~self.keep, -1)


class Policy(ABC):
    """A method that chooses what stays of a prompt's KV cache.

    A policy runs on the device, in stream order, at the end of a prefill: it must never wait for the device,
    so no shape and no Python branch may depend on a tensor's values.
    """

    name: ClassVar[str]

    def budget_share(self, requested: float) -> float:
        """Share of the prompt's pages to reserve where the user asked for `requested`."""
        return requested

    @abstractmethod
    def select(self, scores: PromptScores, pages: int, options: PolicyOptions) -> Selection:
        """Chooses the tokens that every KV head keeps.

        Args:
            scores: see `PromptScores`; all tensors on one device.
            pages: pages of this rank's arena, A * L * H. The extents never need more.
            options: see `PolicyOptions`.

        Raises:
            ValueError: unknown classifier, or a policy that cannot work with `pages`.
        """
