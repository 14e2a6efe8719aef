"""Run a function within its time limits, so that a failing or hung function can't end or block the process."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nexum_engine.deadline import Deadline
from nexum_engine.event_loop import call_in


class StillRunning(Exception):
    """The function has not returned within its time limits."""


@dataclass(frozen=True)
class _Outcome:
    """What a function returned or raised."""

    value: object = None
    error: BaseException | None = None


async def run_contained(function: Callable[[], object], name: str, deadline: Deadline) -> object:
    """Call the function, in a new thread unless it is async. Return its result or raise its error.

    When a limit of `deadline` is exceeded, abandon the function and raise StillRunning. A BaseException from the
    function becomes a RuntimeError, so that a tool's CancelledError or SystemExit doesn't cancel or end the worker.
    """
    running: asyncio.Future[_Outcome]
    if inspect.iscoroutinefunction(_innermost(function)):
        running = asyncio.ensure_future(_awaited(function))
    else:
        running = _in_thread(function, name)
    try:
        # Don't use wait_for: it would wait until the function has handled its cancellation.
        done = await deadline.in_time(running)
    finally:
        running.cancel()
    if not done:
        raise StillRunning
    outcome = running.result()
    match outcome.error:
        case None:
            return outcome.value
        case Exception() as error:
            raise error
        case error:
            raise RuntimeError(f"{name} raised {type(error).__name__}: {error}") from error


async def _awaited(function: Callable[[], object]) -> _Outcome:
    try:
        result = function()
        assert isinstance(result, Awaitable)
        return _Outcome(value=await result)
    except BaseException as error:  # noqa: BLE001  (handed to the caller, as run_contained says)
        return _Outcome(error=error)


def _in_thread(function: Callable[[], object], name: str) -> asyncio.Future[_Outcome]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Outcome] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(outcome: _Outcome) -> None:
        if not future.done():
            future.set_result(outcome)

    def body() -> None:
        try:
            outcome = _Outcome(value=context.run(function))
        except BaseException as error:  # noqa: BLE001  (handed to the caller, as run_contained says)
            outcome = _Outcome(error=error)
        call_in(loop, deliver, outcome)  # if the loop is closed, no caller waits for the outcome

    # Start a daemon thread instead of using a pool: a hung call must not keep the process alive or block other calls.
    threading.Thread(target=body, name=f"tool {name}", daemon=True).start()
    return future


def _innermost(function: Callable[[], object]) -> Callable[..., object]:
    return getattr(function, "func", function)
