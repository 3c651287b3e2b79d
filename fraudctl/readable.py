"""A key, a value or a header as people may see it: no full card number and no birth date, whatever the bytes are.

What a field is called decides. Where that is unknown, in broken JSON or under a name that no transaction has, all that
might be a card number or a birth date is hidden.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from shared.logs import without_cards
from shared.records import FEATURES

_CARD = "cc_num"
_BIRTH = "dob"
# The fields where long numbers and dates are neither cards nor births.
_SHOWN = frozenset(FEATURES) - {_CARD, _BIRTH} | {"current_time", "prediction"}
_HIDDEN = "****"

_LABELLED = re.compile(rf"({_CARD}|{_BIRTH})(\W{{0,6}}?[:=]\s*)(\\*\"[^\"]*\"?|[^,;}}\]\n]*)", re.IGNORECASE)
_LONG_NUMBER = re.compile(r"(?<![\d.])\d(?:[ /\-\0]?\d){10,}")
_SCIENTIFIC = re.compile(r"(?<![\d.])\d+(?:\.\d+)?[eE]\+?\d\d")
_DATE = re.compile(r"(?<!\d)(?:\d{4}[-/]\d{1,2}(?:[-/]\d{0,2})?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}|(?:19|20)\d{6})(?!\d)")


def readable_value(value: bytes | None, *, indent: int | None = 2) -> str:
    """A record's value: JSON indented, anything else as text, without card number and birth date."""
    if value is None:
        return "none"
    text = _decoded(value)
    try:
        parsed = _parsed(text)
        shown = _hidden_text(text) if parsed is None else json.dumps(_hidden(parsed), indent=indent, ensure_ascii=False)
    except RecursionError:
        shown = _hidden_text(text)
    return _printable(shown)


def readable_key(key: bytes | None) -> str:
    """A record's key; one of digits is a card number."""
    if key is None:
        return "none"
    text = _decoded(key)
    return _card(text) if text.isdigit() else _printable(_hidden_text(text))


def readable_header(name: str, value: str | bytes | None) -> str:
    """A header's value; what this project writes itself, times in ms among it, is no card number."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else _decoded(value)
    own = name.startswith("dlq-") or name.endswith("-ms")
    return _printable(without_cards(text) if own else _hidden_text(text))


def _hidden(value: Any, field: str = "") -> Any:
    """The JSON value with what must not be seen replaced."""
    if value is None or isinstance(value, bool):
        return value
    if field.lower() == _CARD:
        return _card(str(value))
    if field.lower() == _BIRTH:
        return _HIDDEN
    if isinstance(value, dict):
        return _hidden_object(value)
    if isinstance(value, list):
        return [_hidden(each, field) for each in value]
    if isinstance(value, str) and (inner := _parsed(value)) is not None:
        return json.dumps(_hidden(inner), ensure_ascii=False)
    text = str(value)
    hidden = without_cards(text) if field in _SHOWN else _hidden_text(text)
    return value if hidden == text else hidden


def _hidden_object(fields: Mapping[str, Any]) -> dict[str, Any]:
    columns = fields.get("columns")
    return {
        _hidden_text(name): [_hidden_row(columns, row) for row in value]
        if name == "data" and isinstance(columns, list) and isinstance(value, list)
        else _hidden(value, name)
        for name, value in fields.items()
    }


def _hidden_row(columns: list[Any], row: Any) -> Any:
    """A row of the split form; where it does not fit the columns, no cell's field is known."""
    if isinstance(row, list) and len(row) == len(columns):
        return [_hidden(cell, str(column)) for column, cell in zip(columns, row, strict=True)]
    return _hidden(row)


def _hidden_text(text: str) -> str:
    text = _LABELLED.sub(lambda found: f"{found[1]}{found[2]}{_labelled(found[1], found[3])}", text)
    text = _LONG_NUMBER.sub(lambda found: _card(found[0]), text)
    return _DATE.sub(_HIDDEN, _SCIENTIFIC.sub(_HIDDEN, text))


def _labelled(label: str, value: str) -> str:
    return _card(value) if label.lower() == _CARD else _HIDDEN


def _card(text: str) -> str:
    """`**** 1234`; of what is too short for a card number, nothing."""
    digits = re.sub(r"\D", "", text)
    return f"{_HIDDEN} {digits[-4:]}" if len(digits) > 8 else _HIDDEN


def _parsed(text: str) -> Any:
    """The object or list that the text is, also as a JSON string inside JSON; None if it is neither."""
    try:
        parsed = json.loads(text)
        if isinstance(parsed, str):
            parsed = json.loads(parsed)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict | list) else None


def _decoded(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")


def _printable(text: str) -> str:
    """Nothing that a terminal would obey."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )
