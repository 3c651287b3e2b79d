"""Formats keys, values and headers for people, and masks card numbers and birth dates, even in malformed records.

A field's name decides how its value is masked. In broken JSON, and in fields that a transaction does not have,
everything that might be a card number or a birth date is masked.
"""

import json
from collections.abc import Mapping
from typing import Any

from shared.privacy import HIDDEN, hide_personal, mask_digits, without_cards
from shared.records import FEATURES

_CARD = "cc_num"
_BIRTH = "dob"
# Fields whose long numbers and dates are neither card numbers nor birth dates.
_SHOWN = frozenset(FEATURES) - {_CARD, _BIRTH} | {"current_time", "prediction"}


def readable_value(value: bytes | None, *, indent: int | None = 2) -> str:
    """Return a record's value as text, with card numbers and birth dates masked. Only JSON is indented."""
    if value is None:
        return "none"
    text = _decoded(value)
    try:
        parsed = _parsed(text)
        shown = (
            hide_personal(text) if parsed is None else json.dumps(_hidden(parsed), indent=indent, ensure_ascii=False)
        )
    except RecursionError:
        shown = hide_personal(text)
    return _printable(shown)


def readable_key(key: bytes | None) -> str:
    """Return a record's key as text, with personal data masked. A key that consists of digits is a card number."""
    if key is None:
        return "none"
    text = _decoded(key)
    return mask_digits(text) if text.isdigit() else _printable(hide_personal(text))


def readable_header(name: str, value: str | bytes | None) -> str:
    """Return a header's value as text, with personal data masked.

    In this project's own headers, times in milliseconds stay readable.
    """
    if value is None:
        return "none"
    text = value if isinstance(value, str) else _decoded(value)
    own = name.startswith("dlq-") or name.endswith("-ms")
    return _printable(without_cards(text) if own else hide_personal(text))


def _hidden(value: Any, field: str = "") -> Any:
    """Return the JSON value with card numbers and birth dates masked."""
    if value is None or isinstance(value, bool):
        return value
    if field.lower() == _CARD:
        return mask_digits(str(value))
    if field.lower() == _BIRTH:
        return HIDDEN
    if isinstance(value, dict):
        return _hidden_object(value)
    if isinstance(value, list):
        return [_hidden(each, field) for each in value]
    if isinstance(value, str) and (inner := _parsed(value)) is not None:
        return json.dumps(_hidden(inner), ensure_ascii=False)
    text = str(value)
    hidden = without_cards(text) if field in _SHOWN else hide_personal(text)
    return value if hidden == text else hidden


def _hidden_object(fields: Mapping[str, Any]) -> dict[str, Any]:
    columns = fields.get("columns")
    return {
        hide_personal(name): [_hidden_row(columns, row) for row in value]
        if name == "data" and isinstance(columns, list) and isinstance(value, list)
        else _hidden(value, name)
        for name, value in fields.items()
    }


def _hidden_row(columns: list[Any], row: Any) -> Any:
    """Mask a row in pandas' split form.

    If the row has too few or too many cells, each cell is masked like an unknown field.
    """
    if isinstance(row, list) and len(row) == len(columns):
        return [_hidden(cell, str(column)) for column, cell in zip(columns, row, strict=True)]
    return _hidden(row)


def _parsed(text: str) -> Any:
    """Return the JSON object or list in the text, or None if there is neither. The JSON may be encoded twice."""
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
    """Escape the text's control characters, so that a terminal does not interpret them."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )
