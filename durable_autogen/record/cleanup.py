"""The clean-up of a program after Ctrl+C.

Ctrl+C cancels the task that opened the session, and so does whatever else cancels this task. The program may then make
calls in its `except` and `finally` blocks. A run that isn't cancelled makes these calls at another time, or not at all.
"""

from __future__ import annotations

import asyncio
import sys
from contextvars import ContextVar
from typing import Any

from durable_autogen.record.tasks import is_cancellation, times_cancelled

_cleaning_up: ContextVar[set[str] | None] = ContextVar("durable_cleaning_up", default=None)
"""The calls of the clean-up to which the current task, or the task that started it, belongs."""


class Cleanup:
    """The clean-up of one run. Created by the task that opens the session, before its first `await`.

    In Python 3.10, no call counts as part of a clean-up: its tasks have no Task.cancelling.
    """

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._cancelled_before = times_cancelled(self._task)
        self.calls: set[str] = set()
        """The addresses of the clean-up's recorded calls."""

    @property
    def _is_due(self) -> bool:
        """Whether the task that opened the session counts as cancelled. It may have handled that long ago."""
        return times_cancelled(self._task) > self._cancelled_before

    def notice(self) -> None:
        """Find out whether the current task cleans up: whether it handles a CancelledError. Tasks inherit the answer.

        So a task that makes calls has to call `notice` before it starts a task for the call.
        """
        is_handling = isinstance(_handled_error(), asyncio.CancelledError)
        if not self._is_due or (asyncio.current_task() is self._task and not is_handling):
            # The program has handled the cancellation, as asyncio.timeout does. Its task may still count as cancelled:
            # a program may catch the error without Task.uncancel, and so does TaskGroup in Python 3.11 and 3.12.
            self.calls = set()
        elif is_handling:
            _cleaning_up.set(self.calls)

    def of_this_task(self) -> set[str] | None:
        """Return `calls` if the current task cleans up, or was started by a task that did; else None.

        Other tasks, such as those of a team, may continue their work for a while.
        """
        return self.calls if _cleaning_up.get() is self.calls else None

    def of_cancelled(self, caller: asyncio.Task[Any] | None) -> set[str] | None:
        """Return `calls` if the call that `caller` gives up now is given up because of Ctrl+C; else None."""
        return self.calls if self._is_due and times_cancelled(caller) > 0 else None

    def is_end(self, error: BaseException) -> bool:
        """Return whether a run ends with `error` because it was cancelled. A clean-up may itself have failed."""
        one: BaseException | None = error
        while one is not None and self._is_due and not is_cancellation(one):
            one = one.__context__
        return one is not None and is_cancellation(one)


def _handled_error() -> BaseException | None:
    """Return the error that the current task handles, in an `except` or `finally`."""
    error = sys.exc_info()[1]
    # If a task leaves an async generator because of an error, the generator itself handles a GeneratorExit.
    return error.__context__ if isinstance(error, GeneratorExit) else error
