"""Manifests that a cluster would refuse, or whose parts do not find each other, must not land."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule
from deployment import (
    ALERTS,
    BUILDS,
    DEPLOY,
    DOCUMENT,
    GROUP_VARIABLES,
    ROOT,
    Object,
    Pod,
    arguments,
    build,
    gibibytes,
    of_kind,
    output,
    pods,
    prometheus_rule,
    settings,
    tool,
)
from pydantic import BaseModel

import hybridkv_vllm

# The oldest that knows a `sleep` before the stop, and the newest.
KUBERNETES_VERSIONS = ("1.30", kubernetes_validate.latest_version())
# Beside pool and /dev/shm: the processes, and the weights on their way to the GPU.
PROCESSES_GIB = 8
# In 16 bits.
WEIGHTS_GIB = {
    "Qwen/Qwen2.5-VL-7B-Instruct": 16,
    "Qwen/Qwen2.5-VL-32B-Instruct": 63,
    "Qwen/Qwen2.5-VL-72B-Instruct": 137,
}
# To pull an image of ten gigabytes.
IMAGE_SECONDS = 600


def check_model(model: type[BaseModel]) -> Callable[[Object], None]:
    """A check against a published CRD, of which this is the model; fields it does not know are refused."""

    def check(manifest: Object) -> None:
        parsed = model.model_validate(manifest)
        kept = parsed.model_dump(by_alias=True, exclude_unset=True, mode="json")
        assert kept == manifest, "fields that the CRD does not have"

    return check


def check_kubernetes(manifest: Object) -> None:
    """A check against the schemas of Kubernetes itself."""
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def check_leader_worker_set(manifest: Object) -> None:
    """No package has this CRD: its own fields are checked by name here, its pods by Kubernetes' schemas."""
    spec = manifest["spec"]
    group = spec["leaderWorkerTemplate"]
    assert set(spec) <= {
        "replicas",
        "leaderWorkerTemplate",
        "rolloutStrategy",
        "startupPolicy",
        "networkConfig",
    }
    assert set(group) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert group["restartPolicy"] in {"RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"}
    assert spec["replicas"] >= 1
    assert group["size"] >= 2
    for template in (group["leaderTemplate"], group["workerTemplate"]):
        # A pod template is checked as the pod that it makes.
        check_kubernetes({"apiVersion": "v1", "kind": "Pod", **template})


CHECKS: dict[tuple[str, str], Callable[[Object], None]] = {
    ("keda.sh/v1alpha1", "ScaledObject"): check_model(ScaledObject),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): check_leader_worker_set,
    ("monitoring.coreos.com/v1", "PodMonitor"): check_model(PodMonitor),
    ("monitoring.coreos.com/v1", "PrometheusRule"): check_model(PrometheusRule),
}


def check(manifest: Object) -> None:
    """Checks a manifest against its schema."""
    CHECKS.get((manifest["apiVersion"], manifest["kind"]), check_kubernetes)(manifest)


@pytest.mark.parametrize("name", BUILDS)
def test_schemas(name: str) -> None:
    for manifest in build(name):
        check(manifest)


@pytest.mark.parametrize("name", BUILDS)
def test_a_wrong_field_is_refused(name: str) -> None:
    for manifest in build(name):
        part = "data" if manifest["kind"] == "ConfigMap" else "spec"
        with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
            check({**manifest, part: {**manifest[part], "replicsa": 1}})


def test_alert_rules_for_the_operator() -> None:
    manifest = prometheus_rule()
    check(manifest)
    assert manifest["spec"] == yaml.safe_load(ALERTS.read_text())


def selected(name: str, selector: dict[str, str]) -> list[Pod]:
    """Pods with all these labels."""
    assert selector, "an empty selector takes every pod of the namespace"
    return [pod for pod in pods(name) if selector.items() <= pod.labels.items()]


@pytest.mark.parametrize("name", BUILDS)
def test_selectors_find_the_pods(name: str) -> None:
    every = [pod.labels for pod in pods(name)]
    for manifest in of_kind(name, "Deployment"):
        assert manifest["spec"]["selector"]["matchLabels"].items() <= every[0].items()
    for manifest in (*of_kind(name, "PodDisruptionBudget"), *of_kind(name, "PodMonitor")):
        assert [p.labels for p in selected(name, manifest["spec"]["selector"]["matchLabels"])] == every
    for manifest in of_kind(name, "NetworkPolicy"):
        assert [p.labels for p in selected(name, manifest["spec"]["podSelector"]["matchLabels"])] == every
    (service,) = of_kind(name, "Service")
    serving = [pod.labels for pod in pods(name) if "http" in pod.ports()]
    assert [pod.labels for pod in selected(name, service["spec"]["selector"])] == serving
    assert len(serving) == 1


@pytest.mark.parametrize("name", BUILDS)
def test_named_ports_exist(name: str) -> None:
    used = {port["targetPort"] for m in of_kind(name, "Service") for port in m["spec"]["ports"]}
    used |= {end["port"] for m in of_kind(name, "PodMonitor") for end in m["spec"]["podMetricsEndpoints"]}
    for manifest in of_kind(name, "NetworkPolicy"):
        used |= {port["port"] for rule in manifest["spec"]["ingress"] for port in rule.get("ports", [])}
    known = {port for pod in pods(name) for port in pod.ports()}
    assert used <= known
    for pod in pods(name):
        probes = [pod.server[probe] for probe in pod.server if probe.endswith("Probe")]
        assert {probe["httpGet"]["port"] for probe in probes} <= pod.ports()


@pytest.mark.parametrize("name", BUILDS)
def test_what_is_referred_to_exists(name: str) -> None:
    documented = re.findall(r"create secret generic (\S+) --from-literal=(\S+?)=", DOCUMENT.read_text())
    kinds = [(m["kind"], m["metadata"]["name"]) for m in build(name)]
    assert len(set(kinds)) == len(kinds)
    # LeaderWorkerSet makes a headless Service of its own name, unless there is one.
    services = {manifest["metadata"]["name"] for manifest in of_kind(name, "Service")}
    assert not services & {manifest["metadata"]["name"] for manifest in of_kind(name, "LeaderWorkerSet")}
    for manifest in of_kind(name, "ScaledObject"):
        assert ("Deployment", manifest["spec"]["scaleTargetRef"]["name"]) in kinds
    for pod in pods(name):
        volumes = {volume["name"] for volume in pod.spec["volumes"]}
        assert {mount["name"] for mount in pod.server["volumeMounts"]} == volumes
        for source in pod.server["envFrom"]:
            assert ("ConfigMap", source["configMapRef"]["name"]) in kinds
        for variable in pod.server["env"]:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference.get("optional") or (reference["name"], reference["key"]) in documented
        used = set(re.findall(r"\$\((\w+)\)", " ".join(pod.server["args"])))
        assert used - GROUP_VARIABLES == set(settings(name))
        assert not re.search(r"\$\(", " ".join(arguments(name, pod)))


@pytest.mark.parametrize("name", BUILDS)
def test_privileges(name: str) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    user = int(re.search(r"^USER (\d+)$", dockerfile, re.MULTILINE)[1])  # type: ignore[index]
    home = re.search(r"\bHOME=(\S+)", dockerfile)[1]  # type: ignore[index]
    for pod in pods(name):
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"]
        assert {security["runAsUser"], security["runAsGroup"], security["fsGroup"]} == {user}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        own = pod.server["securityContext"]
        assert own["readOnlyRootFilesystem"]
        assert not own["allowPrivilegeEscalation"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        writable = {mount["mountPath"] for mount in pod.server["volumeMounts"]}
        assert writable == {home, "/tmp", "/dev/shm"}


@pytest.mark.parametrize("name", BUILDS)
def test_memory_holds_the_host_pools(name: str) -> None:
    for pod in pods(name):
        ranks = int(pod.quantity("nvidia.com/gpu"))
        (shm,) = (v["emptyDir"] for v in pod.spec["volumes"] if v["name"] == "shm")
        assert shm["medium"] == "Memory"
        pools = ranks * float(settings(name)["HOST_POOL_GIB"])
        assert gibibytes(pod.quantity("memory")) >= pools + gibibytes(shm["sizeLimit"]) + PROCESSES_GIB
        requests = pod.server["resources"]["requests"]
        assert gibibytes(requests["ephemeral-storage"]) >= WEIGHTS_GIB[settings(name)["MODEL"]]
        for resource in ("memory", "nvidia.com/gpu"):
            assert requests[resource] == pod.quantity(resource)


@pytest.mark.parametrize("name", BUILDS)
def test_ranks_fill_the_gpus(name: str) -> None:
    values = settings(name)
    ranks = int(values["TENSOR_PARALLEL_SIZE"]) * int(values.get("PIPELINE_PARALLEL_SIZE", "1"))
    assert sum(int(pod.quantity("nvidia.com/gpu")) for pod in pods(name)) == ranks


@pytest.mark.parametrize("name", BUILDS)
def test_loading_and_stopping_have_time(name: str) -> None:
    for pod in pods(name):
        hook = pod.server["lifecycle"]["preStop"]["sleep"]["seconds"]
        draining = int(pod.option("shutdown-timeout"))
        assert pod.spec["terminationGracePeriodSeconds"] >= hook + draining + 15
        if "http" not in pod.ports():
            assert "--headless" in pod.server["args"]
            assert not any(key.endswith("Probe") for key in pod.server)
            continue
        startup, readiness, liveness = (
            pod.server[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")
        )
        assert {probe["httpGet"]["path"] for probe in (startup, readiness, liveness)} == {"/health"}
        loading = startup["periodSeconds"] * startup["failureThreshold"]
        assert loading >= (7200 if of_kind(name, "LeaderWorkerSet") else 1800)
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60
        for manifest in of_kind(name, "Deployment"):
            rollout = manifest["spec"]["progressDeadlineSeconds"]
            assert rollout >= loading + pod.spec["terminationGracePeriodSeconds"] + IMAGE_SECONDS


@pytest.mark.parametrize("name", BUILDS)
def test_image(name: str) -> None:
    assert {pod.server["image"] for pod in pods(name)} == {f"hybridkv-vllm:{hybridkv_vllm.__version__}"}


def test_the_documented_overlay(tmp_path: Path) -> None:
    """Image, namespace and model are the user's, in pods too."""
    (text,) = re.findall(
        r"^ {4}# my-hybridkv/kustomization.yaml\n((?: {4}.*\n)+)", DOCUMENT.read_text(), re.MULTILINE
    )
    (tmp_path / "hybridkv-vllm").symlink_to(ROOT)
    (tmp_path / "my-hybridkv").mkdir()
    (tmp_path / "my-hybridkv" / "kustomization.yaml").write_text(textwrap.dedent(text))
    built = list(yaml.safe_load_all(output(tool("kubectl"), "kustomize", str(tmp_path / "my-hybridkv"))))
    assert {manifest["metadata"]["namespace"] for manifest in built} == {"serving"}
    (deployment,) = (manifest for manifest in built if manifest["kind"] == "Deployment")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    assert server["image"] == f"registry.example.com/hybridkv-vllm:{hybridkv_vllm.__version__}"
    models = {manifest["data"].get("MODEL") for manifest in built if manifest["kind"] == "ConfigMap"}
    assert "Qwen/Qwen2.5-VL-3B-Instruct" in models


def test_budget_lets_a_node_drain() -> None:
    (budget,) = of_kind("base", "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert "minAvailable" not in budget["spec"]
