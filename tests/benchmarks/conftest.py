"""Lets the tests import what lies beside `benchmarks/kernels.py`, and runs Triton's kernels without a GPU."""

import os
import sys
from pathlib import Path

import torch

# Triton reads this when a kernel is defined, so it comes before any import of the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
