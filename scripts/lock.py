"""Writes hash-locked requirements: requirements.txt for a checkout, and services/requirements/ for the images.

`python -m scripts.lock` keeps the locked versions, and adds or removes packages as pyproject.toml and the service
catalogue require. With `--upgrade`, it resolves every version again.
"""

import argparse
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.catalogue import BY_NAME

ROOT = Path(__file__).parents[1]
BASE = "base"  # the dependencies of all services; for images without extras of their own
LOCKS: Mapping[str, Sequence[str]] = {
    **{service.name: service.extras for service in BY_NAME.values() if service.extras},
    BASE: (),
    "tools": ("tools",),
}
"""The extras of pyproject.toml that each file in services/requirements locks, by the name of the file."""


def lock_of(image: str) -> Path:
    """Return the requirements file that the image installs."""
    return ROOT / "services" / "requirements" / f"{image if image in LOCKS else BASE}.txt"


def main() -> int:
    """Write every requirements file. Returns 1 if the dependencies cannot be resolved; uv then prints the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="Upgrade every locked version.")
    upgrade = ["--upgrade"] if parser.parse_args().upgrade else []
    everything = ROOT / "requirements.txt"
    try:
        _compile(everything, "--all-extras", *upgrade)
        for name, extras in LOCKS.items():
            _compile(lock_of(name), *(f"--extra={extra}" for extra in extras), f"--constraints={everything.name}")
    except subprocess.CalledProcessError:
        return 1
    return 0


def _compile(lock: Path, *options: str) -> None:
    """For every platform, lock the dependencies that pyproject.toml lists, with the extras that `options` select."""
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    settings = ["--quiet", "--universal", "--python-version=3.11", "--generate-hashes"]
    settings += ["--no-emit-index-url", "--no-header"]
    files = ("pyproject.toml", "--output-file", lock.relative_to(ROOT))
    subprocess.run([uv, "pip", "compile", *settings, *options, *files], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
