"""The types of number options, for argparse. Each error says which numbers the option takes."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

MAX_SECONDS = 1_000_000


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


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
MAX_DAYS = 36_500


def duration(text: str) -> float:
    """Read a duration such as 30d: a number with the unit s, m, h, d or w. Return the seconds."""
    with contextlib.suppress(ValueError, KeyError, IndexError):
        if 0 <= (value := float(text[:-1]) * _UNITS[text[-1]]) <= MAX_DAYS * _UNITS["d"]:  # not true for "nan"
            return value
    raise argparse.ArgumentTypeError(
        f"{_shown(text)} is not a duration up to {MAX_DAYS:,}d: give a number and s, m, h, d or w, such as 12h or 30d"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
