"""`make setup` refuses what cannot work in one line, and does nothing twice."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
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
    for name in ("python", "pip"):
        (folder / "bin" / name).touch()


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


def test_what_an_interrupted_set_up_left_is_completed(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As after Ctrl-C, or where Debian's package for `venv` was missing: a Python, and no pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "half"], check=True)
    monkeypatch.setattr(sys, "argv", ["setup_env.py", str(tmp_path / "half")])
    monkeypatch.setattr(setup_env, "has_gpu", lambda: False)
    monkeypatch.setattr(setup_env.Environment, "install_cpu", lambda self: None)
    setup_env.main()
    subprocess.run([tmp_path / "half" / "bin" / "python", "-m", "pip", "--version"], check=True)


def test_what_keeps_it_from_starting_is_one_line(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(environment: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, "has_gpu", lambda: False)
    monkeypatch.setattr(setup_env.Environment, "install_cpu", stopped)
    (tmp_path / "file").touch()
    begin_set_up(setup_env, monkeypatch, tmp_path)
    for folder, says in (
        ("file", "remove that folder"),
        ("file/new", "VENV=FOLDER"),
        (".", "stopped; run it"),
    ):
        monkeypatch.setattr(sys, "argv", ["setup_env.py", str(tmp_path / folder)])
        with pytest.raises(SystemExit, match=f"^hybridkv setup: .*{says}"):
            setup_env.main()


def test_the_folder_may_be_in_one_that_is_missing(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["setup_env.py", str(tmp_path / "of mine" / "environment")])
    monkeypatch.setattr(setup_env, "has_gpu", lambda: False)
    monkeypatch.setattr(setup_env.Environment, "create", lambda self: self.folder.mkdir())
    monkeypatch.setattr(setup_env.Environment, "install_cpu", lambda self: None)
    setup_env.main()
    assert (tmp_path / "of mine" / "environment" / ".hybridkv-setup").is_file()


def test_spaces_in_the_folders_name_stay_in_it() -> None:
    """`make clean` would remove another folder, named by the first word."""
    for target, command in (("setup", 'tools/setup_env.py "of mine"'), ("clean", 'rm -rf "of mine" build')):
        made = subprocess.run(
            ["make", "-n", target, "VENV=of mine"],
            cwd=SCRIPT.parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert command in made.stdout


def test_an_environment_of_the_other_kind_is_left_alone(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To pip the harness is vLLM: nothing would be installed for the GPU."""
    begin_set_up(setup_env, monkeypatch, tmp_path)
    monkeypatch.setattr(setup_env.Environment, "install_cpu", lambda self: None)
    monkeypatch.setattr(setup_env.Environment, "install_gpu", lambda self: pytest.fail("it installed"))
    setup_env.main()
    monkeypatch.setattr(setup_env, "has_gpu", lambda: True)
    with pytest.raises(SystemExit, match="is of a machine without a GPU; remove it, or name another folder"):
        setup_env.main()


def test_the_harness_is_not_in_the_wheel() -> None:
    """It stands in for parts of a machine without a GPU, and must not reach one with."""
    import tomllib

    project = tomllib.loads((SCRIPT.parent.parent / "pyproject.toml").read_text())
    assert not [name for name in project["tool"]["setuptools"]["packages"] if "harness" in name]
