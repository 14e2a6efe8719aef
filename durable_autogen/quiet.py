"""When an event loop has come to rest: nothing can run until something arrives from outside.

What one recorded event sets off is over then, so that events which are let out one at a time, each when the loop is at
rest, have the same effects in every run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

ROUNDS_WITHOUT_A_LOOK = 100  # turns of a loop whose queue can't be seen
PATIENCE = 5.0  # seconds after which a loop that never rests is taken as it is
LESS_PATIENCE = 0.05  # seconds, once that is known of it
THREAD_LOOK_INTERVAL = 0.0005  # seconds

logger = logging.getLogger(__name__)

in_recorded_call: ContextVar[bool] = ContextVar("in_recorded_call", default=False)
"""Set inside a call whose outcome is recorded: what it does, and how long that takes, is outside the program."""

_waiting: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()
_restless: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
_threads: WeakKeyDictionary[asyncio.AbstractEventLoop, _WatchedThreads] = WeakKeyDictionary()


async def rest() -> None:
    """Return when nothing but this is ready to run."""
    loop = asyncio.get_running_loop()
    # asyncio has no public way to see its queue; a loop without this attribute gets a number of turns instead.
    ready = getattr(loop, "_ready", None)
    threads = _threads.get(loop)
    _waiting[loop] = _waiting.get(loop, 0) + 1
    begun = time.monotonic()
    turns = 0
    try:
        while True:
            await asyncio.sleep(0)
            turns += 1
            if threads is not None and threads.busy:
                await asyncio.sleep(THREAD_LOOK_INTERVAL)
            # Others that wait for rest are always ready.
            elif len(ready) < _waiting[loop] if ready is not None else turns >= ROUNDS_WITHOUT_A_LOOK:
                return
            if time.monotonic() - begun > (PATIENCE if loop not in _restless else LESS_PATIENCE):
                if loop not in _restless:
                    logger.warning("the event loop did not come to rest within %g s: not waiting for it", PATIENCE)
                _restless.add(loop)
                return
    finally:
        _waiting[loop] -= 1


class _WatchedThreads(ThreadPoolExecutor):
    """The loop's threads. Counts what the program itself runs in them, as AutoGen does for every plain function."""

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="durable")
        self.busy = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(_without_stop_iteration, fn, *args, **kwargs)
        if not in_recorded_call.get():
            loop = asyncio.get_running_loop()
            self.busy += 1
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._done))
        return future

    def _done(self) -> None:
        self.busy -= 1


def _without_stop_iteration(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    try:
        return fn(*args, **kwargs)
    except StopIteration as error:
        # A future can't hold one: who waits for it would wait for ever.
        raise RuntimeError("StopIteration was raised: nothing was found where something was looked for") from error


@contextmanager
def watched_threads() -> Iterator[None]:
    """For the length of a `with`, a loop with a busy thread is not at rest."""
    loop = asyncio.get_running_loop()
    if loop in _threads:
        yield
        return
    before = getattr(loop, "_default_executor", None)
    threads = _threads[loop] = _WatchedThreads()
    loop.set_default_executor(threads)
    try:
        yield
    finally:
        del _threads[loop]
        threads.shutdown(wait=False)
        if hasattr(loop, "_default_executor"):
            loop._default_executor = before
