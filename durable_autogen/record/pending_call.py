"""A call that a run makes, until it has its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from durable_autogen.record.events import Call, Content
from durable_autogen.record.journal import TAKE_OVER_PATIENCE
from durable_autogen.record.setbacks import Caller, Setback


@dataclass(frozen=True)
class Performed:
    """The outcome of a live call: the value or the error for the caller, and the content to record."""

    value: Any
    content: Content
    error: Exception | None = None


@dataclass(frozen=True)
class Answer:
    """The outcome of a call, live or replayed."""

    content: Content
    replayed: bool
    position: str
    """The position at which the call is recorded."""
    value: Any = None
    """The live call's value. For a replayed call, the caller builds the value from `content`."""


Perform = Callable[[Call], Awaitable[Performed]]
"""A function that makes a live call. Its parameter is the call, with the position at which the call is recorded."""

Streamed = Callable[[bool], list[Any]]
"""A function that returns the items of a stream as JSON: all items, or (with False) those that the program has got.

For a call that isn't a stream, it returns no items."""


class Token(Protocol):
    """A token with which a program cancels calls, such as AutoGen's CancellationToken."""

    def is_cancelled(self) -> bool:
        """Return whether the program has cancelled the calls."""

    def add_callback(self, callback: Callable[[], Any]) -> None:
        """Call `callback` when the program cancels the calls. Any thread may cancel them."""


@dataclass(eq=False)
class PendingCall:
    """A call that waits for its recorded answer, or that is made live. The first fields are from `Recorder.call`."""

    call: Call
    perform: Perform | None = None
    streamed: Streamed = field(default=lambda _: [])
    on_replay: Callable[[Content], None] = field(default=lambda _: None)
    caller: Caller = None
    token: Token | None = None
    asked_after: int = 0
    """The number of the last event that was delivered before the call was made live, or cancelled in a replay."""
    asked_ms: int = 0
    """The session's active time when the call was made."""
    was_found: bool = False
    """Whether the recorded content was found and passed to `on_replay`."""
    was_made: bool = False
    """Whether the call was made. Set back to False if the call's event was recorded and then revoked."""
    setback: Setback | None = None
    """Set when the program gives the call up."""
    cleanup: set[str] | None = None
    """The calls of the clean-up that the call is part of, or before which the program gave it up."""
    is_cancelled: bool = False
    _is_sending: bool = False
    answer: asyncio.Future[Answer | Exception] = field(init=False)
    """The call's answer or error. Set an error with `set_result`: asyncio warns of exceptions that nobody retrieves."""

    def cancel(self, running: asyncio.Task[None], *, is_ending: bool = False) -> None:
        """Cancel `running`, the task that makes the call. If it is sending, it is cancelled later (see `sending`).

        If the run is ending, it is cancelled after TAKE_OVER_PATIENCE at the latest.
        """
        self.is_cancelled = True
        if not self._is_sending:
            running.cancel()
        elif is_ending:
            running.get_loop().call_later(TAKE_OVER_PATIENCE, running.cancel)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Delay a cancellation to the end of a `with` that sends requests.

        The journal needs the answer: if the server has recorded the event, the journal must have it, too. Otherwise the
        server would refuse the run's next event.
        """
        self._is_sending = True
        try:
            yield
        finally:
            self._is_sending = False
        self.check_not_cancelled()

    def check_not_cancelled(self) -> None:
        if self.is_cancelled:
            raise asyncio.CancelledError
