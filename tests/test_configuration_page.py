"""docs/configuration.md is what its generator writes, and leaves nothing out."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hybridkv_vllm.config import RequestOptions, ServerOptions, parse_request_options, parse_server_options

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "configuration_page", ROOT / "tools" / "configuration_page.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variables_read(folder: Path) -> Iterator[str]:
    """Names of environment variables that code below a folder looks up."""
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            name: Any = None
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                name = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                name = node.slice
            if name is not None:
                yield name.value if isinstance(name, ast.Constant) else constants[name.id]


def test_the_page_is_up_to_date(generator: ModuleType) -> None:
    assert generator.PAGE.read_text() == generator.page(), "run python tools/configuration_page.py"


def test_every_option_and_variable_is_there(generator: ModuleType) -> None:
    page = generator.page()
    for name in (*ServerOptions.model_fields, *RequestOptions.model_fields):
        assert f"### `{name}`\n" in page
    read = {name for folder in ("hybridkv_vllm", "kernels") for name in variables_read(ROOT / folder)}
    assert "HYBRIDKV_METRICS_DIR" in read
    assert read == set(generator.ENVIRONMENT)


def test_every_example_is_a_value_that_the_option_takes(generator: ModuleType) -> None:
    for name, schema in generator.options(ServerOptions).items():
        parse_server_options({name: generator.example(schema)})
    for name, schema in generator.options(RequestOptions).items():
        parse_request_options({name: generator.example(schema)})


def test_values_are_said_as_they_are_checked(generator: ModuleType) -> None:
    schemas = generator.options(ServerOptions)
    assert generator.values(schemas["budget"]) == "number, above 0, at most 1; by default `0.1`"
    assert generator.values(schemas["window"]) == "whole number, at least 2, at most 256; by default `64`"
    assert generator.values(schemas["dynamic_tier"]) == "one of `host`, `gpu`, `off`; by default `host`"
    assert generator.values(schemas["profile"]) == "file; by default not set"
