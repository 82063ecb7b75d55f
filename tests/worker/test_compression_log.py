"""The worker's count of compressions and recalls: in the stream's order, however late the figures come."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hybridkv_vllm.observe.heads import HeadsReport, read_requests
from hybridkv_vllm.observe.metrics import DIRECTORY_VARIABLE, read_samples, worker_metrics
from hybridkv_vllm.observe.timing import DeviceTimer
from hybridkv_vllm.plan import ArenaGrant, make_plan
from hybridkv_vllm.policies import Selection
from hybridkv_vllm.worker import compression_log
from hybridkv_vllm.worker.compress import Compression
from hybridkv_vllm.worker.compression_log import CompressionLog

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
SLOT = 1


class Worker:
    """A log, and the device's counters of three slots."""

    def __init__(self, directory: Path, device: str) -> None:
        self.device = torch.device(device)
        self.counters = torch.zeros(3, 2, dtype=torch.int64, device=self.device)
        recall = cast(Any, SimpleNamespace(work=SimpleNamespace(counters=self.counters), tier=None))
        report = HeadsReport(str(directory), 0, 0, 0)
        self.log = CompressionLog(worker_metrics(1, 0), report, recall, self.device)

    def compress(self, request_id: str) -> None:
        """Of a prompt of 64 tokens and two heads, one of which recalls."""
        heads = torch.tensor([[1, 0]], dtype=torch.int32, device=self.device)
        plan = make_plan(64, (), 0.5, 32, "gpu")
        selection = Selection(
            keep=torch.ones(1, 2, 64, dtype=torch.bool, device=self.device),
            lengths=heads,
            first_page=heads,
            pages=heads,
            recalled=heads.bool(),
            dynamic=heads.bool(),
            figure=heads.float(),
            sparsity=heads.float(),
        )
        self.log.record(
            Compression(
                grant=ArenaGrant(request_id, plan, (1, 2)),
                selection=selection,
                reservation=None,
                recalls=True,
                store_end=None,
                timer=DeviceTimer(self.device),
                chunks_before=self.counters[SLOT].clone(),
            )
        )

    def decode(self, hit: int, recalled: int) -> None:
        """Steps that choose so many chunks."""
        self.counters[SLOT] += torch.tensor([hit, recalled], device=self.device)


@pytest.fixture(params=DEVICES)
def worker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    return Worker(tmp_path, request.param)


def chunks_counted() -> tuple[float, float]:
    """Of all requests: hot already, and copied."""
    values = {sample.name: sample.value for sample in read_samples()}
    return values["hybridkv_chunks_hit_total"], values["hybridkv_chunks_recalled_total"]


def test_a_request_that_starts_again_counts_its_last_life(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was compressed, preempted and compressed again before any figure came."""
    with monkeypatch.context() as patch:
        patch.setattr(compression_log, "_is_here", lambda _: False)
        for hit, recalled in ((2, 8), (9, 1)):
            worker.compress("again")
            worker.decode(hit, recalled)
            worker.log.end("again", SLOT)
            worker.log.collect()
        assert read_requests() == []
    worker.log.drain()
    (request,) = read_requests()
    assert request.hit_rate == 0.9


def test_the_last_requests_figures_wait_for_no_step(worker: Worker) -> None:
    worker.compress("last")
    worker.decode(3, 5)
    worker.log.collect()
    if worker.device.type == "cuda":
        torch.cuda._sleep(100_000_000)
    worker.decode(3, 1)
    worker.log.end("last", SLOT)
    worker.log.drain()
    (request,) = read_requests()
    assert request.hit_rate == 0.5
    assert chunks_counted() == (6, 6)
