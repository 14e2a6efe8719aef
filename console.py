"""What the scripts print, on any console: a character that it can't show becomes a question mark, never a traceback."""

from __future__ import annotations

import io
import os
import sys


def say(text: str) -> None:
    """Print one line at once, whatever encoding standard output has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    # In one piece, so that lines of several threads don't mix.
    print(text.encode(encoding, "replace").decode(encoding) + "\n", end="", flush=True)


def complain(text: str) -> None:
    """Print one line to standard error, in the same way."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding) + "\n", end="", file=sys.stderr, flush=True)


def accept_any_character() -> None:
    """For scripts whose libraries print by themselves: make both standard streams replace what they can't encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def abandon_output() -> None:
    """Nobody reads standard output any more: what is left in its buffer goes nowhere, without a complaint at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
