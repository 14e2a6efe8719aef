"""Tracking of failures and given-up calls: whether the run continued after each of them, or ended because of it.

If the run continued after a failure, the failure is kept and replayed. If a failure ended the run, the failure is
revoked, and the next run makes the call again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from durable_autogen.record.events import Call, Event
from durable_autogen.record.tasks import is_cancellation

MAX_CONTINUED = 100  # how many setbacks to remember of those after which the run continued

Caller = asyncio.Task[Any] | None


@dataclass(frozen=True)
class _Origin:
    """What the recorder removes from an error before the program gets the error: where it was raised, and why.

    AutoGen passes tracebacks to models, so the program must not get what a replay can't restore.
    """

    error: Exception
    traceback: TracebackType | None
    cause: BaseException | None
    context: BaseException | None
    is_context_hidden: bool

    @classmethod
    def of(cls, error: Exception) -> _Origin:
        return cls(error, error.__traceback__, error.__cause__, error.__context__, error.__suppress_context__)

    def restore(self) -> None:
        error = self.error
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        if last is None:
            error.__traceback__ = self.traceback
        else:
            last.tb_next = self.traceback
        if error.__cause__ is None:
            error.__cause__, error.__context__ = self.cause, self.context
            error.__suppress_context__ = self.is_context_hidden


@dataclass(eq=False)
class Setback:
    """A failed or given-up call."""

    agent: str
    caller: Caller
    """The task that made the call."""
    error: Exception | None
    """The call's error; None if the call was given up."""
    event: Event | None
    """The recorded event; None if it isn't recorded yet."""
    continued: bool = False
    """Whether another call has shown that the run continued (see `Setbacks.called`)."""
    was_handled: bool = False
    """Whether the task or agent that made the call, or an agent that contains it, made another call afterwards."""
    origin: _Origin | None = None
    """The origin of `error`, if the call was made live."""


class Setbacks:
    """The failed and given-up calls of a run. When an agent finishes its turn, the agent's calls are forgotten.

    Of the calls after which the run continued, only the newest `MAX_CONTINUED` are remembered.
    """

    def __init__(self) -> None:
        self._setbacks: list[Setback] = []
        self._agents: set[str] = set()
        """The agents that have made calls."""

    def add(self, agent: str, caller: Caller, error: Exception | None = None, event: Event | None = None) -> Setback:
        """Remember that a call of `agent` failed with `error`. If `error` is None, the call was given up."""
        new = Setback(agent, caller, error, event, origin=None if error is None else _Origin.of(error))
        self._setbacks.append(new)
        # A program that calls models itself may run for long, and its turn is never over: forget the oldest setbacks.
        past = [one for one in self._setbacks if one.continued]
        if len(past) > MAX_CONTINUED:
            self._setbacks.remove(past[0])
        return new

    def called(self, call: Call, caller: Caller, *, is_cancelled: bool) -> None:
        """Note that `caller` makes a call, which may show that the run continued after a setback.

        It does if one of these makes the call: the task of the setback, its agent, a team or agent that contains the
        agent, or the program itself. With `is_cancelled`, the program cancelled the call before the call began, or
        makes it to clean up after Ctrl+C. Such a call doesn't show that the program continued after a given-up call.
        """
        is_first = call.agent not in self._agents
        self._agents.add(call.agent)
        for one in self._setbacks:
            is_same_task, contains = caller is one.caller, _contains(call.agent, one.agent)
            if one.error is not None or not is_cancelled:
                one.continued = one.continued or is_same_task or contains
                one.was_handled = one.was_handled or is_same_task or (contains and bool(call.agent))
            if one.continued:
                one.origin = None  # the traceback's frames may hold much memory
            # A program or agent that starts an agent inside it has continued after the calls that it gave up itself.
            if one.error is None and is_first and not is_cancelled and _contains(one.agent, call.agent):
                one.continued = True

    def starts_an_agent(self, caller: Caller) -> None:
        """Note that `caller` runs an agent or a team: the run continued after the setbacks of this task.

        The calls of a team come from other tasks, so they don't show it.
        """
        for one in self._setbacks:
            if one.caller is caller:
                one.continued = one.was_handled = True

    def turn_is_over(self, path: str) -> None:
        """Forget the setbacks of an agent or team whose turn is over, and of all agents inside it."""
        # The calls of a team itself are recorded under the name "PATH (team)".
        self._setbacks = [
            one for one in self._setbacks if not (_contains(path, one.agent) or one.agent.startswith(f"{path} ("))
        ]

    def failure_quoted_by(self, error: BaseException) -> Exception | None:
        """Return the latest failure whose text is part of the text of `error`, or None.

        AutoGen's teams don't raise a failure itself. They raise another error, which holds only the failure's text.
        """
        return next((one.error for one in reversed(self._setbacks) if _quotes(error, one.error)), None)

    def restore_origin(self, error: BaseException) -> None:
        """Restore where the failed call that ended the run with `error` was raised, and why: a person will read it."""
        origins = [one.origin for one in reversed(self._setbacks) if one.origin is not None]
        for causes in _causes(error):
            for one in origins:
                if one.error in causes:
                    one.restore()
                    return
        for one in origins:
            if _quotes(error, one.error):
                one.restore()
                error.__cause__ = error.__cause__ or one.error
                return

    def ended_by(self, error: BaseException, events: Sequence[Event]) -> list[Event]:
        """Return the events of the calls whose failure or cancellation ended the run with `error`.

        If the program handled the failure, made other calls and then raised it again, return their events, too: the
        next run makes the failed call again, and makes those calls only if it fails again.

        A cancellation (Ctrl+C) comes from outside: no failure is its cause, even if the program is just handling one.
        """
        setbacks = [
            (one, one.event)
            for one in self._setbacks
            if one.event is not None and one.event in events and not one.event.accepted
        ]
        failures = [(one, event) for one, event in setbacks if one.error is not None and not is_cancellation(error)]
        found: list[tuple[Setback, Event]] = []
        for causes in _causes(error):
            found = found or [(one, event) for one, event in failures if one.error in causes]
        # If no cause is a recorded failure, find the failure by its text: a team's error holds only that text.
        found = found or [(one, event) for one, event in failures if _quotes(error, one.error)][-1:]
        since = min((event.seq for _, event in found), default=0)
        # If no text matches, the error has another reason. Take every failure after which the run did not continue.
        found = found or [(one, event) for one, event in failures if not one.continued]
        # Add the given-up calls after which the run did not continue: the run's end cancelled them. But if a failure
        # ended the run, leave out the calls that the program gave up before that failure.
        found += [
            (one, event) for one, event in setbacks if event.seq > since and one.error is None and not one.continued
        ]
        ended_it = {event.seq: event for _, event in found}
        if handled := [event.seq for one, event in found if one.was_handled]:
            ended_it.update((event.seq, event) for event in events if event.asked_after >= min(handled))
        return list(ended_it.values())


def _contains(outer: str, agent: str) -> bool:
    """Return whether `agent` is the agent or team `outer`, or works inside it. The program itself contains all."""
    return not outer or f"{agent}/".startswith(f"{outer}/")


def _quotes(error: BaseException, failure: Exception | None) -> bool:
    text = "" if failure is None else str(failure)
    return error is not failure and bool(text) and text in str(error)


def _causes(error: BaseException) -> Iterator[list[BaseException]]:
    """Yield an exception with its causes and grouped exceptions; then the same of their contexts, and so on.

    A context is often no cause: it is a failure that the program had handled when the exception was raised.
    """
    seen: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        found: list[BaseException] = []
        while ahead:
            one = ahead.pop()
            if one is not None and one not in seen:
                seen.append(one)
                found.append(one)
                ahead += [one.__cause__, *getattr(one, "exceptions", ())]
        yield found
        ahead = [one.__context__ for one in found]
