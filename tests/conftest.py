"""Shared by all tests: the environment that engines and kernels need, and one small model."""

from __future__ import annotations

import os

# Before vLLM or Triton is imported anywhere.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# On a GPU vLLM's Triton kernels round float32 to 10 bits otherwise: far more than answers may differ by.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL with random weights; the same bytes in every run."""
    from hybridkv_vllm.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny-qwen2.5-vl", seed=0)
