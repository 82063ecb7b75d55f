"""The time of a compression: stretches add up, and on a GPU nothing waits for them."""

from __future__ import annotations

import time

import pytest
import torch

from hybridkv_vllm.observe.timing import DeviceTimer


def test_stretches_add_up_and_what_lies_between_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = DeviceTimer(torch.device("cpu"))
    assert timer.seconds() == 0
    for now in (1.0, 1.5, 4.0, 4.25):
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now)
        timer.mark()
    assert timer.seconds() == 0.75


def test_a_stretch_that_has_not_ended_is_an_error() -> None:
    timer = DeviceTimer(torch.device("cpu"))
    timer.mark()
    with pytest.raises(ValueError, match="shorter"):
        timer.seconds()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_time_the_device_and_not_the_host() -> None:
    device = torch.device("cuda")
    timer = DeviceTimer(device)
    matrix = torch.randn(8192, 8192, device=device)
    matrix @ matrix  # The first product sets up cuBLAS.
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(2):
        timer.mark()
        for _ in range(10):
            matrix @ matrix
        timer.mark()
    launched = time.perf_counter() - start
    # Not there yet: asking is an error, and does not wait.
    with pytest.raises(RuntimeError):
        timer.seconds()
    torch.cuda.synchronize()
    assert launched < timer.seconds() <= time.perf_counter() - start
