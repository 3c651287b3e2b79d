"""Makes text from outside harmless for people who read it: in mails, tables, logs and terminals."""

import re

# Letters and marks that are shown as nothing (Default_Ignorable_Code_Point in the Unicode Character Database), and the
# empty Braille pattern. Control and format characters are found by str.isprintable.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)

BACKSLASH = ord("\\")  # a number, which `in` finds in bytes ten times as fast as it finds bytes


def one_line(text: str, *, limit: int = 200) -> str:
    """Put the text on one line, without characters that cannot be seen, and cut it to `limit` characters.

    The result cannot forge a mail header, a table row or a log line, or change how what follows it is displayed.
    """
    seen = "".join(each if each.isprintable() else " " for each in _INVISIBLE.sub("", text))
    return " ".join(seen.split())[:limit]
