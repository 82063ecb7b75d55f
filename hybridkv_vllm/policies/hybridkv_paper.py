"""HybridKV as close to its paper as we know it, to compare our additions with."""

from __future__ import annotations

from typing import ClassVar

from hybridkv_kernels.recall.layout import LandmarkKind

from hybridkv_vllm.policies.data import Recall
from hybridkv_vllm.policies.hybridkv import HybridKV


class HybridKVPaper(HybridKV):
    """HybridKV (Zeng et al., ACL 2026, arXiv 2604.05887) without what we added to it.

    The paper's: a head is static where its text-centric sparsity is at least theta, on each prompt anew; the
    budget is split by type with a coefficient r, then among heads, static ones by sparsity weight and dynamic
    ones evenly; static heads are pruned text first, dynamic heads recall chunks. So, unlike `HybridKV`, it
    always judges by `sparsity`, scores chunks by mean keys (which fit the memory that the paper reports), and
    lets r alone decide what a dynamic head gets, though no less than its landmarks and one chunk.

    Still our reading, because the paper's formulas are not known to us: those of sparsity, weight and floor,
    the value of r, and that the observation window says which chunks are hot at first. Ours is also that only
    as many heads recall, the most dynamic first, as the arena holds with landmarks and a handful of chunks.
    """

    name: ClassVar[str] = "hybridkv-paper"
    classifier: ClassVar[str | None] = "sparsity"
    landmark: ClassVar[LandmarkKind | None] = "mean"

    def least_pages(self, recall: Recall) -> int:
        return recall.landmark_pages + 1
