"""End a process, say how a process ended, and say what a run loses on a published server."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from nexum_engine import published
from nexum_engine.errors import NexumError
from support.console import say

ROOT = Path(__file__).resolve().parent.parent
CANT_RUN = (1, 2)  # exit codes of a script that gave up with an error


class DrillFailed(NexumError):
    """A drill could not finish, because a process didn't die or work as planned."""


def kill_this_process() -> NoReturn:
    """Kill this process without clean-up: no `finally` block and no exit handler runs."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    # Windows has no SIGKILL. There, os.kill with SIGTERM calls TerminateProcess.
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    # The first process of a container can't kill itself: Linux ignores the signal. So end it with the exit code that
    # shells give for SIGKILL.
    os._exit(137)


def death_in_words(code: int | None) -> str:
    """Return how a child process ended, from its exit code: "killed by SIGKILL" or "exit 1"."""
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit {code}"


def say_what_is_lost(address: str, losses: str) -> None:
    """Print in one line what a script loses on a published Nexum server. Turn off the client's own warning."""
    say(f"[demo] {address} is a published Nexum server: {losses}")
    published.logger.setLevel(logging.ERROR)
