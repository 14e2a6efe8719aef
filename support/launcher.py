"""Server and worker for one run of a script: the ones that answer already, or children that can't outlive it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from nexum_engine.embedded import Child, EmbeddedNexum, start_child

ROOT = Path(__file__).resolve().parent.parent


def kill_this_process() -> NoReturn:
    """Crash for real: no clean-up, no exception, nothing runs after it."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Windows has no SIGKILL; there os.kill is TerminateProcess for every other signal.
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    raise SystemError("unreachable: this process was killed")


class NexumForRun(EmbeddedNexum):
    """An EmbeddedNexum with this project's workers."""

    def __init__(
        self,
        address: str | None,
        *,
        workers: tuple[str, ...] = ("worker.py",),
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(address, workers=[ROOT / script for script in workers], meanwhile=meanwhile)


__all__ = ["ROOT", "Child", "NexumForRun", "kill_this_process", "start_child"]
