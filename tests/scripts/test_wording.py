"""The words to avoid are found in prose and in names, wherever they are."""

from pathlib import Path

import pytest

from scripts import wording

ROOT = Path(__file__).parents[2]

MODULE = '''
"""A module."""


def _hear(error):
    """It has."""
    name = f"{error} is to be mended"  # the batch comes
    return name


# The batch comes
# again.
'''


def found(path: str, text: str) -> list[tuple[int, str]]:
    return sorted((each.line, each.word) for each in wording.in_file(path, text))


def test_names_docstrings_strings_and_comments_of_python_are_checked() -> None:
    assert found("a.py", MODULE) == [(5, "hear"), (6, "It has."), (7, "mended"), (11, "comes again")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The broker told us.", ["told"]),
        ("# Once\n# in a blue\n# moon", ["Once in a blue moon"]),
        ("recommended, hearse, tollgate, bearer", []),
        ("COMES_AGAIN, is_told", ["COMES AGAIN", "told"]),
    ],
)
def test_whole_words_are_found_in_text(text: str, words: list[str]) -> None:
    assert [word for _, word in found("a.md", text)] == words


def test_exceptions_name_a_file_and_a_part_of_the_line() -> None:
    assert found("a.py", "size = file.tell()\n") == []
    assert found("a.py", "size = tell()\n") == [(1, "tell")]
    assert found("services/requirements/a.txt", "bear==1.0\n") == []


def test_a_finding_is_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wording, "EXCEPTIONS", ())
    monkeypatch.setattr(wording, "FILES", ("scripts/wording.py",))

    assert wording.main() == 1
    assert "scripts/wording.py:" in capsys.readouterr().out
