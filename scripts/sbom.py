"""Writes a CycloneDX bill of materials for each image, from the image's locked requirements. `make sbom` runs this."""

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from scripts.lock import lock_of
from services.catalogue import BY_NAME

ROOT = Path(__file__).parents[1]
IMAGES = (*BY_NAME, "tools")
# Licences that are stated in a file of the package, but not in its metadata.
UNDECLARED = {"huey": "MIT", "protobuf": "BSD-3-Clause", "skops": "MIT"}
_UNSPECIFIC = "License :: OSI Approved"


def install(image: str, venv: Path) -> Path:
    """Install the image's locked requirements into a new venv, checking hashes. Returns the venv's site-packages."""
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, venv], check=True)
    subprocess.run([uv, "pip", "sync", "--quiet", "--python", venv, "--require-hashes", lock_of(image)], check=True)
    (site_packages,) = (venv / "lib").glob("python*/site-packages")
    return site_packages


def bill(venv: Path) -> dict[str, Any]:
    """Return the packages that are installed in the venv, as a CycloneDX document."""
    tool: list[str | Path] = [
        sys.executable,
        "-m",
        "cyclonedx_py",
        "environment",
        "--pyproject",
        ROOT / "pyproject.toml",
    ]
    # The tool does not write anything invalid, and checking that takes ten times as long as everything else it does.
    options = ["--output-reproducible", "--no-validate"]
    done = subprocess.run([*tool, *options, venv / "bin" / "python"], check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    for component in found["components"]:
        if component["name"] in UNDECLARED and not licences(component):
            component["licenses"] = [{"license": {"id": UNDECLARED[component["name"]]}}]
    return found


def licences(component: dict[str, Any]) -> list[str]:
    """For each licence of a component, return its SPDX identifier, or its name if it has no identifier."""
    declared = (entry.get("expression") or entry["license"] for entry in component.get("licenses", []))
    named = (each if isinstance(each, str) else each.get("id") or each["name"] for each in declared)
    return [name for name in named if name != _UNSPECIFIC]


def main() -> int:
    """Write build/sbom/<image>.cdx.json for each image, and print all licences. Returns 1 if a licence is unknown."""
    directory = ROOT / "build" / "sbom"
    directory.mkdir(parents=True, exist_ok=True)
    listed: dict[str, tuple[list[str], list[str]]] = {}
    for image in IMAGES:
        with tempfile.TemporaryDirectory() as venv:
            install(image, Path(venv))
            found = bill(Path(venv))
        (directory / f"{image}.cdx.json").write_text(json.dumps(found, indent=2) + "\n")
        for component in found["components"]:
            listed.setdefault(f"{component['name']} {component['version']}", (licences(component), []))[1].append(image)
    for name, (names, images) in sorted(listed.items(), key=lambda each: each[0].lower()):
        print(f"{name:40} {'; '.join(names) or 'UNKNOWN':60} {', '.join(images)}")  # noqa: T201
    unknown = [name for name, (names, _) in listed.items() if not names]
    if unknown:
        print(f"sbom: unknown licence: {', '.join(unknown)}. Add it to UNDECLARED in scripts/sbom.py.", file=sys.stderr)  # noqa: T201
    return int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
