"""deploy/kubernetes without a cluster: what kustomize renders, compared with the schemas and with compose."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from compose import CLOUD, CONTAINERS, EXAMPLE, FIELDS, IN_THE_CLOUD, ROOT, SETTINGS, WITH_SECRETS, in_the_cloud
from dotenv import dotenv_values

from services.db_sink.settings import DatabaseSettings
from services.db_sink.table import TABLE
from shared.settings import RegistrySettings, ServiceSettings, Settings, parse_properties

OVERLAYS = ROOT / "deploy" / "kubernetes" / "overlays"
VERSION = "1.37"
NAME = "app.kubernetes.io/name"
BROKER = "kafka.fraud-alarm.svc:9092"  # of the local stack, by a name that other namespaces find as well
OF_JOBS: dict[str, type[Settings]] = {
    "topics": ServiceSettings,
    "migrate": DatabaseSettings,
    "train": RegistrySettings,
}
Object = dict[str, Any]


def laid_over(base: Any, patch: Any) -> Any:
    """A strategic merge: maps key by key, lists of named things name by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: laid_over(base.get(key), each) for key, each in patch.items()}
    if isinstance(base, list) and isinstance(patch[0], dict):
        key = "mountPath" if "mountPath" in patch[0] else "name"
        new = {each[key]: each for each in patch}
        return [laid_over(each, new.pop(each[key], {})) for each in base] + list(new.values())
    return patch


def operated_on(target: Object, operations: list[Object]) -> Object:
    """A JSON patch of `add` and `replace`."""
    for each in operations:
        *path, last = each["path"].split("/")[1:]
        place: Any = target
        for part in path:
            place = place[int(part) if isinstance(place, list) else part]
        assert each["op"] == "add" or last in place
        place[last] = each["value"]
    return target


def rendered(folder: Path) -> list[Object]:
    """What `kustomize build` makes of the folder, but for the hashes in the ConfigMaps' names."""
    rules = yaml.safe_load((folder / "kustomization.yaml").read_text())
    objects: list[Object] = []
    for resource in rules["resources"]:
        path = folder / resource
        objects += rendered(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for config in rules.get("configMapGenerator", []):
        data = {key: (folder / name).read_text() for key, name in (each.split("=") for each in config.get("files", []))}
        for name in config.get("envs", []):
            data |= {key: value or "" for key, value in dotenv_values(folder / name).items()}
        meta = {"name": config["name"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    for rule in rules.get("patches", []):
        patch = yaml.safe_load((folder / rule["path"]).read_text())
        target = rule["target"]
        for number, each in enumerate(objects):
            if re.fullmatch(target["kind"], each["kind"]) and target.get("name") in (None, each["metadata"]["name"]):
                kept = {"kind": each["kind"], "apiVersion": each["apiVersion"], "metadata": each["metadata"]}
                objects[number] = operated_on(each, patch) if isinstance(patch, list) else laid_over(each, patch) | kept
    for image in rules.get("images", []):
        for _, pod in pods(objects):
            for container in pod["spec"]["containers"]:
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    for each in objects:
        if each["kind"] != "Namespace":
            each["metadata"]["namespace"] = rules["namespace"]
    return objects


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """The pods' templates by the names of what makes them."""
    for each in objects:
        if each["kind"] in ("StatefulSet", "Deployment", "Job"):
            yield each["metadata"]["name"], each["spec"]["template"]


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def selected(objects: list[Object], selector: Object) -> set[str]:
    """The names of the pods that a label selector finds; an empty one finds all."""

    def fits(labels: Mapping[str, str]) -> bool:
        equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
        return equal and all(
            (labels.get(each["key"]) in each["values"]) == (each["operator"] == "In")
            for each in selector.get("matchExpressions", [])
        )

    return {name for name, pod in pods(objects) if fits(pod["metadata"]["labels"])}


@pytest.fixture(params=["local", "cloud"])
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def objects(overlay: str) -> list[Object]:
    return rendered(OVERLAYS / overlay)


@pytest.fixture
def settings(objects: list[Object]) -> dict[str, str]:
    found: dict[str, str] = of_kind(objects, "ConfigMap")["settings"]["data"]
    return found


def compose_name(name: str) -> str:
    return "db_sink" if name == "db-sink" else name


def test_every_object_is_what_its_published_schema_allows(objects: list[Object]) -> None:
    import kubernetes_validate  # which takes seconds

    for each in objects:
        if not each["apiVersion"].startswith("keda.sh/"):  # which no package has the schemas of
            kubernetes_validate.validate(each, VERSION, strict=True)

    misspelt = of_kind(objects, "StatefulSet")["alerter"]
    misspelt["spec"]["template"]["spec"]["securityContexts"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="securityContexts"):
        kubernetes_validate.validate(misspelt, VERSION, strict=True)


def test_no_name_is_used_twice(objects: list[Object]) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]

    assert len(names) == len(set(names))


def test_images_and_commands_are_those_of_compose(overlay: str, objects: list[Object]) -> None:
    for name, pod in pods(objects):
        (container,) = pod["spec"]["containers"]
        if name == "migrate":  # which in compose the db_sink does by itself
            assert container["image"].partition(":")[0].endswith("fraud-alarm/tools")
            continue
        wanted = CONTAINERS[compose_name(name)]
        if overlay == "cloud":
            assert container["image"] == f"registry.example.com/{wanted['image']}:0.1.0"
        else:
            assert container["image"] == wanted["image"]
        if name != "fraudctl":  # which waits until somebody needs it; in compose, it is run then
            assert container.get("command") == wanted.get("command")
    containers = IN_THE_CLOUD if overlay == "cloud" else CONTAINERS
    expected = {name: each for name, each in containers.items() if "profiles" not in each}
    assert {compose_name(name) for name, _ in pods(objects)} - {"migrate", "fraudctl"} == expected.keys()


def test_the_local_stack_is_set_up_as_in_compose() -> None:
    local = rendered(OVERLAYS / "local")

    for name, value in of_kind(local, "ConfigMap")["settings"]["data"].items():
        assert value == EXAMPLE[name] if name in EXAMPLE else EXAMPLE[name.removesuffix("_FILE")]
    for name, pod in pods(local):
        if name in CONTAINERS.keys() - SETTINGS - {"topics", "train", "fraudctl"}:
            environment = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0].get("env", [])}
            secrets = {key for key, value in environment.items() if value is None}
            assert environment == {
                key: None if key in secrets else value.replace("kafka:9092", BROKER)
                for key, value in CONTAINERS[name].get("environment", {}).items()
            }
    kafka = of_kind(local, "Service")["kafka"]
    assert f"kafka.{kafka['metadata']['namespace']}.svc:{kafka['spec']['ports'][0]['port']}" == BROKER


def test_the_cloud_has_the_variables_of_composes_override() -> None:
    cloud = rendered(OVERLAYS / "cloud")
    variables = set(of_kind(cloud, "ConfigMap")["settings"]["data"])
    variables |= {each["name"] for name, pod in pods(cloud) for each in pod["spec"]["containers"][0]["env"]}

    set_by_compose = {
        key
        for container in in_the_cloud(WITH_SECRETS)["services"].values()
        if "profiles" not in container
        for key, value in container["environment"].items()
        if value
    }
    assert variables == set_by_compose


def test_every_variable_is_a_known_setting(objects: list[Object], settings: dict[str, str]) -> None:
    for name in [*settings, *(each["name"] for each in container(objects, "producer")["env"])]:
        assert name in FIELDS or name.removesuffix("_FILE") in FIELDS, name


def container(objects: list[Object], name: str) -> Object:
    found: Object = dict(pods(objects))[name]["spec"]["containers"][0]
    return found


def secrets(pod: Object) -> Object:
    """The Secret that is mounted, if one is."""
    volumes: list[Object] = [volume["secret"] for volume in pod["spec"]["volumes"] if volume["name"] == "secrets"]
    return volumes[0] if volumes else {"items": []}


def test_services_and_jobs_are_given_the_secrets_they_read_and_no_others(
    objects: list[Object], settings: dict[str, str]
) -> None:
    named = {key.removesuffix("_FILE").lower(): path for key, path in settings.items() if key.endswith("_FILE")}
    configured = {name: pod for name, pod in pods(objects) if "envFrom" in pod["spec"]["containers"][0]}
    assert configured.keys() - OF_JOBS.keys() == {name.replace("_", "-") for name in SETTINGS} | {"fraudctl"}
    read_by = {name: set(each.model_fields) for name, each in (SETTINGS | OF_JOBS).items()}
    read_by["fraudctl"] = {name.lower() for name in FIELDS}
    for name, pod in configured.items():
        fields = read_by[compose_name(name)]
        given = {item["path"] for item in secrets(pod)["items"]}
        read = {Path(path) for field, path in named.items() if field in fields}
        assert {path.parent for path in read} <= {Path("/run/secrets")}
        assert {path.name for path in read} <= given <= CLOUD["secrets"].keys() & fields
        owner = "fraud-alarm-owner" if name == "migrate" else "fraud-alarm"
        assert secrets(pod).get("secretName", owner) == owner


def test_the_migration_needs_no_more_than_its_job_is_given(
    objects: list[Object], settings: dict[str, str], engine: sa.Engine, tmp_path: Path
) -> None:
    pod = dict(pods(objects))["migrate"]
    main = pod["spec"]["containers"][0]
    texts = {"database_url": engine.url.render_as_string(hide_password=False)}
    for item in secrets(pod)["items"]:
        (tmp_path / item["path"]).write_text(texts[item["key"]])
    image = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    given = settings | {each["name"]: each["value"] for each in main["env"]}
    environment = {key: value.replace("/run/secrets", str(tmp_path)) for key, value in given.items()}

    done = subprocess.run(
        main["command"], env=image | environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert sa.inspect(engine).has_table(TABLE)


def test_every_reference_finds_what_it_names(objects: list[Object]) -> None:
    config, keys = of_kind(objects, "ConfigMap"), {*CLOUD["secrets"], "postgres_password"}
    for name, pod in pods(objects):
        spec = pod["spec"]
        main = spec["containers"][0]
        claims = of_kind(objects, "StatefulSet").get(name, {}).get("spec", {}).get("volumeClaimTemplates", [])
        volumes = {volume["name"] for volume in [*spec["volumes"], *(claim["metadata"] for claim in claims)]}
        assert {mount["name"] for mount in main["volumeMounts"]} == volumes
        assert {source["configMapRef"]["name"] for source in main.get("envFrom", [])} <= config.keys()
        assert {volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume} <= config.keys()
        for item in (item for volume in spec["volumes"] for item in volume.get("secret", {}).get("items", [])):
            assert item["key"] == item["path"]
            assert item["key"] in keys
        for each in main.get("env", []):
            if "valueFrom" in each:
                assert each["valueFrom"]["secretKeyRef"]["name"] == "fraud-alarm"
                assert each["valueFrom"]["secretKeyRef"]["key"] in keys
            else:
                assert "password" not in each["name"].lower()
        for probe in "startupProbe", "livenessProbe", "readinessProbe":
            if "httpGet" in main.get(probe, {}):
                assert main[probe]["httpGet"]["port"] in {key for port in main["ports"] for key in port.values()}
    for name, each in of_kind(objects, "StatefulSet").items():
        assert each["spec"]["serviceName"] in of_kind(objects, "Service")
        assert selected(objects, each["spec"]["selector"]) == {name}
    for name, each in of_kind(objects, "Service").items():
        assert selected(objects, {"matchLabels": each["spec"]["selector"]}) == {name}
        ports = {port for of in container(objects, name)["ports"] for port in of.values()}
        assert name == "mailpit" or {port.get("targetPort", port["port"]) for port in each["spec"]["ports"]} <= ports
    for name, each in of_kind(objects, "PodDisruptionBudget").items():
        assert selected(objects, each["spec"]["selector"]) == {name}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_service_is_probed_limited_spread_and_not_disrupted_all_at_once(name: str, objects: list[Object]) -> None:
    name = name.replace("_", "-")
    pod = dict(pods(objects))[name]
    main = pod["spec"]["containers"][0]

    assert main["livenessProbe"]["httpGet"] == {"path": "/live", "port": "metrics"}
    assert main["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "metrics"}
    assert main["ports"] == [{"name": "metrics", "containerPort": FIELDS["METRICS_PORT"].default}]
    assert main["resources"]["requests"].keys() == {"cpu", "memory"}
    limit = CONTAINERS[compose_name(name)]["mem_limit"].upper()
    assert main["resources"]["limits"]["memory"] == f"{limit}i"
    for spread in pod["spec"]["topologySpreadConstraints"]:
        assert {name} <= selected(objects, spread["labelSelector"])
    assert name in of_kind(objects, "PodDisruptionBudget")


def test_a_stop_works_before_there_is_a_handler_for_it(objects: list[Object]) -> None:
    for _, pod in pods(objects):
        ours = "fraud-alarm/" in pod["spec"]["containers"][0]["image"]
        assert pod["spec"].get("shareProcessNamespace", False) == ours


def test_no_pod_has_rights(objects: list[Object]) -> None:
    for name, pod in pods(objects):
        spec, main = pod["spec"], pod["spec"]["containers"][0]
        assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert main["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not main["securityContext"]["allowPrivilegeEscalation"]
        assert main["securityContext"]["readOnlyRootFilesystem"] or name == "kafka"  # which writes its configuration
        assert main["resources"]["limits"]["memory"]


def test_a_service_scales_by_its_own_groups_lag_up_to_its_partitions(overlay: str, objects: list[Object]) -> None:
    scaled, properties = of_kind(objects, "ScaledObject"), of_kind(objects, "ConfigMap")["client-properties"]["data"]
    bootstrap = parse_properties(properties["client.properties"])["bootstrap.servers"]
    topics = container(objects, "topics")["command"]

    assert overlay == "cloud" or bootstrap == BROKER
    assert {compose_name(name) for name in scaled} == SETTINGS.keys() - {"producer"}
    for name, each in scaled.items():
        assert each["spec"]["scaleTargetRef"] == {"kind": "StatefulSet", "name": name}
        assert "replicas" not in of_kind(objects, "StatefulSet")[name]["spec"]  # an apply would undo the scaling
        assert str(each["spec"]["maxReplicaCount"]) == topics[topics.index("--partitions") + 1]
        groups = [f"{compose_name(name).upper()}_GROUP", *(["WEBHOOK_GROUP"] if name == "alerter" else [])]
        triggers = each["spec"]["triggers"]
        assert [trigger["metadata"]["consumerGroup"] for trigger in triggers] == [FIELDS[key].default for key in groups]
        for trigger in triggers:
            assert trigger["metadata"]["bootstrapServers"] == bootstrap
            assert trigger["metadata"]["topic"] == ("topic_1" if name == "predictor" else "topic_2")
            # Mails or posts alone: a group that never commits is none that lags by all that was ever written.
            assert trigger["metadata"]["offsetResetPolicy"] == ("latest" if name == "alerter" else "earliest")
            if overlay == "cloud":
                assert (trigger["metadata"]["sasl"], trigger["metadata"]["tls"]) == ("plaintext", "enable")
                login = of_kind(objects, "TriggerAuthentication")[trigger["authenticationRef"]["name"]]
                assert {each["key"] for each in login["spec"]["secretTargetRef"]} == {"sasl_username", "sasl_password"}


def test_nothing_goes_in_or_out_but_what_a_policy_names(overlay: str, objects: list[Object]) -> None:
    policies = {name: each["spec"] for name, each in of_kind(objects, "NetworkPolicy").items()}
    everybody = {name for name, _ in pods(objects)}

    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert selected(objects, policies["metrics"]["podSelector"]) == {name.replace("_", "-") for name in SETTINGS}
    rest = {name: each for name, each in policies.items() if name.startswith("to-")}
    assert policies.keys() == rest.keys() | {"default-deny", "names", "metrics"}
    let_through = {
        (client, port["port"])
        for each in rest.values()
        if each["policyTypes"] == (["Egress"] if overlay == "cloud" else ["Ingress"])
        for rule in each.get("egress") or each["ingress"]
        for peer in (rule["from"] if "from" in rule else [{"podSelector": each["podSelector"]}])
        for client in selected(objects, peer.get("podSelector", {"matchLabels": {NAME: "another namespace"}}))
        for port in rule["ports"]
    }
    kafka = {(name, 9092) for name in ("producer", "predictor", "alerter", "db-sink", "topics")}
    database = {("db-sink", 5432), ("migrate", 5432)}
    mail = {("alerter", 587), ("alerter", 465)}
    web = {("producer", 443), ("predictor", 443), ("alerter", 443)}
    servers = {("kafka", 9092), ("producer", 8080), ("predictor", 5000), ("train", 5000), ("alerter", 1025)}
    services = kafka | database | (web | mail if overlay == "cloud" else servers)
    assert let_through == services | {("fraudctl", port) for _, port in services}  # which asks all that they ask
    assert {client for client, _ in let_through} <= everybody


def test_fraudctl_is_there_on_demand_in_a_folder_that_it_may_write_to(objects: list[Object]) -> None:
    deployment = of_kind(objects, "Deployment")["fraudctl"]["spec"]
    main = deployment["template"]["spec"]["containers"][0]
    volumes = {each["name"]: each for each in deployment["template"]["spec"]["volumes"]}
    (folder,) = (each for each in main["volumeMounts"] if each["mountPath"] == main["workingDir"])

    assert deployment["replicas"] == 0
    assert main["workingDir"] == CONTAINERS["fraudctl"]["working_dir"]
    assert "emptyDir" in volumes[folder["name"]]
    assert not folder.get("readOnly")
