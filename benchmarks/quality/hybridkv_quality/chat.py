"""A sample as an OpenAI chat: for an engine in this process, or over HTTP."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

from PIL import Image

from hybridkv_quality.sample import Sample


def engine_chat(sample: Sample) -> list[dict[str, Any]]:
    """What `vllm.LLM.chat` takes; pictures stay objects."""
    return _chat(sample, lambda picture: {"type": "image_pil", "image_pil": picture})


def http_chat(sample: Sample) -> list[dict[str, Any]]:
    """What any OpenAI-compatible server takes; pictures are PNG data URLs."""
    return _chat(sample, lambda picture: {"type": "image_url", "image_url": {"url": data_url(picture)}})


def data_url(picture: Image.Image) -> str:
    """The picture as PNG, without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _chat(sample: Sample, show: Callable[[Image.Image], dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for message in sample.messages:
        if all(isinstance(part, str) for part in message.parts):
            # Answers of earlier turns are plain strings in OpenAI's own clients.
            messages.append({"role": message.role, "content": "".join(map(str, message.parts))})
            continue
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else show(part) for part in message.parts
        ]
        messages.append({"role": message.role, "content": parts})
    return messages
