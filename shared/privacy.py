"""Masks what people must not see: card numbers, birth dates, and logins in URLs.

`without_cards` is for text that is mostly written by this project, and finds card numbers by their check digit.
`hide_personal` is for text of unknown origin, and masks everything that might be a card number or a birth date.
`without_digits` masks every digit.
"""

import re

from shared.text import one_line

HIDDEN = "****"

_LABELLED = re.compile(r"(cc_num|dob)(\W{0,6}?[:=]\s*)(\\*\"[^\"]*\"?|[^,;}\]\n]*)", re.IGNORECASE)
_LONG_NUMBER = re.compile(r"(?<![\d.])\d(?:[ /\-\0]?\d){10,}")
_SCIENTIFIC = re.compile(r"(?<![\d.])\d+(?:\.\d+)?[eE]\+?\d\d")
_DATE = re.compile(r"(?<!\d)(?:\d{4}[-/]\d{1,2}(?:[-/]\d{0,2})?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}|(?:19|20)\d{6})(?!\d)")
# Digits after a decimal point are not card numbers. The digits of a trans_num are not card numbers either: a trans_num
# has 32 hexadecimal digits, including letters.
_CARD_DIGITS = re.compile(r"\b(?=\d*[a-f])[0-9a-f]{32}\b|(?<!\d)(?<!\d\.)(?P<card>\d{11,19})(?!\d)")


def mask_card(cc_num: int) -> str:
    """Mask all but the last four digits of a card number: `**** 1234`."""
    return f"**** {cc_num % 10000:04d}"


def without_cards(text: str) -> str:
    """In the text, mask card numbers (11 to 19 digits that pass the Luhn test) as `**** 1234`."""
    return _CARD_DIGITS.sub(
        lambda run: f"**** {run[0][-4:]}" if run["card"] and passes_luhn(run["card"]) else run[0], text
    )


def passes_luhn(digits: str) -> bool:
    """Return whether the digits pass the check-digit test of ISO/IEC 7812-1, annex B."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + position % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def without_digits(message: str, *, limit: int = 300) -> str:
    """Mask every digit in an error message, and put the message on one line without control characters.

    Libraries quote values, such as card numbers and birth dates, in their messages, and servers send any bytes.
    """
    return re.sub(r"\d", "#", one_line(message, limit=limit))


def without_credentials(text: str) -> str:
    """Remove `user:password@` and the query from every URL in the text, because libraries quote URLs in messages.

    Everything up to the last @ is removed, because a password may contain any character.
    """
    return re.sub(r"(://)(?:\S*@)?([^\s?]*)(?:\?\S*)?", r"\1\2", text)


def hide_personal(text: str) -> str:
    """Mask possible card numbers and birth dates in the text: labelled values, long numbers and dates."""
    text = _LABELLED.sub(lambda found: f"{found[1]}{found[2]}{_labelled(found[1], found[3])}", text)
    text = _LONG_NUMBER.sub(lambda found: mask_digits(found[0]), text)
    return _DATE.sub(HIDDEN, _SCIENTIFIC.sub(HIDDEN, text))


def _labelled(label: str, value: str) -> str:
    return mask_digits(value) if label.lower() == "cc_num" else HIDDEN


def mask_digits(text: str) -> str:
    """Mask all but the last four digits: `**** 1234`. Mask all digits if there are too few for a card number."""
    digits = re.sub(r"\D", "", text)
    return f"{HIDDEN} {digits[-4:]}" if len(digits) > 8 else HIDDEN
