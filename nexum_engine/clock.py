"""The clock of the engine, and a wait with a time limit. Tests move a ManualClock instead of waiting."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """A source of the time, in milliseconds since 1970, UTC."""

    def now_ms(self) -> int: ...

    def follow(self, earliest_ms: int, latest_ms: int) -> None:
        """Adjust this clock to the clock that all servers of a database share.

        The shared clock's time is now between `earliest_ms` and `latest_ms`.
        """
        ...


class SystemClock:
    """A clock that starts at the system's time. Later corrections of the system's time don't make a lease expire."""

    def __init__(self) -> None:
        self._read_ns = time.monotonic_ns()
        self._offset_ns = time.time_ns() - self._read_ns
        self._now_ns = 0

    def now_ms(self) -> int:
        read_ns = time.monotonic_ns()
        # The time must not go back. If this clock is ahead of the clock that it follows, run at half speed: while a
        # clock stands still, no timer and no lease ends.
        slow_ns = self._now_ns + (read_ns - self._read_ns) // 2
        self._read_ns, self._now_ns = read_ns, max(self._offset_ns + read_ns, slow_ns)
        return self._now_ns // 1_000_000

    def follow(self, earliest_ms: int, latest_ms: int) -> None:
        now_ns = self._offset_ns + time.monotonic_ns()
        self._offset_ns += max(earliest_ms * 1_000_000 - now_ns, 0) + min(latest_ms * 1_000_000 - now_ns, 0)


class ManualClock:
    """A clock that stands still until `advance` is called."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        return self._now_ms

    def follow(self, earliest_ms: int, latest_ms: int) -> None:
        """Do nothing: only `advance` moves this clock."""

    def advance(self, seconds: float) -> None:
        """Move the time forward."""
        self._now_ms += round(seconds * 1000)


async def wait_until_set(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, but at most `seconds`. Return whether it is set.

    Use this function instead of asyncio.wait_for. On Python 3.10 and 3.11, asyncio.wait_for loses a cancellation that
    comes together with the result, so the cancelled task would run on.
    """
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()
    return event.is_set()
