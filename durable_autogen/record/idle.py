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
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from durable_autogen.record.place import OpenSession, ThreadWork, at, current
from durable_autogen.record.while_open import replaced, while_open
from nexum_engine.event_loop import call_in

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


# ---- Threads ---------------------------------------------------------------------------------------------------------


@while_open
def watched_threads() -> Iterator[None]:
    """Count the work that sessions give to threads.

    `ThreadPoolExecutor.submit` and `Thread.start` are wrapped, so that a thread knows its session. The program
    keeps using its own executors.
    """
    with replaced(threading.Thread, "start", _start), replaced(ThreadPoolExecutor, "submit", _submit):
        yield


def _submit(original: Callable[..., Future[Any]]) -> Callable[..., Future[Any]]:
    def submit(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        place = current.get()
        if place is None or place.session.is_over:
            return original(self, fn, *args, **kwargs)
        # Copy the context, because it holds the session. run_in_executor doesn't copy it.
        context, work = contextvars.copy_context(), ThreadWork()
        # `asyncio.to_thread` passes `partial(Context.run, function)`: the function then runs in that context.
        own = getattr(getattr(fn, "func", None), "__self__", None)
        for one in (context, own):
            if isinstance(one, contextvars.Context):
                with suppress(RuntimeError):  # another thread runs a function in this context now
                    one.run(_thread_work.set, work)
        if has_interpreters(self):
            future = original(self, fn, *args, **kwargs)
        else:
            future = original(self, context.run, work.run, fn, *args, **kwargs)
        if not place.in_call:
            _count_until_done(future, work, place.session)
        return future

    return submit


_thread_work: ContextVar[ThreadWork | None] = ContextVar("durable_thread_work", default=None)


@contextmanager
def call_of_a_thread() -> Iterator[None]:
    """For the length of a `with`, a recorded call is in progress.

    If a function in a thread makes the call (by `run_coroutine_threadsafe`), the function waits for the call's result.
    So the session doesn't wait for the function before it delivers this result.
    """
    work = _thread_work.get()
    if work is None:
        yield
        return
    work.calls += 1
    try:
        yield
    finally:
        work.calls -= 1


def _count_until_done(future: Future[Any], work: ThreadWork, session: OpenSession) -> None:
    """Count a function that the session gave to an executor as the session's work, until `future` is done."""
    loop = session.loop
    session.activity.in_threads.add(work)

    def done() -> None:
        session.activity.in_threads.discard(work)

    # The caller adds its own callback after it gets the future. Add this one in the event loop's next turn, so that it
    # runs after the caller's callback.
    loop.call_soon_threadsafe(future.add_done_callback, lambda _: call_in(loop, done))


def has_interpreters(pool: ThreadPoolExecutor) -> bool:
    """Return whether the pool runs functions in other interpreters (Python 3.14). No context can be passed to those."""
    module = sys.modules.get("concurrent.futures.interpreter")
    return module is not None and isinstance(pool, module.InterpreterPoolExecutor)


def _start(original: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    def start(self: threading.Thread) -> None:
        place = current.get()
        if place is None or place.session.is_over:
            original(self)
            return
        target: Any = getattr(self, "_target", None)
        if getattr(target, "__module__", "") == "concurrent.futures.thread":
            # Start a pool's thread without a place: the thread outlives the session, and each function that the thread
            # runs brings its own context. If the place were set here, Python 3.14 could copy it into the thread (with
            # -X thread_inherit_context, or in a free-threaded build).
            with at(None):
                original(self)
            return
        run = self.run
        if getattr(self, "_context", None) is None:
            context = contextvars.copy_context()
            self.run = lambda: context.run(run)  # type: ignore[method-assign]
        else:
            # The program passed Thread(context=...), as Python 3.14 allows. Set the session in that context, too.
            def run_at_place() -> None:
                with at(place):
                    run()

            self.run = run_at_place  # type: ignore[method-assign]
        original(self)

    return start
