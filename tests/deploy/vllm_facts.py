"""Asks the installed vLLM, in a process of its own: its registry of metrics and its parser are global.

Reads a JSON object from standard input, `model` and `commands` (lists of arguments), and prints another:
`metrics`, each sample's name with its labels and their values, and `commands`, each with its problem or null.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

from prometheus_client import Metric


def samples_of(metrics: list[Metric]) -> dict[str, dict[str, list[str]]]:
    """Each sample's name, with its labels and their values."""
    found: dict[str, dict[str, set[str]]] = {}
    for metric in metrics:
        for sample in metric.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return {
        name: {label: sorted(values) for label, values in labels.items()} for name, labels in found.items()
    }


def registered_metrics(model: str) -> dict[str, dict[str, list[str]]]:
    """What vLLM registers for a model served with the settings it has by default."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    PrometheusStatLogger(EngineArgs(model=model, max_model_len=4096).create_engine_config())
    return samples_of([m for m in get_prometheus_registry().collect() if m.name.startswith("vllm:")])


def problem_of(arguments: list[str]) -> str | None:
    """Why `vllm serve` would refuse these arguments before it looks at the model."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from hybridkv_vllm.config import HybridKVConfigError, parse_server_options

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            parsed: Any = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
            validate_parsed_serve_args(parsed)
    except SystemExit:
        return messages.getvalue().strip().splitlines()[-1]
    try:
        parse_server_options(parsed.additional_config.get("hybridkv"))
    except HybridKVConfigError as error:
        return str(error)
    return None


def main() -> None:
    """Answers the question on standard input."""
    from vllm.plugins import load_general_plugins

    question = json.load(sys.stdin)
    load_general_plugins()
    answer = {
        "metrics": registered_metrics(question["model"]),
        "commands": [problem_of(command) for command in question["commands"]],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
