"""Waiting until a session is idle.

A session is idle when none of its code is ready to run. The program has then handled the last event. A session delivers
its events one at a time, and each event only when the session is idle. So the program handles an event in a replay as
it did in the recorded run.

Other sessions and other tasks of the event loop don't delay the wait, and the wait doesn't delay them.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Any
from weakref import WeakKeyDictionary

from durable_autogen.record.place import OpenSession, current

TURNS_WITHOUT_A_LOOK = 100  # turns of the event loop to wait if its queue can't be read (uvloop)
BUSY_PATIENCE = 5.0  # seconds to wait for a session to be idle
BUSY_TURNS = 1000
"""How many turns of the event loop this wait lasts at least. If each turn takes long (for instance, because hundreds of
sessions share the loop), a session needs seconds for its usual work."""
LESS_BUSY_PATIENCE = 0.05  # seconds to wait for a session that once stayed busy for BUSY_PATIENCE
THREAD_LOOK_INTERVAL = 0.0005  # seconds

logger = logging.getLogger(__name__)


class _Waiting:
    def __init__(self, session: OpenSession) -> None:
        loop = asyncio.get_running_loop()
        self.session = session
        self.idle: asyncio.Future[None] = loop.create_future()
        self.turns = 0
        self.begun = loop.time()


class _Watcher:
    """The watcher of the running event loop's queue. It reads the queue at every turn while a session waits.

    While no session waits, the watcher holds no reference to the loop, so that a closed loop is freed.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._watching: asyncio.Task[None] | None = None

    def is_idle_now(self, session: OpenSession) -> bool:
        """Return whether the session is idle and no earlier caller waits for it. If so, a new caller need not wait."""
        ready = _queue()
        return (
            ready is not None
            and not session.activity.is_in_thread
            and all(waiting.session is not session for waiting in self._waiting)
            and id(session) not in _sessions_ready_to_run(ready)
        )

    async def wait(self, session: OpenSession) -> None:
        waiting = _Waiting(session)
        self._waiting.append(waiting)
        if self._watching is None or self._watching.done():
            # Run the watcher in an empty context: otherwise it would count as work of the first waiting session.
            context = contextvars.Context()
            self._watching = context.run(asyncio.ensure_future, self._watch())
        try:
            await waiting.idle
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    async def _watch(self) -> None:
        ready = _queue()
        try:
            while self._waiting:
                threads_only = all(waiting.session.activity.is_in_thread for waiting in self._waiting)
                await asyncio.sleep(THREAD_LOOK_INTERVAL if threads_only else 0)
                busy = None if ready is None else _sessions_ready_to_run(ready)
                for waiting in list(self._waiting):
                    waiting.turns += 1
                    if _is_idle(waiting, busy):
                        self._waiting.remove(waiting)
                        if not waiting.idle.done():
                            waiting.idle.set_result(None)
        finally:
            self._watching = None


def _is_idle(waiting: _Waiting, busy: set[int] | None) -> bool:
    activity = waiting.session.activity
    if not activity.is_in_thread:
        if busy is None:
            if waiting.turns >= TURNS_WITHOUT_A_LOOK:
                return True
        elif id(waiting.session) not in busy:
            return True
    patience = LESS_BUSY_PATIENCE if activity.is_never_idle else BUSY_PATIENCE
    if asyncio.get_running_loop().time() - waiting.begun < patience:
        return False
    if not activity.is_never_idle:
        if not activity.is_in_thread and waiting.turns < BUSY_TURNS:
            return False
        logger.warning(
            "session %s has been busy for %g s: from now on, its events are delivered even if it is not idle",
            waiting.session.session_id,
            BUSY_PATIENCE,
        )
    activity.is_never_idle = True
    return True


def _queue() -> Any:
    """Return the queue of the running event loop; None if the loop has none that can be read (uvloop)."""
    # Read a private attribute: asyncio has no public way to read the loop's queue.
    return getattr(asyncio.get_running_loop(), "_ready", None)


def _sessions_ready_to_run(ready: Any) -> set[int]:
    found = set()
    for handle in list(ready):
        context = handle._context
        place = None if context is None else context.get(current)
        if place is not None and not place.in_call and not handle._cancelled:
            found.add(id(place.session))
    return found


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Watcher] = WeakKeyDictionary()


async def idle(session: OpenSession) -> None:
    """Wait until no code of a session is ready to run.

    Call `idle` from a task of that session. The calling task isn't counted.
    """
    loop = asyncio.get_running_loop()
    watcher = _watchers.get(loop)
    if watcher is None:
        watcher = _watchers[loop] = _Watcher()
    if not watcher.is_idle_now(session):
        await watcher.wait(session)
