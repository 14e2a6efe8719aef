"""Where a call is made: in which session, by which agent, and whether inside a call that is being recorded.

A context variable holds the place. Tasks inherit it, so whatever a program starts inside a session belongs to it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from durable_autogen.errors import NotDurable

if TYPE_CHECKING:
    from durable_autogen.record.session import Session

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Who is at work in a session."""

    session: Session
    agent: str = ""
    """The name under which calls are recorded; empty for the program itself."""
    path: str = ""
    """What the names of agents that work inside begin with."""
    is_inside: bool = False
    """Whether an agent or a team is at work, and not the program itself."""
    in_call: bool = False
    """Whether a call is being recorded: what happens inside belongs to its result."""
    ends_in_order: bool = False
    """Whether the agents that work inside work side by side, so that the order of their ends is recorded."""
    must_not_raise: bool = False
    """Whether the agent at work waits for ever for a tool that raises."""
    is_beside_others: bool = False
    """Whether some agent around works side by side with others."""
    hands_on_late: bool = False
    """Whether what the agent says is handed on only when it says the next thing, while others are at work."""
    owner: Any = None
    """The agent or team at work."""

    def inside(self, name: str) -> str:
        """The name of an agent that works inside."""
        return f"{self.path}/{name}" if self.path else name


current: ContextVar[Place | None] = ContextVar("durable_place", default=None)
recorded_call: ContextVar[str] = ContextVar("durable_call", default="")


def call_id() -> str:
    """Return the id of the recorded tool call that is being made; empty outside one.

    No other call has this id, in this session or another; a re-run that makes the call again has the same one. Use it
    as an idempotency key.
    """
    return recorded_call.get()


def recording_place() -> Place | None:
    """The place whose session has to record what is called now; None if no session has to.

    Raises NotDurable where it would have to and can't: after the session's end, and in another event loop.
    """
    place = current.get()
    if place is None or place.in_call:
        return None
    session = place.session
    if session.is_over:
        raise NotDurable(
            f"session {session.session_id} has ended, and this call was started inside it: wait for it before the "
            "session ends, or start it outside"
        )
    if session.loop is not asyncio.get_running_loop():
        raise NotDurable(
            f"this call belongs to session {session.session_id} and is made in another event loop, where it can't be "
            "recorded: make it in the session's loop (asyncio.run_coroutine_threadsafe), or inside a tool"
        )
    return place


@contextmanager
def at(place: Place | None) -> Iterator[None]:
    """Work at this place for the length of a `with`."""
    token = current.set(place)
    try:
        yield
    finally:
        try:
            current.reset(token)
        except ValueError:  # ended in another context, which never had this value
            current.set(None)


def started_at(place: Place | None, call: Awaitable[T]) -> asyncio.Future[T]:
    """Start the call as a task that works at this place."""

    async def run() -> T:
        return await call

    context = contextvars.copy_context()
    context.run(current.set, place)
    return context.run(asyncio.ensure_future, run())


@asynccontextmanager
async def closing(stream: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T], None]:
    """Close the stream at the end of a `with`: a loop that is left in the middle leaves it open."""
    try:
        yield stream
    finally:
        close: Any = getattr(stream, "aclose", None)
        if close is not None:
            await close()


async def steps_at(place: Place | None, stream: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """Pass on the stream's items; each of its steps works at this place, and its consumer does not."""
    steps = stream.__aiter__()
    try:
        while True:
            with at(place):
                try:
                    item = await steps.__anext__()
                except StopAsyncIteration:
                    return
            yield item
    finally:
        close: Any = getattr(steps, "aclose", None)
        if close is not None:
            with at(place):
                await close()
