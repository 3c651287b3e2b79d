"""services/catalogue.py lists the services; whatever else lists them says the same."""

import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.catalogue import BY_NAME, CORE, SERVICES, Service, readers
from shared.settings import ServiceSettings

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTAINERS: dict[str, Any] = {
    name: each
    for name, each in COMPOSE["services"].items()
    if isinstance(command := each.get("command"), list) and str(command[-1]).startswith("services.")
}


def test_every_package_of_a_service_is_listed_and_every_listed_one_has_its_files() -> None:
    assert {path.parent.name for path in (ROOT / "services").glob("*/__main__.py")} == BY_NAME.keys()
    for service in SERVICES:
        assert service.settings.__module__ == f"services.{service.name}.settings"
        assert (ROOT / f"services/{service.name}/__init__.py").exists()


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_compose_builds_and_starts_each_service(service: Service) -> None:
    container = CONTAINERS[service.name]
    arguments = container["build"]["args"]

    assert container["command"] == ["python", "-m", service.module]
    assert arguments["SERVICE"] == service.name
    assert arguments.get("REQUIREMENTS") == (None if service.extras else "base")


def test_compose_starts_no_other_service_and_the_flow_without_a_profile() -> None:
    assert CONTAINERS.keys() == BY_NAME.keys()
    assert {name for name, each in CONTAINERS.items() if "profiles" not in each} >= set(CORE)


def test_the_cloud_override_covers_the_flow() -> None:
    override = yaml.safe_load((ROOT / "docker-compose.cloud.yml").read_text())
    assert set(CORE) <= override["services"].keys()


def test_kubernetes_runs_the_flow_and_nothing_unknown() -> None:
    manifests = [
        each
        for path in (ROOT / "deploy/kubernetes/base").glob("*.yaml")
        for each in yaml.safe_load_all(path.read_text())
        if each and each["kind"] in ("Deployment", "StatefulSet")
    ]
    modules = {
        container["command"][-1]
        for each in manifests
        for container in each["spec"]["template"]["spec"]["containers"]
        if str((container.get("command") or [""])[-1]).startswith("services.")
    }
    assert {BY_NAME[name].module for name in CORE} <= modules <= {each.module for each in SERVICES}


def test_prometheus_scrapes_every_service_at_its_port() -> None:
    scraped = yaml.safe_load((ROOT / "deploy/observability/prometheus.yml").read_text())["scrape_configs"]
    [found] = [each for scrape in scraped for each in scrape.get("dns_sd_configs", ())]

    assert found["names"] == [*BY_NAME]
    assert found["port"] == ServiceSettings.model_fields["metrics_port"].default


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_the_extras_of_an_image_exist_and_are_locked(service: Service) -> None:
    assert set(service.extras) <= PROJECT["project"]["optional-dependencies"].keys()
    assert (ROOT / f"services/requirements/{service.name if service.extras else 'base'}.txt").exists()


def test_groups_are_named_by_settings_of_their_service() -> None:
    for service, group in readers():
        fields = service.settings.model_fields
        assert group.setting in fields
        assert group.topic in fields
        assert group.only_with is None or group.only_with in fields


def test_no_service_imports_the_catalogue_and_it_imports_nothing_heavy() -> None:
    importlib.import_module("services.catalogue")
    for path in (ROOT / "services").glob("*/*.py"):
        assert "catalogue" not in path.read_text()
