"""The clean-up of a program after Ctrl+C.

Ctrl+C cancels the task that opened the session, and so does whatever else cancels this task. The program may then make
calls in its `except` and `finally` blocks. A run that isn't cancelled makes these calls at another time, or not at all.
"""

from __future__ import annotations

import asyncio
import sys
from contextvars import ContextVar
from typing import Any

from durable_autogen.record.failures import times_cancelled

_cleaning_up: ContextVar[set[str] | None] = ContextVar("durable_cleaning_up", default=None)
"""The calls of the clean-up to which the current task, or the task that started it, belongs."""


class Cleanup:
    """The clean-up of one run. Created by the task that opens the session, before its first `await`."""

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._cancelled_before = times_cancelled(self._task)
        self.calls: set[str] = set()
        """The addresses of the clean-up's recorded calls."""

    def includes(self, caller: asyncio.Task[Any] | None) -> bool:
        """Return whether `caller`, the task that is running, cleans up.

        It does while it handles the CancelledError, and so do the tasks that it starts then. Other tasks, such as those
        of a team, may continue their work for a while. In Python 3.10, return False: it has no Task.cancelling.
        """
        is_cancelled = times_cancelled(self._task) > self._cancelled_before
        is_handling = isinstance(_handled_error(), asyncio.CancelledError)
        if not is_cancelled or (caller is self._task and not is_handling):
            # The program has handled the cancellation, as asyncio.timeout does. Its task may still count as cancelled:
            # a program may catch the error without Task.uncancel, and so does TaskGroup in Python 3.11 and 3.12.
            self.calls = set()
        elif is_handling:
            _cleaning_up.set(self.calls)
        return _cleaning_up.get() is self.calls


def _handled_error() -> BaseException | None:
    """Return the error that the current task handles, in an `except` or `finally`."""
    error = sys.exc_info()[1]
    # If a task leaves an async generator because of an error, the generator itself handles a GeneratorExit.
    return error.__context__ if isinstance(error, GeneratorExit) else error
