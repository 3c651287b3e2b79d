"""Masks what people must not see: card numbers, birth dates, and logins in URLs.

`without_cards` is for text that is mostly our own, and finds card numbers by their check digit. `hide_personal` is for
text of unknown origin, and masks everything that might be a card number or a birth date. `without_digits` masks every
digit.
"""

import re

HIDDEN = "****"

_LABELLED = re.compile(r"(cc_num|dob)(\W{0,6}?[:=]\s*)(\\*\"[^\"]*\"?|[^,;}\]\n]*)", re.IGNORECASE)
_LONG_NUMBER = re.compile(r"(?<![\d.])\d(?:[ /\-\0]?\d){10,}")
_SCIENTIFIC = re.compile(r"(?<![\d.])\d+(?:\.\d+)?[eE]\+?\d\d")
_DATE = re.compile(r"(?<!\d)(?:\d{4}[-/]\d{1,2}(?:[-/]\d{0,2})?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}|(?:19|20)\d{6})(?!\d)")
# Not card numbers: digits after a decimal point, and those in a trans_num (32 hexadecimal digits, including letters).
_CARD_DIGITS = re.compile(r"\b(?=\d*[a-f])[0-9a-f]{32}\b|(?<!\d)(?<!\d\.)(?P<card>\d{11,19})(?!\d)")


def mask_card(cc_num: int) -> str:
    """The card number with all but its last four digits masked: `**** 1234`."""
    return f"**** {cc_num % 10000:04d}"


def without_cards(text: str) -> str:
    """The text with card numbers (11 to 19 digits that pass the Luhn test) masked as `**** 1234`."""
    return _CARD_DIGITS.sub(
        lambda run: f"**** {run[0][-4:]}" if run["card"] and passes_luhn(run["card"]) else run[0], text
    )


def passes_luhn(digits: str) -> bool:
    """Whether the digits pass the check-digit test of ISO/IEC 7812-1, annex B."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + position % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def without_digits(message: str, *, limit: int = 300) -> str:
    """An error's text with every digit masked, because libraries quote values such as card numbers and birth dates."""
    return re.sub(r"\d", "#", " ".join(message.split()))[:limit]


def without_credentials(text: str) -> str:
    """The text without the `user:password@` and the query of every URL, which libraries quote in their messages.

    Everything up to the last @ is removed, because a password may contain any character.
    """
    return re.sub(r"(://)(?:\S*@)?([^\s?]*)(?:\?\S*)?", r"\1\2", text)


def hide_personal(text: str) -> str:
    """The text with possible card numbers and birth dates masked: labelled values, long numbers, dates."""
    text = _LABELLED.sub(lambda found: f"{found[1]}{found[2]}{_labelled(found[1], found[3])}", text)
    text = _LONG_NUMBER.sub(lambda found: mask_digits(found[0]), text)
    return _DATE.sub(HIDDEN, _SCIENTIFIC.sub(HIDDEN, text))


def _labelled(label: str, value: str) -> str:
    return mask_digits(value) if label.lower() == "cc_num" else HIDDEN


def mask_digits(text: str) -> str:
    """The last four digits as `**** 1234`, or only `****` if there are too few digits for a card number."""
    digits = re.sub(r"\D", "", text)
    return f"{HIDDEN} {digits[-4:]}" if len(digits) > 8 else HIDDEN
