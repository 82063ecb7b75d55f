"""Chooses where the kernel tests run: on the GPU, or under Triton's interpreter where there is none."""

import os

import pytest
import torch

# Triton reads this when a kernel is defined, so it comes before any import of the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the tests put their tensors on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers every time, whatever ran before."""
    torch.manual_seed(0)
