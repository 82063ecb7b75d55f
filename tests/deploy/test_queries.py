"""A dashboard or an alert on a metric that does not exist says that all is well: every query is checked."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any

import promql_parser
import pytest
import yaml
from deployment import (
    ALERTS,
    DASHBOARD,
    DEPLOY,
    DOCUMENT,
    ROOT,
    Facts,
    compose,
    panels,
    queries,
    rules,
    with_values,
)

QUERIES = list(queries())
# What Prometheus itself puts on every series that it scrapes here.
TARGET_LABELS = {"job", "instance"}
TEMPLATE = re.compile(
    r"\{\{ \$(?:value|labels\.(\w+))(?: \| (?:humanize|humanizePercentage|humanizeDuration))? \}\}"
)
REASONS = re.compile(r"[a-z_]+")


def nodes(expression: str, kind: type) -> list[Any]:
    """An expression's parts of one kind; parsing also checks PromQL's types."""
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(expression), found.append)
    return [node for node in found if isinstance(node, kind)]


def selectors(expression: str) -> list[Any]:
    """What the expression reads."""
    return nodes(expression, promql_parser.VectorSelector)


@pytest.mark.parametrize(("place", "expression"), QUERIES, ids=[place for place, _ in QUERIES])
def test_query(place: str, expression: str, series: dict[str, set[str]], scrape_job: str) -> None:
    read = selectors(expression)
    assert read
    known = set(TARGET_LABELS)
    for selector in read:
        assert selector.name in series, f"{place}: the server has no {selector.name}"
        labels = series[selector.name] | TARGET_LABELS
        matchers = {matcher.name: matcher for matcher in selector.matchers.matchers}
        assert set(matchers) <= labels
        assert matchers["job"].value == scrape_job
        known |= labels
    for aggregate in nodes(expression, promql_parser.AggregateExpr):
        assert set(aggregate.modifier.labels if aggregate.modifier else ()) <= known
    for binary in nodes(expression, promql_parser.BinaryExpr):
        matching = binary.modifier.matching if binary.modifier else None
        assert set(matching.labels if matching else ()) <= known


def test_values_of_labels(facts: Facts) -> None:
    """Reasons and heads' types that no code counts, or buckets that vLLM does not have, match nothing."""
    code = "\n".join(path.read_text() for path in (ROOT / "hybridkv_vllm").rglob("*.py"))
    checked = set()
    for _, expression in QUERIES:
        for selector in selectors(expression):
            for matcher in selector.matchers.matchers:
                checked.add(matcher.name)
                if matcher.name in {"reason", "type"}:
                    assert all(f'"{value}"' in code for value in REASONS.findall(matcher.value))
                if matcher.name == "le":
                    assert matcher.value in facts.metrics[selector.name]["le"]
    assert checked == {"job", "instance", "reason", "type", "le"}


def headings() -> set[str]:
    """The anchors of the document's headings."""
    titles = re.findall(r"^#+ (.+)$", DOCUMENT.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_rule_fields() -> None:
    document = yaml.safe_load(ALERTS.read_text())
    assert set(document) == {"groups"}
    for group in document["groups"]:
        assert set(group) == {"name", "rules"}
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"HybridKV[A-Za-z]+", rule["alert"])
        assert promql_parser.parse_duration(rule["for"]) >= timedelta(minutes=5)
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"].keys() == {"summary", "runbook_url"}


@pytest.mark.parametrize("rule", rules(), ids=[rule["alert"] for rule in rules()])
def test_runbook(rule: dict[str, Any]) -> None:
    path, anchor = rule["annotations"]["runbook_url"].split("#")
    assert ROOT / path == DOCUMENT
    assert anchor == rule["alert"].lower()
    assert anchor in headings()


@pytest.mark.parametrize("rule", rules(), ids=[rule["alert"] for rule in rules()])
def test_summary_uses_labels_of_the_result(rule: dict[str, Any]) -> None:
    summary = rule["annotations"]["summary"]
    assert not re.search(r"[{}]", TEMPLATE.sub("", summary))
    kept = set(TARGET_LABELS)
    for aggregate in nodes(rule["expr"], promql_parser.AggregateExpr):
        kept |= set(aggregate.modifier.labels)
    used = {label for label in TEMPLATE.findall(summary) if label}
    assert used <= kept
    # Where nothing is scraped there is no instance.
    assert "job" in used or "absent(" not in rule["expr"]


def test_every_runbook_has_its_alert() -> None:
    runbooks = {anchor for anchor in headings() if anchor.startswith("hybridkv")}
    assert runbooks == {rule["alert"].lower() for rule in rules()}


def test_dashboard() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert len({panel["id"] for panel in panels()}) == len(panels())
    assert variables["datasource"]["type"] == "datasource"
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["targets"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= set(variables)


def test_dashboard_variables(series: dict[str, set[str]]) -> None:
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] != "query":
            continue
        expression, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        (selector,) = selectors(with_values(expression))
        assert label in series[selector.name] | TARGET_LABELS


def test_dashboard_shows_every_metric(series: dict[str, set[str]]) -> None:
    """A new metric of the plugin has to be put somewhere."""
    read = [s.name for panel in panels() for t in panel["targets"] for s in selectors(with_values(t["expr"]))]
    ours = {name for name in series if name.startswith("hybridkv_")}
    assert ours
    assert {family(name) for name in ours} <= {family(name) for name in read}


def family(name: str) -> str:
    """A sample's metric, by the name of a histogram for its parts."""
    return re.sub("_(bucket|sum|count)$", "", name)


def test_provisioning() -> None:
    """Prometheus finds server and rules, Grafana finds Prometheus and the dashboard."""
    services = compose()["services"]
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for file in config["rule_files"]:
        assert (DEPLOY / "prometheus" / file).is_file()
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert target.split(":")[0] in services
    assert int(target.split(":")[1]) == services["server"]["ports"][0]["target"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "hybridkv.yml").read_text())["providers"]
    targets = {volume["target"] for volume in services["grafana"]["volumes"]}
    assert f"{provider['options']['path']}/{DASHBOARD.name}" in targets
