"""Compares the packages that a model was logged with, with the packages of an interpreter that may load the model."""

import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

_PINNED = re.compile(r"([A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?\s*===?\s*([^\s;#,]+)").match
_PYTHON = re.compile(r"^python:\s*['\"]?(\d+\.\d+)", re.MULTILINE)
_NONE = "none"


class Difference(NamedTuple):
    """A package whose version differs."""

    package: str
    logged: str
    here: str  # `none` if the package is not installed


class Interpreter(NamedTuple):
    """A Python interpreter, and how its packages differ from those that a model was logged with."""

    path: str
    differences: tuple[Difference, ...]


def closest(folder: Path, own: str | None) -> Interpreter:
    """Of this process's interpreter and `own`, return the one with the fewest differences for the model in `folder`."""
    wanted = logged_with(folder)
    paths = [sys.executable, *([own] if own else [])]
    found = [Interpreter(path, differences(wanted, installed(path))) for path in paths]
    return min(found, key=lambda each: len(each.differences))


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> tuple[Difference, ...]:
    """Return the packages in `wanted` that have another version in `found`, in the order of `wanted`."""
    return tuple(
        Difference(package, version, found.get(_key(package), _NONE))
        for package, version in wanted.items()
        if found.get(_key(package)) != version
    )


def logged_with(folder: Path) -> dict[str, str]:
    """Return the packages that the model in `folder` was logged with, by name, as far as exact versions are known.

    `python` stands for the interpreter, without its patch version.
    """
    found = {}
    for line in _text(folder / "requirements.txt").splitlines():
        if pinned := _PINNED(line.strip()):
            found[pinned[1]] = pinned[2]
    if python := _PYTHON.search(_text(folder / "python_env.yaml")):
        found["python"] = python[1]
    return found


@cache
def installed(python: str) -> dict[str, str]:
    """Return the versions of the packages that an interpreter has, by normalized name."""
    if python == sys.executable:
        paths, version = sys.path, "{}.{}".format(*sys.version_info)
    else:
        folders = sorted(Path(python).parent.parent.glob("lib/python3*/site-packages"))
        paths = list(map(str, folders))
        version = folders[0].parent.name.removeprefix("python") if folders else ""
    found = {_key(each.metadata["Name"]): each.version for each in distributions(path=paths) if each.metadata["Name"]}
    return found | {"python": version}


def in_words(found: tuple[Difference, ...]) -> str:
    """Say in words what differs: `logged with scikit-learn 1.5.2, here 1.9.1; build with MODEL_REQUIREMENTS=...`."""
    if not found:
        return ""
    said = ", ".join(f"{each.package} {each.logged}, here {each.here}" for each in found)
    wanted = " ".join(f"{each.package}=={each.logged}" for each in found if each.package != "python")
    return f"logged with {said}" + (f'; build with MODEL_REQUIREMENTS="{wanted}"' if wanted else "")


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
