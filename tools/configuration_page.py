"""Writes docs/configuration.md from the option models, so that the page says what the server checks.

Run `python tools/configuration_page.py` after a change of `hybridkv_vllm/config.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hybridkv_vllm.config import RequestOptions, ServerOptions
from hybridkv_vllm.policies import POLICIES
from hybridkv_vllm.startup import FOR_RECALL

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
FLAG = "--additional-config.hybridkv."
# What a schema calls a type, in words.
TYPES = {
    "number": "number",
    "integer": "whole number",
    "boolean": "true or false",
    "path": "file",
}
LIMITS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_PLUGINS": "vLLM's allow-list of plugins, with commas. Unset, `hybridkv` is loaded and the HTTP "
    "routes are off; `hybridkv,hybridkv_api` switches them on.",
    "VLLM_USE_V2_MODEL_RUNNER": "vLLM's. `0` chooses Model Runner V1, with which HybridKV does not start.",
    "VLLM_API_KEY": "vLLM's. The HTTP routes that tell figures ask for the same key.",
    "HYBRIDKV_METRICS_DIR": "Folder of the metrics files, made if it is missing. Unset, the server makes a "
    "temporary one, and sets the variable for its own processes. Two servers must not share one.",
    "HYBRIDKV_OVERLAP": "`0` launches a layer's kernels one after the other. Unset, they overlap on NVIDIA "
    "GPUs from Hopper on.",
    "PROMETHEUS_MULTIPROC_DIR": "vLLM sets it where several API servers share their metrics; HybridKV's then "
    "lie there too.",
    "TRITON_INTERPRET": "Triton's. `1` runs kernels without a GPU, slowly; `make setup` does so on such a "
    "machine.",
}

HEAD = """\
# Configuration

Written by `python tools/configuration_page.py`; do not edit.

## Options of the server

They take effect with `--attention-backend hybridkv`. Each is given as it stands below, or several together as
JSON:

    --additional-config '{"hybridkv": {"budget": 0.2, "window": 32}}'

An unknown name or a value out of range stops the server with one line that says what would be right. More on
budget, tiers and host memory: [operations.md](operations.md); on policies:
[adding-a-policy.md](adding-a-policy.md); on what classifiers and landmarks are: [algorithm.md](algorithm.md).
"""
REQUESTS = """\
## Options of a request

In the OpenAI body, under `vllm_xargs`. A bad one is HTTP 400, and the server goes on.
vLLM drops `vllm_xargs` where `use_beam_search` is on: the server's options hold there.

<!-- not run: needs a server with MODEL; tests/server/test_http.py sends such requests -->

    curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '
"""
OFFLINE = """\
## Without a server

<!-- not run: needs a GPU -->

    from vllm import LLM, SamplingParams

    llm = LLM("MODEL", attention_backend="hybridkv", additional_config={"hybridkv": {"budget": 0.1}})
    outputs = llm.chat(messages, SamplingParams(extra_args={"hybridkv_budget": 0.2, "hybridkv_report": True}))
    outputs[0].kv_transfer_params["hybridkv"]          # what became of the prompt
"""
VARIABLES = """\
## Environment variables

| name | meaning |
|---|---|
"""


def options(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Each option's schema, without the `null` of optional ones."""
    found = {}
    for name, schema in model.model_json_schema()["properties"].items():
        (kind,) = [part for part in schema.get("anyOf", [{}]) if part.get("type") != "null"]
        found[name] = {**schema, **kind}
    found.get("policy", {})["enum"] = sorted(POLICIES)
    return found


def values(schema: Mapping[str, Any]) -> str:
    """What an option may be, and what it is by default."""
    if "enum" in schema:
        allowed = "one of " + ", ".join(f"`{choice}`" for choice in schema["enum"])
    else:
        allowed = TYPES[schema.get("format", schema["type"])]
        limits = [f"{word} {schema[name]:,}" for name, word in LIMITS.items() if name in schema]
        allowed = ", ".join([allowed, *limits])
    default = schema["default"]
    return f"{allowed}; by default {'not set' if default is None else f'`{shown(default)}`'}"


def shown(value: Any) -> str:
    """A value as it is written on a command line or in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def example(schema: Mapping[str, Any]) -> str:
    """Some value that the option takes: its default, where that is one."""
    if schema["default"] is not None:
        return shown(schema["default"])
    return "FILE" if schema["type"] == "string" else f"{schema.get('maximum', 16):g}"


def sections() -> Iterator[str]:
    """The page's parts."""
    yield HEAD
    for name, schema in options(ServerOptions).items():
        yield f"### `{name}`\n\n    {FLAG}{name} {example(schema)}\n"
        idle = " Does nothing where no head recalls chunks." if name in FOR_RECALL else ""
        yield f"{schema['description']}{idle}\n\nValue: {values(schema)}.\n"
    body = {
        "model": "MODEL",
        "messages": [{"role": "user", "content": "Hello"}],
        "vllm_xargs": {"hybridkv_budget": 0.2, "hybridkv_enabled": True},
    }
    lines = json.dumps(body, indent=2).replace("\n", "\n    ")
    yield f"{REQUESTS}    {lines}'\n"
    for name, schema in options(RequestOptions).items():
        yield f"### `{name}`\n\n{schema['description']}\n\nValue: {values(schema)}.\n"
    yield OFFLINE
    yield VARIABLES + "".join(f"| `{name}` | {meaning} |\n" for name, meaning in ENVIRONMENT.items())


def page() -> str:
    """The whole page."""
    return "\n".join(sections())


if __name__ == "__main__":
    PAGE.write_text(page())
