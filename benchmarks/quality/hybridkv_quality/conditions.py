"""Which policies are asked at which budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybridkv_quality.settings import FULL, UsageError


@dataclass(frozen=True)
class Conditions:
    """Each policy with its budgets.

    The full cache is the policy `full` at budget 1.0 and asked once: at that budget all policies keep
    everything.
    """

    budgets_by_policy: dict[str, tuple[float, ...]]

    @classmethod
    def make(cls, policies: Sequence[str], budgets: Sequence[float]) -> Conditions:
        """Sorts out policies and budgets.

        Raises:
            UsageError: an unknown policy, a budget out of range, or nothing left to ask.
        """
        from hybridkv_vllm.policies import POLICIES

        unknown = [policy for policy in policies if policy not in POLICIES]
        if unknown or not policies:
            raise UsageError(f"--policies {','.join(unknown)}: choose among {', '.join(sorted(POLICIES))}")
        outside = [budget for budget in budgets if not 0 < budget <= 1]
        if outside or not budgets:
            raise UsageError(f"--budgets {','.join(map(str, outside))}: each must be above 0 and at most 1")
        below = tuple(sorted({budget for budget in budgets if budget < 1}))
        conditions: dict[str, tuple[float, ...]] = {}
        if FULL in policies or 1.0 in budgets:
            conditions[FULL] = (1.0,)
        conditions |= {policy: below for policy in dict.fromkeys(policies) if policy != FULL and below}
        return cls(conditions)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """Policy and budget, the full cache first."""
        for policy, budgets in self.budgets_by_policy.items():
            for budget in budgets:
                yield policy, budget
