"""Runs fraudctl in this process, which has imported its packages already: an interpreter of its own takes seconds."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import pytest

from fraudctl.__main__ import main


def call(*arguments: object, cwd: Path, environment: Mapping[str, str]) -> CompletedProcess[str]:
    """What `fraudctl` prints and its exit code, if it is called in this folder with nothing but this environment."""
    words = ["fraudctl", *map(str, arguments)]
    with ExitStack() as stack:
        output = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(2)]
        with (
            _into(output[0].fileno(), "stdout"),
            _into(output[1].fileno(), "stderr"),
            chdir(cwd),
            patch.dict(os.environ, environment, clear=True),
            patch.object(sys, "argv", words),
            pytest.raises(SystemExit) as end,
        ):
            main()
        for each in output:
            each.seek(0)
        printed, reported = (each.read() for each in output)
        assert isinstance(end.value.code, int)
        return CompletedProcess(words, end.value.code, printed, reported)


@contextmanager
def _into(descriptor: int, name: str) -> Iterator[None]:
    """Send this stream, and what libraries written in C print on it, into a file."""
    number = {"stdout": 1, "stderr": 2}[name]
    before = os.dup(number)
    os.dup2(descriptor, number)
    try:
        with open(number, "w", encoding="utf-8", closefd=False) as stream, patch.object(sys, name, stream):
            yield
    finally:
        os.dup2(before, number)
        os.close(before)
