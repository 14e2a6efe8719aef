"""Helpers for asyncio's tasks and streams: run them, end them, and find out why they ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()
"""The mark in a queue of items that no further item comes."""


async def ordinary(call: Awaitable[T], name: str) -> T:
    """Await a call; turn SystemExit and other exceptions that don't derive from Exception into a RuntimeError.

    Inside a task, such an exception would end the event loop. CancelledError is raised unchanged.
    """
    try:
        return await call
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise made_ordinary(error, name) from error


async def cancel_and_wait(running: asyncio.Future[Any], patience: float | None = None) -> None:
    """Cancel a task if it isn't done, and wait for its end, for `patience` seconds at most if that is not None.

    Retrieve the task's error, so that asyncio doesn't log it.
    """
    if not running.done():
        running.cancel()
        await asyncio.wait({running}, timeout=patience)
    if running.done() and not running.cancelled():
        running.exception()


def made_ordinary(error: BaseException, name: str) -> RuntimeError:
    """Return a RuntimeError in place of an exception that would block a framework or end the event loop."""
    return RuntimeError(f"{name} ended with {type(error).__name__}: {error}")


def times_cancelled(task: asyncio.Task[Any] | None) -> int:
    """Return how many cancellations of a task are in progress."""
    # Return 0 in Python 3.10: it has no Task.cancelling.
    return 0 if task is None else int(getattr(task, "cancelling", lambda: 0)())


def is_cancellation(error: BaseException) -> bool:
    """Return whether a run that ends with this error was cancelled from outside, as by Ctrl+C."""
    return isinstance(error, (asyncio.CancelledError, KeyboardInterrupt))


@asynccontextmanager
async def closing(stream: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T], None]:
    """Close a stream at the end of a `with`. Python doesn't close it when an `async for` is left early."""
    try:
        yield stream
    finally:
        close: Any = getattr(stream, "aclose", None)
        if close is not None:
            await close()


async def items_of(running: asyncio.Future[Any], items: asyncio.Queue[Any]) -> AsyncGenerator[Any, None]:
    """Yield the items that a task puts into a queue, until the task is over. Cancel it if the consumer leaves."""
    running.add_done_callback(lambda _: items.put_nowait(_END))
    try:
        while (item := await items.get()) is not _END:
            yield item
    finally:
        await cancel_and_wait(running)
