"""Counting of the work that sessions give to threads: a session isn't idle while a thread works for it."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from durable_autogen.record.activity import ThreadWork
from durable_autogen.record.place import OpenSession, at, current
from durable_autogen.record.while_open import replaced, while_open
from nexum_engine.event_loop import call_in


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
