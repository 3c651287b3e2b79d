"""What people must not see, masked: card numbers, birth dates, the logins in URLs.

`without_cards` finds card numbers by their check digit, in text that is mostly our own. `hide_personal` hides whatever
might be a card number or a birth date, in text of unknown origin. `without_digits` leaves no digit at all.
"""

import re

HIDDEN = "****"

_LABELLED = re.compile(r"(cc_num|dob)(\W{0,6}?[:=]\s*)(\\*\"[^\"]*\"?|[^,;}\]\n]*)", re.IGNORECASE)
_LONG_NUMBER = re.compile(r"(?<![\d.])\d(?:[ /\-\0]?\d){10,}")
_SCIENTIFIC = re.compile(r"(?<![\d.])\d+(?:\.\d+)?[eE]\+?\d\d")
_DATE = re.compile(r"(?<!\d)(?:\d{4}[-/]\d{1,2}(?:[-/]\d{0,2})?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}|(?:19|20)\d{6})(?!\d)")
# No card: a decimal's digits, and those in a transaction's number (32 hexadecimal digits, letters among them).
_CARD_DIGITS = re.compile(r"\b(?=\d*[a-f])[0-9a-f]{32}\b|(?<!\d)(?<!\d\.)(?P<card>\d{11,19})(?!\d)")


def mask_card(cc_num: int) -> str:
    """A card number as people may see it: `**** 1234`."""
    return f"**** {cc_num % 10000:04d}"


def without_cards(text: str) -> str:
    """The text with every run of 11 to 19 digits that passes the Luhn test as `**** 1234`."""
    return _CARD_DIGITS.sub(
        lambda run: f"**** {run[0][-4:]}" if run["card"] and passes_luhn(run["card"]) else run[0], text
    )


def passes_luhn(digits: str) -> bool:
    """The check-digit test of ISO/IEC 7812-1, annex B."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + position % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def without_digits(message: str, *, limit: int = 300) -> str:
    """An error's text, fit for logs and headers: libraries quote values, card numbers and birth dates among them."""
    return re.sub(r"\d", "#", " ".join(message.split()))[:limit]


def without_credentials(text: str) -> str:
    """The text with `user:password@` and the query of every URL left out: libraries quote addresses.

    All up to the last @ is left out: a password may have any character in it.
    """
    return re.sub(r"(://)(?:\S*@)?([^\s?]*)(?:\?\S*)?", r"\1\2", text)


def hide_personal(text: str) -> str:
    """The text with whatever might be a card number or a birth date hidden: labelled values, long numbers, dates."""
    text = _LABELLED.sub(lambda found: f"{found[1]}{found[2]}{_labelled(found[1], found[3])}", text)
    text = _LONG_NUMBER.sub(lambda found: mask_digits(found[0]), text)
    return _DATE.sub(HIDDEN, _SCIENTIFIC.sub(HIDDEN, text))


def _labelled(label: str, value: str) -> str:
    return mask_digits(value) if label.lower() == "cc_num" else HIDDEN


def mask_digits(text: str) -> str:
    """`**** 1234`; of what is too short for a card number, nothing."""
    digits = re.sub(r"\D", "", text)
    return f"{HIDDEN} {digits[-4:]}" if len(digits) > 8 else HIDDEN
