"""Tracking of failures and given-up calls: which ones the run survived, and which one ended it.

A failure that the run survived stays on record, and is replayed. A failure that ended the run is revoked: the next run
makes the call again.
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
    """The call's error; None if the call was given up."""
    asker: Asker
    """The task that made the call."""
    survived: bool


class Survival:
    """The failed and given-up calls of a run, until their agents finish their turns."""

    def __init__(self) -> None:
        self._setbacks: list[_Setback] = []

    def add(self, event: Event, error: Exception | None, asker: Asker, *, survived: bool = False) -> None:
        """Note that a recorded call failed, or was given up (without an error)."""
        self._setbacks.append(_Setback(event, error, asker, survived))

    def asks(self, call: Call, asker: Asker) -> None:
        """Note that a task makes a call: it and the agents that work for its agent survived their setbacks."""
        for one in self._setbacks:
            one.survived = one.survived or continues(one.event.agent, one.asker, call, asker)

    def turn_is_over(self, path: str) -> None:
        """Note that an agent or team, and all agents inside it, finished their turn."""
        self._setbacks = [one for one in self._setbacks if not _is_within(one.event.agent, path)]

    def cause_of(self, error: BaseException) -> Exception | None:
        """Return the failure whose text this error contains, or None: AutoGen's teams pass on only texts."""
        return next((one.error for one in reversed(self._setbacks) if _repeats(error, one.error)), None)

    def ended_by(self, error: BaseException, events: Sequence[Event]) -> list[Event]:
        """Return the events of the calls that ended the run with this error."""
        setbacks = [one for one in self._setbacks if one.event in events and not one.event.accepted]
        failures = [one for one in setbacks if one.error is not None]
        causes = _chain(error)
        found = [one for one in failures if one.error in causes]  # Python chains the cause
        # A team passes on only the text of its cause.
        found = found or [one for one in failures if _repeats(error, one.error)][-1:]
        # The program raised an unrelated error: take every failure that the run did not survive.
        found = found or [one for one in failures if not one.survived]
        # The end of the run also cancelled the calls of agents that worked in parallel.
        found += [one for one in setbacks if one.error is None and not one.survived]
        return [one.event for one in found]


def continues(agent: str, asker: Asker, call: Call, next_asker: Asker) -> bool:
    """Return whether a call shows that the agent, or one that it works for, continued after its setback."""
    return asker is next_asker or not call.agent or f"{agent}/".startswith(f"{call.agent}/")


def _is_within(agent: str, path: str) -> bool:
    return not path or agent == path or agent.startswith((f"{path}/", f"{path} ("))


def _repeats(error: BaseException, cause: Exception | None) -> bool:
    text = "" if cause is None else str(cause)
    return error is not cause and bool(text) and text in str(error)


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception with all of its causes."""
    found: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        one = ahead.pop()
        if one is None or one in found:
            continue
        found.append(one)
        ahead += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return found
