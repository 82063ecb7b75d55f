"""`make setup` refuses what cannot work in one line, and does nothing twice."""

from __future__ import annotations

import importlib.util
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "setup_env.py"


@pytest.fixture
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(module: ModuleType) -> str:
    """The one line with which it ends."""
    with pytest.raises(SystemExit) as stop:
        module.check_machine()
    message = str(stop.value)
    assert message.startswith("hybridkv setup: ")
    assert "\n" not in message
    return message


def test_an_unsupported_python_names_the_supported_ones(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert "use 3.11 to 3.13" in refusal(setup_env)


def test_an_unsupported_platform_names_the_supported_one(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert "use Linux on x86_64" in refusal(setup_env)


def begin_set_up(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As `setup_env.py FOLDER` finds it on a machine without a GPU: an environment, and nothing in it."""
    monkeypatch.setattr(sys, "argv", ["setup_env.py", str(folder)])
    monkeypatch.setattr(setup_env, "has_gpu", lambda: False)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()


def test_a_finished_set_up_is_left_alone(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stamp holds what was installed; anything else installs again."""
    begin_set_up(setup_env, monkeypatch, tmp_path)
    installed: list[str] = []
    monkeypatch.setattr(setup_env.Environment, "install_cpu", lambda self: installed.append("cpu"))
    setup_env.main()
    setup_env.main()
    assert installed == ["cpu"]
    (tmp_path / ".hybridkv-setup").write_text("something older")
    setup_env.main()
    assert installed == ["cpu", "cpu"]


def test_two_set_ups_at_once_install_once(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begin_set_up(setup_env, monkeypatch, tmp_path)
    installed: list[str] = []

    def install(environment: object) -> None:
        installed.append("cpu")
        time.sleep(0.3)

    monkeypatch.setattr(setup_env.Environment, "install_cpu", install)
    with ThreadPoolExecutor(2) as shells:
        for shell in [shells.submit(setup_env.main) for _ in range(2)]:
            shell.result()
    assert installed == ["cpu"]


def test_the_harness_is_not_in_the_wheel() -> None:
    """It stands in for parts of a machine without a GPU, and must not reach one with."""
    import tomllib

    project = tomllib.loads((SCRIPT.parent.parent / "pyproject.toml").read_text())
    assert not [name for name in project["tool"]["setuptools"]["packages"] if "harness" in name]
