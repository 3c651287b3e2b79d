"""Each image installs its service's own locked requirements, and nothing else."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from scripts.lock import BASE, LOCKS, lock_of
from scripts.sbom import bill, install, licences
from services.catalogue import BY_NAME

ROOT = Path(__file__).parents[1]
OURS = ("services", "shared", "training", "fraudctl", "rehearsal", "sandbox", "scripts")


def imported(module: str, seen: set[str]) -> Iterator[str]:
    """What a module of the project imports from elsewhere, by itself or through others of the project."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if module in seen or not path.exists():
        return
    seen.add(module)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] in OURS:
                yield from imported(name, seen)
            else:
                yield name.partition(".")[0]


@pytest.mark.parametrize("service", BY_NAME)
def test_what_a_service_imports_is_in_its_lock(service: str) -> None:
    lock = lock_of(service).read_text()
    locked = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    distributions = packages_distributions()

    for name in set(imported(f"services.{service}.__main__", set())) - sys.stdlib_module_names:
        candidates = {each.lower().replace("_", "-") for each in distributions.get(name, [name])}
        assert candidates & locked, f"services.{service} imports {name}, of {sorted(candidates)}"


@pytest.mark.parametrize(
    ("service", "heavy"), [("producer", "pandas"), ("producer", "scikit-learn"), ("alerter", "pandas")]
)
def test_the_light_images_stay_light(service: str, heavy: str) -> None:
    assert f"\n{heavy}==" not in lock_of(service).read_text()


def test_every_lock_has_the_versions_of_the_checkout() -> None:
    versions = re.findall(r"^[\w.-]+==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)

    for path in (ROOT / "services/requirements").iterdir():
        assert path.stem in LOCKS
        assert set(re.findall(r"^[\w.-]+==\S+", path.read_text(), re.MULTILINE)) <= set(versions)


def test_a_service_without_dependencies_of_its_own_installs_those_of_all() -> None:
    assert lock_of("a-new-service") == lock_of(BASE)
    assert "\nconfluent-kafka==" in lock_of(BASE).read_text()


@pytest.mark.parametrize(
    ("service", "most_mb"), [("producer", 60), ("predictor", 600), ("alerter", 60), ("db_sink", 120)]
)
def test_what_a_lock_installs_is_small_and_under_known_licences(service: str, most_mb: int, tmp_path: Path) -> None:
    site_packages = install(service, tmp_path)
    installed = bill(tmp_path)

    size = sum(file.stat().st_size for file in site_packages.rglob("*") if file.is_file())
    assert size / 1e6 <= most_mb
    assert [each["name"] for each in installed["components"] if not licences(each)] == []
    assert {"confluent-kafka", "msgspec"} <= {each["name"] for each in installed["components"]}
    assert installed["bomFormat"] == "CycloneDX"


def test_a_package_that_is_not_what_was_locked_is_not_installed(tmp_path: Path) -> None:
    lock = (ROOT / "services/requirements/producer.txt").read_text()
    (tmp_path / "requirements.txt").write_text(re.sub(r"sha256:\w{8}", "sha256:00000000", lock))
    command = [sys.executable, "-m", "uv", "pip", "sync", "--target", str(tmp_path / "site"), "--require-hashes"]

    done = subprocess.run([*command, tmp_path / "requirements.txt"], capture_output=True, text=True)

    assert done.returncode
    assert "Hash mismatch" in done.stderr


def test_images_and_checkouts_install_nothing_without_its_hash() -> None:
    for file in "services/Dockerfile", "Makefile":
        locked = [line for line in (ROOT / file).read_text().splitlines() if re.search(r"requirements.txt( |$)", line)]
        installing = [line for line in locked if "install" in line or "pip sync" in line]
        assert installing
        assert all("--require-hashes" in line for line in installing)
