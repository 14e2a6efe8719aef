"""The clean-up of a program after Ctrl+C.

Ctrl+C cancels the task that opened the session, and so does whatever else cancels this task. The program may then make
calls in its `except` and `finally` blocks. A run that isn't cancelled makes these calls at another time, or not at all.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from durable_autogen.record.place import current
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
        """Find out whether the current task cleans up: if it handles a CancelledError. Tasks inherit the answer."""
        is_handling = isinstance(_handled_error(), asyncio.CancelledError)
        if not self._is_due or (asyncio.current_task() is self._task and not is_handling):
            # The program has handled the cancellation, as asyncio.timeout does. Its task may still count as cancelled:
            # a program may catch the error without Task.uncancel, and so does TaskGroup in Python 3.11 and 3.12.
            self.calls = set()
        elif is_handling:
            _cleaning_up.set(self.calls)

    def is_here(self) -> bool:
        """Return whether the current task cleans up now: whether it handles the CancelledError of a cancelled run."""
        return self._is_due and isinstance(_handled_error(), asyncio.CancelledError)

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


class _TaskFactory:
    """The task factory of an event loop in which sessions are open. It starts each task as the loop did `before`.

    A task can't find out later whether the task that started it was cleaning up: only the starting task knows that it
    handles a CancelledError.
    """

    def __init__(self, before: Any) -> None:
        self.before = before
        self.sessions = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Any:
        start = self.before or _start
        place = current.get()
        if place is None or not place.session.cleanup.is_here():
            return start(loop, work, **options)
        token = _cleaning_up.set(place.session.cleanup.calls)
        try:
            return start(loop, work, **options)
        finally:
            _cleaning_up.reset(token)


def _start(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(work, loop=loop, **options)


@contextmanager
def watched_tasks() -> Iterator[None]:
    """For the length of a `with`, let each task that a clean-up starts in this event loop belong to the clean-up."""
    loop = asyncio.get_running_loop()
    present: Any = loop.get_task_factory()
    factory = present if isinstance(present, _TaskFactory) else _TaskFactory(present)
    loop.set_task_factory(factory)
    factory.sessions += 1
    try:
        yield
    finally:
        factory.sessions -= 1
        if factory.sessions == 0 and loop.get_task_factory() is factory:
            loop.set_task_factory(factory.before)


def _handled_error() -> BaseException | None:
    """Return the error that the current task handles, in an `except` or `finally`."""
    error = sys.exc_info()[1]
    # If a task leaves an async generator because of an error, the generator itself handles a GeneratorExit.
    return error.__context__ if isinstance(error, GeneratorExit) else error
