"""Reads what `deploy/` holds the way its users' tools read it: rendered by kustomize and Docker Compose."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Object = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "hybridkv.json"
DOCUMENT = ROOT / "docs" / "deploy.md"

BUILDS = ["base", *sorted(f"overlays/{path.name}" for path in (KUBERNETES / "overlays").iterdir())]
# Flags that belong to the image's entry point.
ENTRYPOINT = ("--attention-backend", "hybridkv")
# What LeaderWorkerSet sets in each pod.
GROUP_VARIABLES = {"LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}


def tool(name: str) -> str:
    """A program that a package of the `dev` extra has brought; never one of the machine's own."""
    return str(Path(sys.executable).parent / name)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a program, with these environment variables beside its own."""
    environment = os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def output(*command: str, **variables: str) -> str:
    """What a program prints; its complaint is the failure's text."""
    result = run(*command, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


@functools.cache
def build(name: str) -> tuple[Object, ...]:
    """The manifests of the base or an overlay, as `kubectl apply -k` would send them."""
    return tuple(yaml.safe_load_all(output(tool("kubectl"), "kustomize", str(KUBERNETES / name))))


def of_kind(name: str, kind: str) -> list[Object]:
    """A build's manifests of one kind."""
    return [manifest for manifest in build(name) if manifest["kind"] == kind]


def prometheus_rule() -> Object:
    """The alert rules as the script writes them for the Prometheus operator."""
    manifest: Object = yaml.safe_load(output(str(KUBERNETES / "monitoring" / "prometheus-rule.sh")))
    return manifest


class Pod:
    """One pod of a build.

    Attributes:
        labels: the pod's labels, with those that LeaderWorkerSet adds.
        template: as in the manifest.
        spec: its `spec`.
        server: its only container.
    """

    def __init__(self, template: Object, added_labels: dict[str, str]) -> None:
        self.template = template
        self.labels: dict[str, str] = template["metadata"]["labels"] | added_labels
        self.spec: Object = template["spec"]
        (self.server,) = self.spec["containers"]

    def ports(self) -> set[str]:
        """Names of the container's ports."""
        return {port["name"] for port in self.server.get("ports", [])}

    def quantity(self, resource: str) -> str:
        """A resource's limit."""
        limit: str = self.server["resources"]["limits"][resource]
        return limit

    def option(self, name: str) -> str:
        """The value of the server's option `--name=VALUE`, as written."""
        found = [arg.split("=", 1)[1] for arg in self.server["args"] if arg.startswith(f"--{name}=")]
        (value,) = map(str, found)
        return value


def pods(name: str) -> list[Pod]:
    """Every pod that one replica (a Deployment's or a group's) consists of."""
    found = [Pod(manifest["spec"]["template"], {}) for manifest in of_kind(name, "Deployment")]
    for manifest in of_kind(name, "LeaderWorkerSet"):
        group = manifest["spec"]["leaderWorkerTemplate"]
        for index in range(group["size"]):
            template = group["workerTemplate" if index else "leaderTemplate"]
            found.append(Pod(template, {"leaderworkerset.sigs.k8s.io/worker-index": str(index)}))
    return found


def settings(name: str) -> dict[str, str]:
    """What the pods' ConfigMap sets."""
    names = {source["configMapRef"]["name"] for pod in pods(name) for source in pod.server["envFrom"]}
    (data,) = (
        manifest["data"] for manifest in of_kind(name, "ConfigMap") if manifest["metadata"]["name"] in names
    )
    return dict(data)


def arguments(name: str, pod: Pod) -> list[str]:
    """The server's arguments with variables put in as Kubernetes does; unknown ones stay as they are."""
    (size,) = {len(pods(name))}
    index = pod.labels.get("leaderworkerset.sigs.k8s.io/worker-index", "0")
    group = {"LWS_GROUP_SIZE": str(size), "LWS_WORKER_INDEX": index, "LWS_LEADER_ADDRESS": "leader.group"}
    values = settings(name) | (group if of_kind(name, "LeaderWorkerSet") else {})
    return [re.sub(r"\$\((\w+)\)", lambda m: values.get(m[1], m[0]), text) for text in pod.server["args"]]


# Without an .env file that lies beside it by chance.
COMPOSE = (
    tool("docker-compose"),
    "--env-file",
    os.devnull,
    "-f",
    str(DEPLOY / "docker-compose.yml"),
    "config",
)


@functools.cache
def compose() -> Object:
    """The Compose file, completed by Docker Compose."""
    text = output(*COMPOSE, "--format", "json", VLLM_API_KEY="key", GRAFANA_PASSWORD="password")
    project: Object = json.loads(text)
    return project


def panels() -> list[Object]:
    """The dashboard's panels."""
    found: list[Object] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def rules() -> list[Object]:
    """All alert rules."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, with where it stands; Grafana's variables have a value."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], with_values(target["expr"])
    for name in BUILDS:
        for manifest in of_kind(name, "ScaledObject"):
            for trigger in manifest["spec"]["triggers"]:
                yield f"{name}: {trigger['name']}", trigger["metadata"]["query"]


def with_values(expression: str) -> str:
    """A dashboard's expression, with a value for each variable."""
    for variable, value in (("$__rate_interval", "5m"), ("$job", "hybridkv-vllm"), ("$instance", ".*")):
        expression = expression.replace(variable, value)
    return expression


def gibibytes(quantity: str) -> float:
    """A Kubernetes quantity of memory."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) / (1024 if unit == "Mi" else 1)


class Facts(NamedTuple):
    """What vLLM says.

    Attributes:
        metrics: each sample's labels and their values.
        problems: for each command, by where it stands, why it would be refused, or None.
    """

    metrics: dict[str, dict[str, list[str]]]
    problems: dict[str, str | None]


def commands() -> dict[str, list[str]]:
    """The arguments of every server in manifests, Compose file and document, by where they stand."""
    found = {"docker-compose.yml": [*ENTRYPOINT, *compose()["services"]["server"]["command"]]}
    for name in BUILDS:
        for index, pod in enumerate(pods(name)):
            found[f"{name} {index}"] = [*ENTRYPOINT, *arguments(name, pod)]
    text = DOCUMENT.read_text().replace("\\\n", " ")
    for index, line in enumerate(re.findall(r"^ {4}vllm serve (.+)$", text, re.MULTILINE)):
        found[f"docs/deploy.md, command {index + 1}"] = shlex.split(line, comments=True)
    return found
