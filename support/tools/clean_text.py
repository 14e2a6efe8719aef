"""Clean text from outside, such as a page, for use in a message or in a tool's result."""

from __future__ import annotations

import re

SHOWN_LENGTH = 120  # a message shows at most this many characters of a value from outside

# Remove control, zero-width and bidirectional characters, variation selectors, tags and lone surrogates. A person can't
# see these characters, but a model reads text that is hidden in them. The list is explicit, so that all versions of
# Python remove the same characters.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
_LINE_BREAK = re.compile("\r\n?|[\u0085\u2028\u2029\x0b\x0c]")
_FIXED_SPACE = re.compile("[\u00a0\u2007\u202f]")


def cleaned(text: str) -> str:
    """Return the text without invisible characters. Line breaks become newlines, and fixed spaces plain spaces."""
    return _INVISIBLE.sub("", _FIXED_SPACE.sub(" ", _LINE_BREAK.sub("\n", text)))


def one_line(text: str, limit: int) -> str:
    """Return the cleaned text on one line of at most `limit` characters."""
    line = " ".join(cleaned(text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def shortened(value: object) -> str:
    """Return a value from outside as short text that is safe in a message."""
    try:
        shown = repr(value)
    except RecursionError:
        shown = f"a deeply nested {type(value).__name__}"
    return one_line(shown, SHOWN_LENGTH)
