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


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
