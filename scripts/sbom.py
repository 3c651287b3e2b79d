"""The bill of materials of each image, in CycloneDX, from what its lock installs: `make sbom`."""

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from services.catalogue import BY_NAME

ROOT = Path(__file__).parents[1]
IMAGES = (*BY_NAME, "tools")
# What their licence files say, where their metadata does not.
UNSAID = {"huey": "MIT", "protobuf": "BSD-3-Clause", "skops": "MIT"}
_SAYS_NOTHING = "License :: OSI Approved"


def install(image: str, venv: Path) -> Path:
    """The image's own locked requirements in a new venv, their hashes checked. Returns its site-packages."""
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    lock = ROOT / "services" / "requirements" / f"{image}.txt"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, venv], check=True)
    subprocess.run([uv, "pip", "sync", "--quiet", "--python", venv, "--require-hashes", lock], check=True)
    (site_packages,) = (venv / "lib").glob("python*/site-packages")
    return site_packages


def bill(venv: Path) -> dict[str, Any]:
    """What is installed there, as CycloneDX."""
    tool: list[str | Path] = [
        sys.executable,
        "-m",
        "cyclonedx_py",
        "environment",
        "--pyproject",
        ROOT / "pyproject.toml",
    ]
    done = subprocess.run([*tool, "--output-reproducible", venv / "bin" / "python"], check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    for component in found["components"]:
        if component["name"] in UNSAID and not licences(component):
            component["licenses"] = [{"license": {"id": UNSAID[component["name"]]}}]
    return found


def licences(component: dict[str, Any]) -> list[str]:
    """What a component's licences are called: SPDX's identifiers where it has them."""
    said = (entry.get("expression") or entry["license"] for entry in component.get("licenses", []))
    named = (each if isinstance(each, str) else each.get("id") or each["name"] for each in said)
    return [name for name in named if name != _SAYS_NOTHING]


def main() -> int:
    """Write build/sbom/<image>.cdx.json for each image and list the licences; exit code 1 if one is not known."""
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
    for name, (said, images) in sorted(listed.items(), key=lambda each: each[0].lower()):
        print(f"{name:40} {'; '.join(said) or 'UNKNOWN':60} {', '.join(images)}")  # noqa: T201
    unknown = [name for name, (said, _) in listed.items() if not said]
    if unknown:
        print(f"no licence known: {', '.join(unknown)}", file=sys.stderr)  # noqa: T201
    return int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
