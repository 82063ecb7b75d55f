"""What the deployment is held against: the installed vLLM's metrics and options, and the plugin's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deployment
import pytest
import yaml
from vllm_facts import samples_of

from hybridkv_vllm.observe.metrics import EngineMetrics, LiveCollector, MetricsWriter, WorkerMetrics


@pytest.fixture(scope="session")
def facts(tiny_model: Path) -> deployment.Facts:
    """vLLM's answer, asked once."""
    asked = deployment.commands()
    question = {"model": str(tiny_model), "commands": list(asked.values())}
    script = Path(__file__).with_name("vllm_facts.py")
    environment = os.environ | {"VLLM_PLUGINS": "hybridkv", "VLLM_LOGGING_LEVEL": "ERROR"}
    result = subprocess.run(
        [sys.executable, script],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return deployment.Facts(answer["metrics"], dict(zip(asked, answer["commands"], strict=True)))


@pytest.fixture(scope="session")
def series(facts: deployment.Facts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Labels of every series that a server's /metrics shows, by name, and of what Prometheus adds itself."""
    directory = str(tmp_path_factory.mktemp("metrics"))
    writer = MetricsWriter(directory)
    worker = WorkerMetrics(writer, num_ranks=1, tp_rank=0)
    EngineMetrics(writer).fallback("reason")
    worker.compressed(kept_per_head=1.0, num_static=1, num_dynamic=1, seconds=0.1)
    ours = samples_of(list(LiveCollector(directory).collect()))
    return {name: set(labels) for name, labels in (facts.metrics | ours).items()} | {"up": set()}


@pytest.fixture(scope="session")
def scrape_job() -> str:
    """The job's name in Prometheus."""
    config = yaml.safe_load((deployment.DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    name: str = job["job_name"]
    return name
