"""The types of options, for argparse. Each error says which values the option takes."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime

MAX_SECONDS = 1_000_000
MAX_DAYS = 36_500
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def user_name() -> str:
    """Return the name of the user, or an empty text if the system doesn't know it."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        return ""


def seconds(lowest: float = 0.0) -> Callable[[str], float]:
    """Return a function that reads a number of seconds from `lowest` to 1,000,000."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if lowest <= (value := float(text)) <= MAX_SECONDS:  # not true for "nan"
                return value
        raise argparse.ArgumentTypeError(
            f"{_shown(text)} is not a number of seconds between {lowest:g} and {MAX_SECONDS:,}"
        )

    return read


def count(lowest: int = 1, highest: int = 1_000_000) -> Callable[[str], int]:
    """Return a function that reads a whole number from `lowest` to `highest`."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if lowest <= (value := int(text)) <= highest:
                return value
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a number between {lowest:,} and {highest:,}")

    return read


def duration(text: str) -> float:
    """Read a duration such as 30d: a number with the unit s, m, h, d or w. Return the seconds."""
    with contextlib.suppress(ValueError, KeyError, IndexError):
        if 0 <= (value := float(text[:-1]) * _UNITS[text[-1]]) <= MAX_DAYS * _UNITS["d"]:  # not true for "nan"
            return value
    raise argparse.ArgumentTypeError(
        f"{_shown(text)} is not a duration up to {MAX_DAYS:,}d: give a number and s, m, h, d or w, such as 12h or 30d"
    )


def moment(text: str) -> int:
    """Read a time: an age (30s, 15m, 2h, 7d), a date, or a date with a time of day. Return ms since 1970."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        return max(round((time.time() - duration(text)) * 1000), 1)
    with contextlib.suppress(ValueError, OverflowError, OSError):
        # Python 3.10 can't read a "Z", which stands for UTC.
        return max(round(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000), 1)
    raise argparse.ArgumentTypeError(
        f"{_shown(text)} is not a time: give an age (30s, 15m, 2h, 7d) or a date (2026-01-31, 2026-01-31T12:00)"
    )


def attribute(text: str) -> tuple[str, str]:
    """Read an attribute, NAME=VALUE. Return its name and its value."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not an attribute: give NAME=VALUE")
    return name, value


def not_empty(text: str) -> str:
    """Return the text. An empty one is probably a variable of a shell that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty: give one, or leave out the option")
    return text


def refuse_bytes(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    """End the program with an error if an argument is not text: it could be neither sent nor stored.

    Python keeps the bytes that it can't decode, as surrogates. If `arguments` is None, check those of this process.
    """
    for argument in sys.argv[1:] if arguments is None else arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            parser.error(f"the argument {argument!a} is not text in UTF-8: type it in a terminal that uses UTF-8")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
