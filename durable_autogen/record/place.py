"""The place of a call: its session, its agent, and whether it is inside a call that is being recorded.

A context variable holds the place. Tasks inherit it, so all tasks that a program starts inside a session belong to it.
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
    """The agent or program at work in a session."""

    session: Session
    agent: str = ""
    """The name under which calls are recorded; empty for the program itself."""
    path: str = ""
    """The prefix of the names of agents that work inside this one."""
    is_inside: bool = False
    """Whether an agent or a team is at work; False for the program itself."""
    in_call: bool = False
    """Whether a call is being recorded: calls inside it belong to its result."""
    ends_in_order: bool = False
    """Whether the agents inside work in parallel: then the order in which their turns end is recorded."""
    must_not_raise: bool = False
    """Whether a tool that raises would block the agent for ever."""
    is_beside_others: bool = False
    """Whether the agent, or one that it works for, works in parallel with others."""
    hands_on_late: bool = False
    """Whether each of the agent's messages is passed on only with the next one, while other agents work."""
    owner: Any = None
    """The agent or team at work."""

    def inside(self, name: str) -> str:
        """Return the recorded name of an agent that works inside this one."""
        return f"{self.path}/{name}" if self.path else name


current: ContextVar[Place | None] = ContextVar("durable_place", default=None)
recorded_call: ContextVar[str] = ContextVar("durable_call", default="")


def call_id() -> str:
    """Return the id of the recorded tool call that is being made; empty outside a tool call.

    The id is unique over all sessions, and the same if a re-run makes the call again. Use it as an idempotency key.
    """
    return recorded_call.get()


def recording_place() -> Place | None:
    """Return the place whose session has to record the current call; None if no session has to.

    Raises NotDurable if the session can't record the call: after the session's end, or in another event loop.
    """
    place = current.get()
    if place is None or place.in_call:
        return None
    session = place.session
    if session.is_over:
        raise NotDurable(
            f"session {session.session_id} has ended, and this call was started inside it: await the call before the "
            "session ends, or start it outside"
        )
    if session.loop is not asyncio.get_running_loop():
        raise NotDurable(
            f"this call of session {session.session_id} can't be recorded: it is made in another event loop. Make it "
            "in the session's loop (asyncio.run_coroutine_threadsafe), or inside a tool"
        )
    return place


@contextmanager
def at(place: Place | None) -> Iterator[None]:
    """Set the current place for the length of a `with`."""
    token = current.set(place)
    try:
        yield
    finally:
        try:
            current.reset(token)
        except ValueError:  # this context is not the one that set the value
            current.set(None)


def started_at(place: Place | None, call: Awaitable[T]) -> asyncio.Future[T]:
    """Return a new task that awaits the call at this place."""

    async def run() -> T:
        return await call

    context = contextvars.copy_context()
    context.run(current.set, place)
    return context.run(asyncio.ensure_future, run())


@asynccontextmanager
async def closing(stream: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T], None]:
    """Close the stream at the end of a `with`: an `async for` that is left early doesn't close it."""
    try:
        yield stream
    finally:
        close: Any = getattr(stream, "aclose", None)
        if close is not None:
            await close()


async def steps_at(place: Place | None, stream: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """Yield the stream's items. The stream's steps run at this place; the consumer keeps its own."""
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
