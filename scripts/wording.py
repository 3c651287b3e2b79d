"""Finds unwanted words in prose and in names.

`python -m scripts.wording` prints `path:line: word: use X` for each word.

In Python files, the script checks comments, strings and names. In other text files, the script checks everything. A
phrase may span lines.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FILES = ("*.py", "*.md", "*.txt", "*.html", "*.yml", "*.yaml", "*.toml", "*.env", "*.sql", "*.example", "*file")

# Words and phrases to avoid (regular expressions), and what to write instead.
AVOID = {
    r"tell|tells|telling|told": "log, report, say or pass",
    r"mend|mends|mended|mending": "fix, repair or correct",
    r"bear|bears|bearing|bore|borne": "have or carry",
    r"hear|hears|hearing|heard": "receive, or is called with",
    r"comes? again|came again": "is redelivered, or arrives again",
    r"goes out|went out|going out": "is sent",
    r"once in a blue moon": "rarely",
    r"by way of": "through",
    r"without a word": "silently",
    r"what bec[ao]mes? of": "what happened to",
    r"held against": "compared with",
    r"for (the )?want of": "because there is no",
    r"is no illness": "is not a problem",
    r"to its makers|its makers": "its vendor",
    r"where they? stands?": "its state",
}
# Docstrings that mean nothing to a reader who has not seen the code.
RIDDLES = ("It has.", "They are.", "It does.", "It was.", "There are none.", "There is none.")

# (file, part of the line, why the word may stay)
EXCEPTIONS = (
    ("scripts/wording.py", "", "lists the words"),
    ("tests/scripts/test_wording.py", "", "tests the list"),
    ("*requirements*.txt", "", "names of packages"),
    ("*.py", ".tell()", "the method of files"),
    ("CHANGELOG.md", "| `comes_again` |", "an earlier name"),
    ("CHANGELOG.md", "| `mended and replayed` |", "an earlier name"),
)

_GAP = r"[\s#/*>_-]+"  # what may separate the words of a phrase, for example a line break and a comment sign
_PATTERNS = {
    re.compile(rf"(?<![a-z])(?:{words.replace(' ', _GAP)})(?![a-z])", re.IGNORECASE): advice
    for words, advice in AVOID.items()
}


class Finding(NamedTuple):
    """An unwanted word, the number of its line (from 1), and what to use instead."""

    line: int
    word: str
    advice: str


def in_text(text: str, first_line: int = 1) -> Iterator[Finding]:
    """Find everything unwanted in a text that begins on line `first_line` of its file."""
    for pattern, advice in _PATTERNS.items():
        for match in pattern.finditer(text):
            line = first_line + text.count("\n", 0, match.start())
            yield Finding(line, " ".join(re.split(_GAP, match[0])), advice)


def in_python(source: str) -> Iterator[Finding]:
    """Find everything unwanted in the comments, strings, names and docstrings of a module."""
    comments: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.append(token)
        elif token.type not in (tokenize.NL, tokenize.NEWLINE):  # a comment may continue on the next line
            yield from _in_comment(comments)
            comments = []
            if token.type in (tokenize.STRING, tokenize.NAME):
                yield from in_text(token.string, token.start[0])
    yield from _in_comment(comments)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring in RIDDLES:
                yield Finding(node.body[0].lineno, docstring, "the subject and what the caller gets")


def _in_comment(lines: list[tokenize.TokenInfo]) -> Iterator[Finding]:
    if lines:
        yield from in_text("\n".join(each.string for each in lines), lines[0].start[0])


def in_file(path: str, text: str) -> Iterator[Finding]:
    """Find everything unwanted in a file, except for EXCEPTIONS. `path` is relative to the root."""
    lines = text.splitlines()
    for found in in_python(text) if path.endswith(".py") else in_text(text):
        if not any(fnmatch(path, glob) and part in lines[found.line - 1] for glob, part, _ in EXCEPTIONS):
            yield found


def main() -> int:
    """Check every file that git tracks or would add. Returns 1 if an unwanted word is found."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    wrong = 0
    for path in sorted(listed):
        wanted = any(fnmatch(path, glob) for glob in FILES)
        if wanted and (ROOT / path).is_file():
            for found in sorted(in_file(path, (ROOT / path).read_text(encoding="utf-8"))):
                print(f"{path}:{found.line}: {found.word}: use {found.advice}")  # noqa: T201
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
