"""Where the small trained model lies that ships with this package."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """A folder that vLLM and Transformers load: a Qwen2.5-VL of 3 million parameters that reads dominoes."""
    return Path(__file__).parent / "model"
