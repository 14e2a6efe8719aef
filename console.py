"""The scripts and their console.

What they print can be shown on any: a character that it doesn't know becomes a question mark, never a traceback.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from types import FrameType


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


def let_ctrl_c_cancel() -> None:
    """Ctrl+C cancels the running task, as `asyncio.run` does from Python 3.11 on.

    Before, it cancels every task there is, and prints a traceback for each that ends with another error.
    """
    if sys.version_info < (3, 11):
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        cancel = task.cancel

        def on_ctrl_c(number: int, _frame: FrameType | None) -> None:
            signal.signal(number, signal.default_int_handler)  # a second one interrupts
            loop.call_soon_threadsafe(cancel)

        signal.signal(signal.SIGINT, on_ctrl_c)
