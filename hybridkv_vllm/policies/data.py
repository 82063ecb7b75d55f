"""What every policy is given and what it must return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hybridkv_vllm.plan import PAGE_TOKENS

StaticWeight = Literal["dense", "sparse", "even"]


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
        classifier: name in `classify.CLASSIFIERS`, or `classify.PROFILE`.
        theta: a KV head is static where its figure is at least this, in [0, 1]. The paper's 0.9.
        dynamic_share: r, what dynamic heads get of an equal share of the budget, in [0, 1]; 0.4 is our
            reading.
        static_weight: by what static heads share their part: `dense`, 1 - S (our reading); `sparse`, S;
            `even`, nothing.
        profile: `[L, H]` fp32, what calibration says of the layers to be judged, for `classify.PROFILE`.

    Raises:
        ValueError: a number out of range.
    """

    classifier: str = "text_mass"
    theta: float = 0.9
    dynamic_share: float = 0.4
    static_weight: StaticWeight = "dense"
    profile: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("theta", "dynamic_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class Verdict:
    """How each KV head was judged.

    Attributes:
        dynamic: `[L, H]` bool.
        figure: `[L, H]` fp32, what the classifier holds against theta; 0 where it was not a number.
        sparsity: `[L, H]` fp32, S of `scoring.sparsity`, whichever the classifier.
    """

    dynamic: Tensor
    figure: Tensor
    sparsity: Tensor

    @staticmethod
    def join(layers: Sequence[Verdict]) -> Verdict:
        """The verdicts of all layers, in their order, as one."""
        return Verdict(
            dynamic=torch.cat([layer.dynamic for layer in layers]),
            figure=torch.cat([layer.figure for layer in layers]),
            sparsity=torch.cat([layer.sparsity for layer in layers]),
        )


@dataclass(frozen=True)
class Recall:
    """KV heads that keep all of their prompt in another tier and recall chunks of 16 tokens from there.

    Attributes:
        heads: `[L, H]` bool, heads whose chunks are in the tier.
        landmark_pages: arena pages for one such head's landmarks.
        least_pages: arena pages that such a head should get at least, landmarks included, as far as there are
            as many (see `budget.allocate_pages`), unless the method itself says what is least.
        most_heads: how many of them may recall, the most dynamic ones first.

    `budget.recall_limits` finds the last two.

    Raises:
        ValueError: least pages that leave no room beside the landmarks, or a negative number of heads.
    """

    heads: Tensor
    landmark_pages: int
    least_pages: int
    most_heads: int

    def __post_init__(self) -> None:
        if self.most_heads < 0:
            raise ValueError(f"most_heads must not be negative, got {self.most_heads}")
        if not 0 <= self.landmark_pages < self.least_pages:
            raise ValueError(
                f"least_pages must be more than landmark_pages, got {self.least_pages} "
                f"and {self.landmark_pages}"
            )


@dataclass(frozen=True)
class Selection:
    """Which prompt tokens each KV head keeps in the arena, and where its extent begins.

    A head takes `pages` arena pages, one head after the other in (layer, KV head) order. Its extent is all of
    them, but for a recalled head, whose landmark pages come first. A recalled head's extent is its hot slots:
    whole chunks, at least one.

    Attributes:
        keep: `[L, H, T']` bool.
        lengths: `[L, H]` int32, tokens kept.
        first_page: `[L, H]` int32, first logical arena page of the extent.
        pages: `[L, H]` int32, arena pages of the head, landmarks included.
        recalled: `[L, H]` bool, heads that recall chunks.
        dynamic: `[L, H]` bool, the verdict (whether or not the head recalls).
        figure: `[L, H]` fp32, what the classifier holds against theta.
        sparsity: `[L, H]` fp32, S of `scoring.sparsity`.
    """

    keep: Tensor
    lengths: Tensor
    first_page: Tensor
    pages: Tensor
    recalled: Tensor
    dynamic: Tensor
    figure: Tensor
    sparsity: Tensor

    def dest(self) -> Tensor:
        """`[L, H, T']` int32, each kept token's position in its extent (ascending token order), else -1."""
        position = self.keep.cumsum(-1, dtype=torch.int32) - 1
        return position.masked_fill(~self.keep, -1)
