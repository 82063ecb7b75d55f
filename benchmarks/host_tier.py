"""What the link to the host gives: chunks fetched and sent, against plain pinned copies, and copies hidden.

Needs a GPU and vLLM for a result; on a CPU it runs small, to check itself, and writes nothing:

    .venv/bin/python benchmarks/host_tier.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hybridkv_kernels import PAGE
from hybridkv_kernels.chunk_gather import chunk_gather
from hybridkv_kernels.chunk_offload import chunk_offload
from hybridkv_kernels.extent_decode import DecodeTables
from hybridkv_kernels.recall.layout import LandmarkLayout
from hybridkv_kernels.recall.tables import STORE_BLOCK, RecallTables
from hybridkv_kernels.recall.work import RecallWork
from rich.console import Console
from rich.table import Table

from hybridkv_vllm.worker.host_tier import HostTier

RESULTS = Path(__file__).parent / "results"
# Qwen2.5-VL-7B's KV heads.
KV_HEADS, QUERY_HEADS, HEAD_SIZE = 4, 28, 128
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Scene:
    """One layer of `rows` requests whose heads all recall; chunks lie in the store and in the pool alike."""

    pool: torch.Tensor
    tier: HostTier
    decode: DecodeTables
    recall: RecallTables
    layout: LandmarkLayout
    row_slot: torch.Tensor
    chunks: int
    hot: int

    @property
    def page_bytes(self) -> int:
        return self.layout.page_bytes


def make_scene(rows: int, chunks: int, hot: int, device: torch.device) -> Scene:
    """Prompts of `chunks` chunks in ordinary blocks, arenas of landmarks and hot slots, a store for all."""
    layout = LandmarkLayout("sketch", HEAD_SIZE, DTYPE.itemsize)
    per_head = layout.pages(chunks) + hot
    blocks = torch.arange(rows * chunks, dtype=torch.int32, device=device).view(rows, chunks)
    arena = (
        torch.arange(rows * per_head, dtype=torch.int32, device=device).view(rows, per_head) + rows * chunks
    )
    pool = torch.empty(rows * (chunks + per_head) * KV_HEADS, PAGE, 2 * HEAD_SIZE, dtype=DTYPE, device=device)
    pool.normal_()
    heads = torch.arange(KV_HEADS, dtype=torch.int32, device=device)
    extents = torch.stack((heads * per_head + layout.pages(chunks), torch.full_like(heads, hot * PAGE)), -1)
    # Heads' chunks lie in whole store blocks one after the other.
    store_blocks = -(-KV_HEADS * chunks // STORE_BLOCK)
    num_bytes = rows * store_blocks * STORE_BLOCK * layout.page_bytes
    decode = DecodeTables(
        extents.expand(rows, 1, -1, -1).contiguous(),
        arena,
        torch.full((rows,), chunks * PAGE, dtype=torch.int32, device=device),
        blocks,
    )
    recall = RecallTables(
        (heads * chunks).expand(rows, 1, -1).contiguous(),
        torch.arange(rows * store_blocks, dtype=torch.int32, device=device).view(rows, -1),
        torch.full((rows,), chunks * PAGE, dtype=torch.int32, device=device),
    )
    tier = HostTier.create(num_bytes, HEAD_SIZE, DTYPE, device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    return Scene(pool, tier, decode, recall, layout, slots, chunks, hot)


def offload(scene: Scene, row: int) -> None:
    """All heads' chunks of one row to the host."""
    chunk_offload(
        scene.pool,
        scene.tier.store,
        scene.decode.blocks[row],
        scene.recall.store_blocks[row],
        scene.recall.chunk_first[row, 0],
        0,
        1,
    )


def milliseconds(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time of one call on the device; 0 on a CPU, where it only runs."""
    if device.type != "cuda":
        work()
        return 0.0
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def check(condition: bool, what: str) -> None:
    """No time is reported for a wrong result."""
    if not condition:
        raise SystemExit(f"refcheck failed: {what}")


def measure_offload(scene: Scene, repeats: int) -> dict[str, float]:
    """Every row's chunks to the host, against one pinned copy of the same bytes."""
    device = scene.pool.device
    rows = len(scene.row_slot)

    def all_rows() -> None:
        for row in range(rows):
            offload(scene, row)

    time = milliseconds(all_rows, device, repeats)
    source = scene.pool[: scene.chunks * KV_HEADS].view(scene.chunks, KV_HEADS, PAGE, -1)
    stored = scene.tier.store[: scene.chunks * KV_HEADS].view(KV_HEADS, scene.chunks, PAGE, -1)
    check(torch.equal(stored.to(device), source.transpose(0, 1)), "offloaded chunks differ from the pool's")
    num_bytes = rows * scene.chunks * KV_HEADS * scene.page_bytes
    return ratio("offload", num_bytes, time, pinned_copy(num_bytes, device, repeats, to_host=True))


def measure_gather(scene: Scene, misses: int, repeats: int) -> dict[str, float]:
    """`misses` chunks for each head from the host, against one pinned copy of the same bytes."""
    device = scene.pool.device
    rows = len(scene.row_slot)
    work = RecallWork.create(rows, KV_HEADS, QUERY_HEADS, None, scene.chunks, rows, device)
    items = rows * KV_HEADS
    wanted = torch.stack([torch.randperm(scene.chunks)[:misses].sort().values for _ in range(items)])
    work.missing[:, :misses] = wanted.int().to(device)
    work.freed[:, :misses] = torch.arange(misses, dtype=torch.int32, device=device)
    work.num_missing.fill_(misses)

    def gather() -> None:
        chunk_gather(
            scene.pool,
            scene.tier.store,
            scene.row_slot,
            scene.decode,
            scene.recall,
            0,
            scene.layout,
            work,
        )

    time = milliseconds(gather, device, repeats)
    first_slot = int(scene.decode.extents[0, 0, 0, 0])
    page = int(scene.decode.arena[0, first_slot // KV_HEADS]) * KV_HEADS + first_slot % KV_HEADS
    source = scene.pool[int(scene.decode.blocks[0, int(wanted[0, 0])]) * KV_HEADS]
    check(torch.equal(scene.pool[page], source), "a fetched chunk differs from the prompt's")
    num_bytes = items * misses * scene.page_bytes
    return ratio("gather", num_bytes, time, pinned_copy(num_bytes, device, repeats, to_host=False))


def pinned_copy(num_bytes: int, device: torch.device, repeats: int, *, to_host: bool) -> float:
    """Time of one contiguous copy between pinned memory and the device."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    on_device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target, source = (host, on_device) if to_host else (on_device, host)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    return milliseconds(copy, device, repeats)


def ratio(name: str, num_bytes: int, ours: float, baseline: float) -> dict[str, float]:
    """GB/s of both, and ours as a share of the copy's."""
    per_second = [num_bytes / 1e6 / time if time else 0.0 for time in (ours, baseline)]
    return {
        f"{name}_mib": num_bytes / 2**20,
        f"{name}_gb_per_s": per_second[0],
        f"{name}_pinned_copy_gb_per_s": per_second[1],
        f"{name}_ratio": baseline / ours if ours else 0.0,
    }


def measure_overlap(scene: Scene, repeats: int) -> dict[str, float]:
    """How much of one row's offload hides behind matrix products on another stream."""
    device = scene.pool.device
    if device.type != "cuda":
        return {}
    side = torch.cuda.Stream(device)
    a = torch.randn(4096, 4096, dtype=DTYPE, device=device)

    def compute() -> None:
        for _ in range(scene.chunks * KV_HEADS * scene.page_bytes // 2**22 + 1):
            torch.mm(a, a)

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            offload(scene, 0)
        compute()
        torch.cuda.current_stream(device).wait_stream(side)

    copy = milliseconds(lambda: offload(scene, 0), device, repeats)
    alone = milliseconds(compute, device, repeats)
    together = milliseconds(both, device, repeats)
    return {
        "overlap_copy_ms": copy,
        "overlap_compute_ms": alone,
        "overlap_together_ms": together,
        "overlap_hidden_share": (copy + alone - together) / min(copy, alone),
    }


def main() -> int:
    """Measures, prints, and on a GPU writes benchmarks/results/host_tier.json."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32 if on_gpu else 2)
    parser.add_argument("--chunks", type=int, default=2048 if on_gpu else 70, help="of each prompt")
    parser.add_argument("--hot", type=int, default=128 if on_gpu else 6, help="hot slots of each head")
    parser.add_argument(
        "--misses", type=int, default=64 if on_gpu else 3, help="chunks fetched for each head"
    )
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    scene = make_scene(args.rows, args.chunks, args.hot, device)
    results: dict[str, Any] = {
        **measure_offload(scene, args.repeats),
        **measure_gather(scene, args.misses, args.repeats),
        **measure_overlap(scene, args.repeats),
    }
    table = Table("figure", "value", title="Chunks between host and device")
    for name, value in results.items():
        table.add_row(name, f"{value:.3f}")
    console = Console()
    console.print(table)
    if not on_gpu:
        console.print("no GPU: results were checked, times mean nothing and are not kept")
        return 0
    environment = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    record = {"environment": environment, "settings": vars(args), "results": results}
    (RESULTS / "host_tier.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
