"""The work that a session gives to threads: see threads.py, which counts it, and idle.py, which waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ThreadWork:
    """A function of a session that runs in a thread, or waits for one."""

    def __init__(self) -> None:
        self.has_begun = False
        self.calls = 0
        """How many recorded calls the function has in progress: it passed them to the event loop, and waits there."""

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the function. A StopIteration that it raises becomes a RuntimeError."""
        self.has_begun = True
        try:
            return fn(*args, **kwargs)
        except StopIteration as error:
            # A future can't hold a StopIteration, so a task that awaits it would wait for ever.
            raise RuntimeError("StopIteration was raised: next() found nothing") from error


class Activity:
    """The work that a session gave to threads. While such work runs, the session isn't idle."""

    def __init__(self) -> None:
        self.in_threads: set[ThreadWork] = set()
        self.is_never_idle = False
        """Whether the session once stayed busy for `BUSY_PATIENCE` (idle.py). If so, later waits are shorter."""

    @property
    def is_in_thread(self) -> bool:
        """Whether a function of the session works in a thread, and doesn't wait for a recorded call.

        A function that waits for a thread counts, too, unless the thread may be one that waits for a recorded call.
        """
        some_wait = any(work.calls for work in self.in_threads)
        return any(not work.calls and (work.has_begun or not some_wait) for work in self.in_threads)
