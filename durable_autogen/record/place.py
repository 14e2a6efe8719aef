"""The place of a call: its session, its agent, and whether it is made inside another recorded call.

A context variable holds the place. Tasks inherit the variable, so a task that a program starts inside a session belongs
to that session.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from durable_autogen.errors import NotDurable
from durable_autogen.record.activity import Activity
from durable_autogen.record.events import Call, Event

T = TypeVar("T")


class OpenSession(Protocol):
    """The part of `Session` (session.py) that a place uses.

    The Recorder, the Guard and the Cleanup of the run have the type Any, because their modules import this one.
    """

    session_id: str
    is_over: bool
    activity: Activity

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    @property
    def recorder(self) -> Any: ...

    @property
    def guard(self) -> Any: ...

    @property
    def cleanup(self) -> Any: ...

    @property
    def state(self) -> Any:
        """The state that the framework's entry points keep for the session."""

    def differences(self, recorded: Event, now: Call, find: Callable[[str], Event | None]) -> list[str]: ...

    def left_the_record(self, agent: str, what: str) -> None: ...


@dataclass(frozen=True)
class Place:
    """The agent or program at work in a session."""

    session: OpenSession
    agent: str = ""
    """The agent's name, under which its calls are recorded; empty for the program itself."""
    path: str = ""
    """The prefix for the names of the agents inside this agent or team."""
    in_call: bool = False
    """Whether a recorded call is being made. Calls made inside that call are not recorded separately."""
    is_beside_others: bool = False
    """Whether the agent, or a team that contains it, works in parallel with others."""
    passes_on_late: bool = False
    """Whether AutoGen holds back each message of this agent until the agent yields its next message."""
    at_work: Any = None
    """The agent, team or termination condition at work; None for the program itself."""
    around: Place | None = None
    """The place at which the session was opened, if that was inside another session."""

    @property
    def is_inside(self) -> bool:
        """Whether an agent or a team is at work, and not the program itself."""
        return self.at_work is not None

    def inside(self, name: str) -> str:
        """Return the name under which an agent inside this agent or team is recorded."""
        return f"{self.path}/{name}" if self.path else name


current: ContextVar[Place | None] = ContextVar("durable_place", default=None)
current_call_id: ContextVar[str] = ContextVar("durable_call", default="")


def call_id() -> str:
    """Return the id of the recorded tool call that is being made; empty outside a tool call.

    The id is unique across all sessions. It names the call's place in the session, the tool and its arguments. It stays
    the same if a later run makes the call again, after a crash or a failure, so use it as an idempotency key. After
    drift, the changed program's call gets a new id.
    """
    return current_call_id.get()


def late_call(session: OpenSession) -> NotDurable:
    """Return the error of a call that is made when its session has ended, or while its end is being recorded."""
    return NotDurable(
        f"session {session.session_id} has ended, and this call was started inside it: await the call before the "
        "session ends, or start it outside"
    )


def recording_place() -> Place | None:
    """Return the place of the current call; None if no session has to record the call.

    Raises NotDurable if the session has ended, or if the call is made in another event loop than the session's, or in a
    forked process.
    """
    place = current.get()
    if place is None or place.in_call:
        return None
    session = place.session
    if session.is_over:
        raise late_call(session)
    if session.loop is not asyncio.get_running_loop():
        raise NotDurable(
            f"this call of session {session.session_id} can't be recorded: it is made in another event loop or in a "
            "forked process. Make it in the session's loop (asyncio.run_coroutine_threadsafe), or inside a tool"
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
        except ValueError:  # the `with` ends in another context than it began in
            current.set(None)


async def steps_at(place: Place | None, stream: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """Yield the stream's items. The stream's code runs at `place`; the consumer's code keeps its own place."""
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
