"""How long an attempt at a call may take: in all, and without a heartbeat."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")


class Deadline:
    """The time limits of one attempt, which begins now.

    The attempt may take `timeout` seconds in all, and at most `heartbeat` seconds may pass between two calls of `beat`.
    None means no limit.
    """

    def __init__(self, timeout: float | None, heartbeat: float | None = None) -> None:
        self._timeout = timeout
        self._heartbeat = heartbeat
        self._began = self._beat_at = time.monotonic()

    @property
    def is_limited(self) -> bool:
        """Whether the attempt has any limit."""
        return self._timeout is not None or self._heartbeat is not None

    def beat(self) -> None:
        """Note that the attempt makes progress. May be called from any thread."""
        self._beat_at = time.monotonic()

    def start(self, call: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
        """Start `call()` and return its future. While it runs, `heartbeat()` reports to this deadline."""
        context = contextvars.copy_context()
        context.run(_current.set, self)
        return context.run(lambda: asyncio.ensure_future(call()))

    async def in_time(self, running: asyncio.Future[Any]) -> bool:
        """Wait until `running` is done or a limit is exceeded. Return whether `running` is done."""
        while not running.done():
            left = self._left()
            if left is not None and left <= 0:
                return False
            await asyncio.wait({running}, timeout=left)
        return True

    def _left(self) -> float | None:
        """Return the seconds that are left. None if there is no limit."""
        ends = []
        if self._timeout is not None:
            ends.append(self._began + self._timeout)
        if self._heartbeat is not None:
            ends.append(self._beat_at + self._heartbeat)
        return min(ends) - time.monotonic() if ends else None

    def exceeded(self) -> str:
        """Return words for the limit that was exceeded. They continue a sentence that begins with the tool's name."""
        if self._timeout is not None and time.monotonic() >= self._began + self._timeout:
            return f"took longer than its time limit of {self._timeout:g} s"
        return f"sent no heartbeat for {self._heartbeat:g} s"


_current: ContextVar[Deadline | None] = ContextVar("nexum_deadline", default=None)


def heartbeat() -> None:
    """Report, from within a tool, that its call makes progress. Works in each thread that the call runs in.

    If the tool's policy sets `heartbeat`, an attempt with a longer gap between two reports counts as over its time
    limit. If the policy doesn't set it, this function does nothing.
    """
    deadline = _current.get()
    if deadline is not None:
        deadline.beat()
