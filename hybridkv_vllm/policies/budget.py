"""Shares out a rank's arena pages to its KV heads: evenly, by weight, or by type and then by head."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridkv_vllm.plan import PAGE_TOKENS

# Weights and shares are whole numbers of these: integer sums do not depend on the device's order of adding.
WEIGHT_ONE = 1 << 30
SHARE_ONE = 10**6
# Hot chunks that a recalling head gets at least: a number, as the budget allows, and one in so many chunks.
LEAST_HOT = range(4, 9)
LEAST_HOT_ONE_IN = 50


def pruned_floor(window: int) -> int:
    """Pages that recalling heads leave to each other one, on average: the window's, and one beside it.

    However these are weighted, `allocate_pages` then gives each at least the window's, and one.

    Args:
        window: tokens of the observation window that need pages.
    """
    return -(-window // PAGE_TOKENS) + 1


def heads_that_fit(pages: int, heads: int, least: int, window: int) -> int:
    """KV heads that can have `least` pages each beside `pruned_floor` for every other one.

    All of them where an equal share is that much, whatever the others would need. Never falls as pages grow.
    """
    if pages >= heads * least:
        return heads
    spare = pages - heads * pruned_floor(window)
    # Only a floor below an equal share leaves anything to spare, so it is below `least` too.
    return spare // (least - pruned_floor(window)) if spare > 0 else 0


def recall_limits(
    pages: int, heads: int, num_chunks: int, landmark_pages: int, window: int
) -> tuple[int, int] | None:
    """How many pages a recalling head should have at least, and how many heads may recall.

    The least is the head's landmarks and 2% of its chunks, no fewer than 4 to 8. `dynamic_share` of an equal
    share alone would, at small budgets, leave next to nothing beside the landmarks, which do not shrink with
    the budget; and a few well chosen chunks are worth more than pruning at several times their number. The
    more chunks, the fewer heads fit, but a chunk is worth the less the more there are: that number between 4
    and 8 is taken for which the heads that fit times `log(1 + chunks)` is largest. The numbers are ours.

    Args:
        pages: pages of this rank's arena for all KV heads.
        heads: KV heads of this rank, L * H.
        num_chunks: chunks of the prompt that a head would recall from.
        landmark_pages: arena pages for one head's landmarks.
        window: tokens of the observation window that need pages.

    Returns:
        Least pages and most heads, at least one. None where no head should recall: `pages` keep every chunk
        as it is, a head with 4 chunks takes as much as all of its prompt, or not even one such head fits.
    """
    # Exact, so that all ranks of a model agree: n * log(1 + h) orders as (1 + h) ** n does.
    choices = [
        ((1 + hot) ** fit, hot, fit)
        for hot in LEAST_HOT
        if landmark_pages + hot < num_chunks
        and (fit := heads_that_fit(pages, heads, landmark_pages + hot, window))
    ]
    if pages >= heads * num_chunks or not choices:
        return None
    _, hot, most_heads = max(choices)
    return landmark_pages + max(hot, -(-num_chunks // LEAST_HOT_ONE_IN)), most_heads


def allocate_pages(
    sparsity: Tensor,
    dynamic: Tensor,
    *,
    pages: int,
    capacity: int,
    window: int,
    dynamic_share: float,
    dynamic_least: int = 0,
) -> Tensor:
    """Shares out `pages` top-down: dynamic against static heads, then KV head by KV head.

    With both types present each dynamic head gets `dynamic_share * pages / (L * H)` rounded down to whole
    pages (landmarks come out of these), but at least `dynamic_least`, as far as an equal share goes or, if
    that is more, what `pruned_floor` for every static head leaves; and at least one page where every head can
    have one. Static heads share the rest: a floor of the window plus a tenth of their mean, then by weight
    `1 - S`, at most `capacity` each. What the capped ones leave goes to the other static heads, and to the
    dynamic heads once all static ones are capped. Where one type is empty the other gets all. Exactly
    `min(pages, L * H * capacity)` pages are given; fractions go to the largest, ties to the first head.

    Source: type level by a coefficient r, static by sparsity weight and dynamic uniform are the paper's; the
    value of r, the least of a dynamic head, the weight `1 - S` and the floor are our reading.

    Args:
        sparsity: `[L, H]` fp32 in [0, 1], S. Where all weights are zero static heads share evenly.
        dynamic: `[L, H]` bool, heads to allocate as dynamic.
        pages: arena pages of this rank.
        capacity: pages with which one KV head keeps everything, T' / 16.
        window: tokens of the observation window that need pages.
        dynamic_share: r, in [0, 1], used to a precision of 1e-6.
        dynamic_least: pages of a dynamic head that r must not undercut.

    Returns:
        `[L, H]` int64, pages of each KV head.

    Raises:
        ValueError: negative `pages`.
    """
    if pages < 0:
        raise ValueError(f"pages must not be negative, got {pages}")
    heads = sparsity.numel()
    if pages >= heads * capacity:
        return torch.full_like(sparsity, capacity, dtype=torch.int64)

    dynamic_flat = dynamic.flatten()
    num_dynamic = dynamic_flat.sum()
    num_static = heads - num_dynamic
    equal_share = pages // heads
    by_share = pages * round(dynamic_share * SHARE_ONE) // (heads * SHARE_ONE)
    at_least_one = num_dynamic.clamp(min=1)
    affordable = (pages - num_static * pruned_floor(window)) // at_least_one
    least = affordable.clamp(min=equal_share).clamp(max=min(max(1, dynamic_least), capacity))
    dynamic_each = torch.where(num_static > 0, least.clamp(min=by_share), equal_share)

    weight = ((1 - sparsity.flatten().double()) * WEIGHT_ONE).long()
    # At least one unit: a head of weight zero still takes what the capped ones leave.
    weight = weight.clamp(min=1).masked_fill(dynamic_flat, 0)
    for_static = pages - num_dynamic * dynamic_each
    divisor = num_static.clamp(min=1)
    wanted = -(-(10 * window * divisor + PAGE_TOKENS * for_static) // (10 * PAGE_TOKENS * divisor))
    floor = torch.minimum(wanted, for_static // divisor).clamp(max=capacity)
    static_pages = share_by_weight(
        weight, pages=for_static, members=num_static, floor=floor, capacity=capacity
    )

    left = for_static - static_pages.sum()
    earlier_dynamic = dynamic_flat.cumsum(0) - 1
    dynamic_pages = dynamic_each + left // at_least_one + (earlier_dynamic < left % at_least_one)
    return torch.where(dynamic_flat, dynamic_pages, static_pages).view(sparsity.shape)


def share_evenly(pages: int, members: int, device: torch.device) -> Tensor:
    """An equal share of `pages` for each member, the first ones one page more; `[members]` int64."""
    each, surplus = divmod(pages, members)
    return each + (torch.arange(members, device=device) < surplus).long()


def floor_pages(pages: int, members: int, window: int, percent: int) -> int:
    """Pages that each member gets at least, where `pages` are to be shared among them.

    Room for the window and for `percent` of what it leaves of an equal share, in whole pages; at least one
    page, but never more than an equal share.

    Args:
        window: tokens of the observation window that need pages.
    """
    left = max(0, PAGE_TOKENS * pages - members * window)
    wanted = -(-(100 * members * window + percent * left) // (100 * members * PAGE_TOKENS))
    return min(max(1, wanted), pages // members)


def share_by_weight(
    weight: Tensor, *, pages: Tensor | int, members: Tensor | int, floor: Tensor | int, capacity: int
) -> Tensor:
    """Gives each member `floor`, then the rest by weight up to `capacity`, the surplus flowing on.

    The shares of an endless redistribution of surplus are `min(room, level * weight)` for one common level.
    All members have the same room, so the heaviest are the capped ones, and one pass over the heads in
    descending weight finds how many. All arithmetic is exact: `weight * pages` and a row's total weight times
    `capacity` must stay below 2**63, as they do for 4,096 heads of a million tokens and weights up to
    `WEIGHT_ONE`. Fractions of a page go to the largest, ties to the heavier, then the first.

    Args:
        weight: `[..., N]` int64, at least 1 for members, 0 for the others. Each row is shared out on its own.
        pages: to be shared among a row's members; a tensor is `[]` or `[..., 1]`.
        members: of a row.
        floor: at most `capacity` and at most an equal share of `pages`.
        capacity: most pages of a member.

    Returns:
        `[..., N]` int64; a row sums to `pages`, or to `members * capacity` where that is less.
    """
    room = capacity - floor
    to_share = pages - members * floor

    heaviest_first, order = weight.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(weight.shape[-1], device=weight.device)
    weight_from_here = heaviest_first.flip(-1).cumsum(-1).flip(-1)
    # Would this head overflow if all heavier ones were full?
    overflows = (to_share - rank * room) * heaviest_first > room * weight_from_here
    full = overflows.sum(-1, keepdim=True)
    is_full = rank < full

    open_weight = heaviest_first.masked_fill(is_full, 0)
    open_total = open_weight.sum(-1, keepdim=True).clamp(min=1)
    open_pages = to_share - full * room
    exact = open_weight * open_pages
    whole, fraction = exact // open_total, exact % open_total
    # Fractions sum to the missing pages, so no more than the heads that have a fraction get one.
    missing = open_pages - whole.sum(-1, keepdim=True)
    by_fraction = fraction.argsort(dim=-1, descending=True, stable=True)
    place = torch.zeros_like(weight).scatter(-1, by_fraction, rank.expand_as(weight))
    rounded = whole + ((place < missing) & (fraction > 0))

    shared = floor + torch.where(is_full, room, rounded)
    return torch.zeros_like(weight).scatter(-1, order, shared.masked_fill(heaviest_first == 0, 0))
