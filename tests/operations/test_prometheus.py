"""What Prometheus asks the services, what it judges by, and what Grafana shows of it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import sqlalchemy as sa
import yaml
from conftest import Rig, until
from pipeline import pipeline
from prometheus_client.metrics import MetricWrapperBase

from sandbox.mailbox import Mailbox
from sandbox.processes import Process, free_port
from sandbox.registry import Registry
from services.catalogue import CORE
from shared import metrics

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deploy" / "observability"
KUBERNETES = ROOT / "deploy" / "kubernetes" / "base"
CONFIGURATION = yaml.safe_load((FILES / "prometheus.yml").read_text())
RULES = {rule["alert"]: rule for rule in yaml.safe_load((FILES / "rules.yml").read_text())["groups"][0]["rules"]}
UNIT_TESTS = yaml.safe_load((FILES / "rules_test.yml").read_text())["tests"]
DASHBOARD = json.loads((FILES / "grafana" / "fraud-alarm.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SHOWN = [target["expr"] for panel in PANELS for target in panel["targets"]]


def measured(alert: str) -> str:
    """What a rule compares with its limit: all rules are written as MEASURED OPERATOR LIMIT."""
    expression, operator, limit = RULES[alert]["expr"].rsplit(maxsplit=2)
    assert operator in ("<", ">", "==")
    float(limit)
    return str(expression)


@pytest.fixture
def programs() -> None:
    """Debian's package `prometheus`. Where it is not installed the tests are skipped, in CI failed."""
    if not shutil.which("promtool"):
        reason = "promtool is missing (Debian: prometheus)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=FILES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("programs")
def test_the_configuration_and_its_rules_are_valid() -> None:
    promtool("check", "config", "--lint-fatal", "prometheus.yml")


def test_in_kubernetes_the_documented_relabelling_names_the_jobs_as_the_rules_do() -> None:
    (text,) = re.findall(r"```yaml\n(scrape_configs:.+?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    [scrape] = yaml.safe_load(text)["scrape_configs"]
    patch = yaml.safe_load((KUBERNETES / "patches" / "service.yaml").read_text())

    def job(manifest: Path) -> str:
        (pods,) = (each for each in yaml.safe_load_all(manifest.read_text()) if each["kind"] == "StatefulSet")
        own, common = (each["spec"]["template"]["metadata"]["labels"] for each in (pods, patch))
        labels = {
            f"__meta_kubernetes_pod_label_{re.sub('[^a-z]', '_', key)}": each for key, each in (own | common).items()
        }
        for rule in scrape["relabel_configs"]:
            [source] = rule["source_labels"]
            fits = re.fullmatch(rule.get("regex", "(.*)"), labels[source])
            assert fits or rule.get("action") != "keep"
            if fits and "target_label" in rule:
                labels[rule["target_label"]] = rule.get("replacement", labels[source])
        return str(labels["job"])

    assert {job(KUBERNETES / f"{name.replace('_', '-')}.yaml") for name in CORE} == set(CORE)


@pytest.mark.usefixtures("programs")
def test_each_alert_fires_for_what_it_is_about_and_is_silent_while_all_is_well() -> None:
    promtool("test", "rules", "rules_test.yml")

    tried = [(test["name"], each) for test in UNIT_TESTS for each in test["alert_rule_test"]]
    assert {each["alertname"] for _, each in tried if each.get("exp_alerts")} == RULES.keys()
    assert {each["alertname"] for name, each in tried if name == "All is well"} == RULES.keys()


def test_every_alert_says_how_urgent_it_is_and_where_to_read_on() -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text()
    headings = re.findall(r"^#+ (.+)$", runbook, re.MULTILINE)
    places = {f"docs/operations.md#{re.sub(r'[^a-z0-9 -]', '', each.lower()).replace(' ', '-')}" for each in headings}

    assert {rule["labels"]["severity"] for rule in RULES.values()} == {"critical", "warning"}
    assert all(rule["annotations"]["summary"] for rule in RULES.values())
    assert {rule["annotations"]["runbook"] for rule in RULES.values()} <= places


def test_rules_and_dashboard_ask_for_what_is_declared_and_nothing_declared_is_left_out() -> None:
    declared = {
        family.name: family.type
        for each in vars(metrics).values()
        if isinstance(each, MetricWrapperBase)
        for family in each.describe()
    }
    series = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    names = {name + suffix: name for name, kind in declared.items() for suffix in series[kind]}
    asked = {name for text in [*map(measured, RULES), *SHOWN] for name in re.findall(r"\bfraud_alarm_\w+", text)}

    assert asked <= names.keys()
    assert {names[name] for text in SHOWN for name in re.findall(r"\bfraud_alarm_\w+", text)} == declared.keys()


def test_compose_brings_the_files_to_where_they_are_looked_for() -> None:
    containers = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    places = {}
    for name in "prometheus", "grafana":
        for volume in containers[name]["volumes"]:
            source, target, *_ = volume.split(":")
            places[ROOT / source] = target
        assert containers[name]["profiles"] == ["observability"]
        assert all(port.startswith("127.0.0.1:") for port in containers[name]["ports"])
    grafana = FILES / "grafana"
    [provider] = yaml.safe_load((grafana / "dashboards.yml").read_text())["providers"]
    [source] = yaml.safe_load((grafana / "datasources.yml").read_text())["datasources"]
    dashboard = places[grafana / "fraud-alarm.json"]

    assert {path for path in FILES.rglob("*.*") if path.is_file()} - places.keys() == {FILES / "rules_test.yml"}
    assert Path(places[FILES / "rules.yml"]).parent == Path(places[FILES / "prometheus.yml"]).parent
    assert provider["options"]["path"] == str(Path(dashboard).parent)
    assert containers["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    assert urlsplit(source["url"]).hostname in containers
    assert source["jsonData"]["timeInterval"].startswith(CONFIGURATION["global"]["scrape_interval"])


class Prometheus(Process):
    """A Prometheus on 127.0.0.1, with the project's own configuration but for addresses and pace."""

    def __init__(self, directory: Path, ports: dict[str, int]) -> None:
        [scrape] = CONFIGURATION["scrape_configs"]
        here = [{"targets": [f"127.0.0.1:{port}"], "labels": {"__meta_dns_name": name}} for name, port in ports.items()]
        named = {key: value for key, value in scrape.items() if key != "dns_sd_configs"} | {"static_configs": here}
        own = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(FILES / name) for name in CONFIGURATION["rule_files"]],
            "scrape_configs": [named],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(own))
        self._url = f"http://127.0.0.1:{free_port()}"
        super().__init__(
            "prometheus",
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'prometheus'}",
                f"--web.listen-address={urlsplit(self._url).netloc}",
            ],
            log=directory / "prometheus.log",
            ready=self._is_ready,
        )

    def ask(self, path: str, **parameters: str) -> Any:
        """What its HTTP API answers."""
        answer = requests.get(f"{self._url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        """The series that an expression has now."""
        return list(self.ask("query", query=expression)["result"])

    def states(self) -> dict[str, str]:
        """Of the alerts: inactive, pending or firing; why not, if a rule cannot be evaluated."""
        [group] = self.ask("rules")["groups"]
        return {rule["name"]: rule["state"] if rule["health"] == "ok" else rule["health"] for rule in group["rules"]}

    def _is_ready(self) -> bool:
        try:
            return requests.get(f"{self._url}/-/ready", timeout=5).ok
        except requests.RequestException:
            return False


@pytest.mark.kafka
@pytest.mark.usefixtures("programs")
@pytest.mark.timeout(300)
def test_a_real_prometheus_finds_data_for_every_rule_and_panel_and_no_alert_on_a_healthy_pipeline(
    apache_rig: Rig, engine: sa.Engine, registry: Registry, mailbox: Mailbox
) -> None:
    with (
        pipeline(apache_rig, engine=engine, registry=registry, mailbox=mailbox) as running,
        Prometheus(apache_rig.directory, running.ports) as prometheus,
    ):
        until(lambda: len(prometheus.query("up == 1")) == len(CORE), what="a scrape of every service")
        running.stream(3000)

        for text in [*map(measured, RULES), *(text.replace("$__rate_interval", "1m") for text in SHOWN)]:
            until(lambda text=text: prometheus.query(text), what=f"data for {text}")
        for name in RULES:
            until(lambda name=name: prometheus.states()[name] == "inactive", what=f"{name} inactive")

        assert {each["metric"]["job"] for each in prometheus.query("up")} == set(CORE)
        running.services["db_sink"].stop()
        until(lambda: prometheus.states()["ServiceDown"] == "pending", what="the alert of what is then wrong")
