"""Which failures and given-up calls a run has survived, and which it ended with.

A failure that the run survived stays on record, and is replayed. One that ended the run is revoked: the next run makes
the call again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from durable_autogen.record.events import Call, Event

Asker = asyncio.Task[Any] | None


@dataclass(eq=False)
class _Setback:
    event: Event
    error: Exception | None
    """What the call raised; None if it was given up."""
    asker: Asker
    """The task that made the call."""
    survived: bool


class Survival:
    """The setbacks of one run whose agents have not finished their turns since."""

    def __init__(self) -> None:
        self._setbacks: list[_Setback] = []

    def add(self, event: Event, error: Exception | None, asker: Asker, *, survived: bool = False) -> None:
        """Note that a recorded call failed, or was given up (without an error)."""
        self._setbacks.append(_Setback(event, error, asker, survived))

    def asks(self, call: Call, asker: Asker) -> None:
        """A task makes another call: it has survived, and so have the agents that work for its agent."""
        for one in self._setbacks:
            one.survived = one.survived or continues(one.event.agent, one.asker, call, asker)

    def turn_is_over(self, path: str) -> None:
        """An agent or a team has finished its turn, and with it all who work inside."""
        self._setbacks = [one for one in self._setbacks if not _is_within(one.event.agent, path)]

    def cause_of(self, error: BaseException) -> Exception | None:
        """Return the failure whose text this error repeats: AutoGen's teams pass on only texts."""
        return next((one.error for one in reversed(self._setbacks) if _repeats(error, one.error)), None)

    def ended_by(self, error: BaseException, events: Sequence[Event]) -> list[Event]:
        """Return those of the events with which a run ended that ended with this error."""
        setbacks = [one for one in self._setbacks if one.event in events and not one.event.accepted]
        failures = [one for one in setbacks if one.error is not None]
        causes = _chain(error)
        # Python keeps the cause, where a team passes on only its text; a program may raise an error of its own.
        found = [one for one in failures if one.error in causes]
        found = found or [one for one in failures if _repeats(error, one.error)][-1:]
        found = found or [one for one in failures if not one.survived]
        # A run that ends cancels the calls of those who work beside the one that failed.
        found += [one for one in setbacks if one.error is None and not one.survived]
        return [one.event for one in found]


def continues(agent: str, asker: Asker, call: Call, next_asker: Asker) -> bool:
    """Return whether a call shows that an agent, or one that it works for, continued; all work for the program."""
    return asker is next_asker or not call.agent or f"{agent}/".startswith(f"{call.agent}/")


def _is_within(agent: str, path: str) -> bool:
    return not path or agent == path or agent.startswith((f"{path}/", f"{path} ("))


def _repeats(error: BaseException, cause: Exception | None) -> bool:
    text = "" if cause is None else str(cause)
    return error is not cause and bool(text) and text in str(error)


def _chain(error: BaseException) -> list[BaseException]:
    """An exception with everything that caused it."""
    found: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        one = ahead.pop()
        if one is None or one in found:
            continue
        found.append(one)
        ahead += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return found
