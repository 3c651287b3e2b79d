"""Each image installs its service's own locked requirements, and nothing else."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("services", "shared", "training", "fraudctl", "sandbox")
SERVICES = ("producer", "predictor", "alerter", "db_sink")


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


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_service_imports_is_in_its_lock(service: str) -> None:
    lock = (ROOT / f"services/requirements/{service}.txt").read_text()
    locked = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    distributions = packages_distributions()

    for name in set(imported(f"services.{service}.__main__", set())) - sys.stdlib_module_names:
        candidates = {each.lower().replace("_", "-") for each in distributions.get(name, [name])}
        assert candidates & locked, f"services.{service} imports {name}, of {sorted(candidates)}"


@pytest.mark.parametrize(
    ("service", "heavy"), [("producer", "pandas"), ("producer", "scikit-learn"), ("alerter", "pandas")]
)
def test_the_light_images_stay_light(service: str, heavy: str) -> None:
    assert f"\n{heavy}==" not in (ROOT / f"services/requirements/{service}.txt").read_text()
