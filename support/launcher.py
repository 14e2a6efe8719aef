"""Provide a server and a worker for one run of a script. The worker that the script starts ends with it."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from nexum_engine.embedded import Child, EmbeddedNexum, start_child

ROOT = Path(__file__).resolve().parent.parent


def kill_this_process() -> NoReturn:
    """Kill this process without clean-up: no `finally` block and no exit handler runs."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    # Windows has no SIGKILL. There, os.kill with SIGTERM calls TerminateProcess.
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    raise SystemError("unreachable: this process was killed")


class NexumForRun(EmbeddedNexum):
    """An EmbeddedNexum that starts this project's worker scripts."""

    def __init__(
        self,
        address: str | None,
        *,
        workers: tuple[str, ...] = ("worker.py",),
        owners: bool = False,
    ) -> None:
        super().__init__(address, workers=[ROOT / script for script in workers], owners=owners)


__all__ = ["ROOT", "Child", "NexumForRun", "kill_this_process", "start_child"]
