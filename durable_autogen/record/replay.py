"""Delivery of recorded events to the calls of a run, one event at a time and in recorded order."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

from durable_autogen.record.events import Call, Event, EventInput, GivenUp, Kind
from durable_autogen.record.idle import idle
from durable_autogen.record.journal import Journal
from durable_autogen.record.place import OpenSession
from nexum_engine.clock import wait_until_set

DRIFT_PATIENCE = 10.0  # seconds to wait for the next recorded call while the program makes other calls
CHOICE_HINT = (
    "If the program chooses by chance, by the clock or by outside data (as in a selector_func), let it choose by the "
    "messages or in a tool"
)
NAMES_HINT = (
    "Agents of one name that start at the same time, as with asyncio.as_completed, may start in another order: give "
    "them different names"
)


@dataclass
class _Asked:
    """A call that waits for its recorded event."""

    call: Call
    delivered: asyncio.Future[Event | None]


@dataclass(frozen=True)
class Mismatch:
    """The next recorded call, which the program doesn't make, or makes differently."""

    event: Event
    what: str
    """The difference in words."""
    follows_failure: bool = False
    """Whether the reason may be a failure of an earlier run: see `Replay._follows_failure`."""


class Replay:
    """The replay of a record: the events that are not delivered yet, and the calls that wait for them."""

    def __init__(self, journal: Journal, session: OpenSession) -> None:
        # An OrderedDict finds its first entry at once. A dict would search through the entries that were deleted.
        self.ahead = OrderedDict(
            (event.address, event) for event in journal.events if event.kind.is_asked_for and not _is_unordered(event)
        )
        """The events that are not delivered yet, in order, by their addresses."""
        self.last_seq = 0
        """The number of the last delivered event."""
        self.last_recorded_ms = 0
        """The time at which the last delivered event was recorded, in milliseconds since 1970."""
        self.active_ms = 0
        """The session's active time when the last delivered event was recorded."""
        self._last_ms: dict[str, int] = {}
        """The session's active time when the last delivered event of each agent was recorded."""
        self.over_since: float | None = None
        """The time at which the replay ended, by time.monotonic(); None until then."""
        self._journal = journal
        self._session = session
        self._by_address = {event.address: event for event in journal.events}
        self._agents = {event.agent for event in journal.events}
        self._unordered = {event.address: event for event in journal.events if _is_unordered(event)}
        """The undelivered events that are delivered outside the order, by their addresses."""
        self._asked: dict[str, _Asked] = {}
        """The calls that wait for their recorded events, by their addresses."""
        self._unfinished = {
            one.address: one
            for one in journal.recorded.unfinished
            if one.digest and one.address not in self._by_address
        }
        """The calls of tools that earlier runs began, and that have no recorded result."""
        self.revoked_failures = dict(journal.recorded.revoked_failures)
        """See `Record.revoked_failures`: these failures and given-up calls ended earlier runs."""
        self._taken: set[str] = set()
        """The addresses that `matching` gave to calls."""
        self._free: defaultdict[tuple[Kind, str], list[str]] = defaultdict(list)
        """For each kind and agent: the positions that the program has reached, and that `matching` gave to no call."""
        self._waiting_live: list[Call] = []
        """The calls that have no recorded event: they wait for the end of the replay."""
        self._waiting_since: float | None = None
        """When the program last got an event, or was last seen at work, by the event loop's clock.

        None until the replay waits for the next call. If the program doesn't make several recorded calls, the waits for
        them don't add up: nothing happens between these waits that could make the program ask for a call.
        """
        self._changed = asyncio.Event()
        """Set when a call begins to wait, or when the events are dropped."""
        self.over = asyncio.Event()
        """Set when the replay is over."""
        for event in journal.events:
            if event.kind is Kind.BEGIN:
                self.delivered(event)

    def delivered(self, event: Event) -> None:
        """Note that the program gets an event, replayed or live."""
        self.last_seq, self.last_recorded_ms = event.seq, event.recorded_ms

    @property
    def next_event(self) -> Event | None:
        """The next event to deliver; None after the last one."""
        return next(iter(self.ahead.values()), None)

    def event_for(self, address: str) -> Event | None:
        """Return the event that will answer the call at this address: one that is ahead, or that of a given-up call."""
        return self.ahead.get(address) or self._unordered.get(address)

    def matching(self, call: Call) -> Call:
        """Return the call with the position at which the recorded run made it.

        An agent may make simultaneous calls in a different order than in the recorded run. The call's fingerprint shows
        which recorded call it is, with or without a recorded result. If no recorded call has this fingerprint, return
        `call`. But if another call has taken that position, return the call with a free position of the agent.

        For example, two branches of the program called search(a) at reply/0/tool/1 and search(b) at reply/0/tool/2. If
        search(b) is called first now, it comes with reply/0/tool/1, and is returned with reply/0/tool/2.
        """
        if call.hash is None:
            return call
        is_taken = call.address in self._taken
        free = self._free[call.kind, call.agent]
        if not is_taken:
            free.append(call.position)
        expected = None if is_taken else self.event_for(call.address) or self._unfinished.get(call.address)
        if expected is None or not (expected.accepted or expected.hash == call.hash):
            recorded: tuple[Event | EventInput, ...]
            recorded = *self.ahead.values(), *self._unordered.values(), *self._unfinished.values()
            same_agent = [one for one in recorded if (one.kind, one.agent) == (call.kind, call.agent)]
            left = {one.position: one.hash for one in same_agent if one.address not in self._taken and not one.accepted}
            found = [position for position, hash in left.items() if hash == call.hash]
            if not found and is_taken:
                # Leave the positions of recorded calls to those calls, if there is another one.
                found = [position for position in free if position not in left] or free
            if found:
                call = dataclasses.replace(call, position=found[0])
        if call.position in free:
            free.remove(call.position)
        self._taken.add(call.address)
        return call

    def pop_unordered(self, address: str) -> Event | None:
        """Return and remove the console event or given-up call of an address; None if the address has none."""
        return self._unordered.pop(address, None)

    def differences(self, recorded: Event, call: Call) -> list[str]:
        """Return a line for each difference between a recorded event and a call; no line if the event is accepted."""
        return [] if recorded.accepted else self._session.differences(recorded, call, self._by_address.get)

    async def take(self, call: Call) -> Event | None:
        """Wait until a call's recorded event is delivered; return it. Return None if `drop_rest` drops it first."""
        asked = _Asked(call, asyncio.get_running_loop().create_future())
        self._asked[call.address] = asked
        self._changed.set()
        try:
            return await asked.delivered
        finally:
            self._asked.pop(call.address, None)

    async def next_without_call(self) -> Event | None:
        """Wait until the events are delivered that calls wait for. Return the next event, if no call waits for it."""
        while (event := self.next_event) is not None:
            await idle(self._session)
            asked = self._asked.get(event.address)
            if asked is not None:
                await asyncio.wait({asked.delivered})
            elif event.address in self.ahead:
                return event
        return None

    async def wait_until_over(self, call: Call) -> None:
        """Wait until the replay is over. `call` has no recorded event, so the replay may report drift meanwhile."""
        if self.over.is_set():
            return
        self._waiting_live.append(call)
        self._changed.set()
        try:
            await self.over.wait()
        finally:
            self._waiting_live.remove(call)

    def fail(self, error: Exception) -> None:
        """Raise an error in every call that waits for its recorded event."""
        for asked in self._asked.values():
            if not asked.delivered.done():
                asked.delivered.set_exception(error)

    def drop_rest(self) -> None:
        """Drop all events that are not delivered yet. The calls that wait for them are made live."""
        self.ahead.clear()
        self._unordered.clear()
        self._unfinished.clear()
        self._changed.set()
        for asked in self._asked.values():
            _deliver(asked, None)

    def _follows_failure(self, event: Event) -> bool:
        """Return whether the program may make a recorded call only after a call that is now made again.

        That call failed or was given up, which ended the last run, but not at once: the program kept the failure, as
        `gather(..., return_exceptions=True)` does, and made other calls first.
        """
        return any(
            event.asked_after >= self.revoked_failures.get(call.address, math.inf) for call in self._waiting_live
        )

    async def run(self) -> Mismatch | None:
        """Deliver all events in order; return None after the last one. Return early if the next event doesn't fit."""
        while True:
            await idle(self._session)
            if (event := self.next_event) is None:
                self.over_since = time.monotonic()
                self.over.set()
                return None
            asked = self._asked.get(event.address)
            if asked is None:
                if await self._is_asked_in_time(event):
                    continue
                asked_later = [one for one in self.ahead.values() if one.address in self._asked]
                asks_for = ", ".join(sorted({str(one) for one in (*self._waiting_live, *asked_later)}))
                what = f"{event} is next on record, but this run asks for {asks_for}. {CHOICE_HINT}"
                return Mismatch(event, what, self._follows_failure(event))
            differing = self.differences(event, asked.call)
            if differing:
                what = f"{event} is not what this run asks for: {'; '.join(differing)}"
                return Mismatch(event, f"{what}. {NAMES_HINT}" if self._is_one_of_several(event) else what)
            del self.ahead[event.address]
            self.active_ms = self._last_ms[event.agent] = event.active_ms
            self._waiting_since = None
            self.delivered(event)
            _deliver(asked, event)

    def _is_one_of_several(self, event: Event) -> bool:
        """Return whether several agents have the name of the event's agent: the second one is recorded as NAME#2."""
        return "#" in event.agent or any(one.agent == f"{event.agent}#2" for one in self._by_address.values())

    async def _is_asked_in_time(self, event: Event) -> bool:
        loop = asyncio.get_running_loop()
        if self._waiting_since is None:
            self._waiting_since = loop.time()
        notice = loop.call_later(DRIFT_PATIENCE, self._tell_waiting, event)
        try:
            while event.address in self.ahead and event.address not in self._asked:
                self._changed.clear()
                if not self._another_call_waits:
                    # The program does other work, and will then make a call or end.
                    await self._changed.wait()
                    self._waiting_since = loop.time()
                    continue
                left = self._waiting_since + self._patience(event) - loop.time()
                if left <= 0:
                    return False
                await wait_until_set(self._changed, left)
            return True
        finally:
            notice.cancel()

    def _tell_waiting(self, event: Event) -> None:
        if self._another_call_waits:
            self._journal.log.warning(
                "%s is next on record: waiting up to %g s for the run to ask for it", event, self._patience(event)
            )

    def _patience(self, event: Event) -> float:
        """Return how many seconds to wait for the program to make the next recorded call, while other calls wait.

        A call that the recorded run made late, after work that isn't recorded, may come late in this run, too. Count
        this work from the agent's own last event: the replay gives other agents their results at once, while this
        agent may sleep as long as in the recorded run.
        """
        began_ms = self.active_ms
        if not self._seems_changed and not self._follows_failure(event):
            began_ms = min(began_ms, self._last_ms.get(event.agent, 0))
        return DRIFT_PATIENCE + round(2 * max(0, event.asked_ms - began_ms) / 1000, 1)

    @property
    def _seems_changed(self) -> bool:
        """Whether a waiting call shows that the program was probably changed.

        Either its request differs from the recorded one, or it is not on record and the recorded run can't have made
        it: the recorded run came to its end, or had no such agent. (A run that was cut off may have made further calls
        of the agents on record.)
        """
        is_finished = self._journal.finished_run is not None
        return any(is_finished or call.agent not in self._agents for call in self._waiting_live) or any(
            bool(self.differences(self.ahead[address], asked.call))
            for address, asked in self._asked.items()
            if address in self.ahead
        )

    @property
    def _another_call_waits(self) -> bool:
        """Whether the program waits for another call than the next recorded one."""
        return bool(self._asked or self._waiting_live)


def _is_unordered(event: Event) -> bool:
    """Return whether an event is delivered outside the order of events.

    That is a line typed at the console, because `input()` can't wait, or a given-up call, because the program decides
    when to give a call up.
    """
    return isinstance(event.content, GivenUp) or event.kind is Kind.CONSOLE


def _deliver(asked: _Asked, event: Event | None) -> None:
    if not asked.delivered.done():
        asked.delivered.set_result(event)
