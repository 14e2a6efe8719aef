"""Delivery of recorded events to the calls of a run, one event at a time and in recorded order."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from durable_autogen.record.events import Call, Event, GivenUp, Kind
from durable_autogen.record.idle import idle
from durable_autogen.record.journal import Journal
from durable_autogen.record.place import OpenSession
from nexum_engine.clock import wait_until_set

DRIFT_PATIENCE = 10.0  # seconds to wait for the next recorded call while the program makes other calls
CHOICE_HINT = (
    "If the program chooses by chance, by the clock or by outside data (as in a selector_func), let it choose by the "
    "messages or in a tool"
)
TRIED_PATIENCE = 30.0  # seconds; replaces DRIFT_PATIENCE if an earlier run, too, made all of the other calls


@dataclass
class _Asked:
    call: Call
    delivered: asyncio.Future[Event | None]


class Replay:
    """The replay of a record: the events that are not delivered yet, and the calls that wait for them."""

    def __init__(self, journal: Journal, session: OpenSession) -> None:
        self.ahead = deque(event for event in journal.events if event.kind.is_asked_for and not _is_apart(event))
        """The events that are not delivered yet, in order."""
        self.last_seq = 0
        """The number of the last delivered event."""
        self.last_recorded_ms = 0
        """The time at which the last delivered event was recorded, in milliseconds since 1970."""
        self.active_ms = 0
        """The session's active time when the last delivered event was recorded."""
        self.over_since: float | None = None
        """The time at which the replay ended, by time.monotonic(); None until then."""
        self._journal = journal
        self._session = session
        self._by_address = {event.address: event for event in journal.events}
        self._addresses = {event.address for event in self.ahead}
        self._apart = {event.address: event for event in journal.events if _is_apart(event)}
        self._asked: dict[str, _Asked] = {}
        self._moved: set[str] = set()
        """The addresses of the events that `matching` found for calls made at other positions."""
        self._waiting_live: list[Call] = []
        """The calls that have no recorded event: they wait for the end of the replay."""
        self._changed = asyncio.Event()
        self._over = asyncio.Event()
        for event in journal.events:
            if event.kind is Kind.BEGIN:
                self.delivered(event)

    def delivered(self, event: Event) -> None:
        """Note that the program gets an event, replayed or live."""
        self.last_seq, self.last_recorded_ms = event.seq, event.recorded_ms

    def event_ahead(self, address: str) -> Event | None:
        """Return the recorded event of an address. Return None if it doesn't exist or was delivered already."""
        return self._by_address[address] if address in self._addresses else None

    def recorded(self, address: str) -> Event | None:
        """Return the event that will answer the call at this address: one that is ahead, or that of a given-up call."""
        return self.event_ahead(address) or self._apart.get(address)

    def matching(self, call: Call) -> Call:
        """Return the call with the position at which the recorded run made it.

        An agent may make simultaneous calls in a different order than in the recorded run. The call's fingerprint shows
        which recorded event belongs to the call. If no recorded event has this fingerprint, return `call`. But if
        another call has taken the event at that position, return the call with the agent's next free position.
        """
        at_its_place = self._by_address[call.address] if call.address in self._moved else self.recorded(call.address)
        wanted = call.request.get("hash")
        if at_its_place is None or at_its_place.accepted or wanted is None:
            return call
        is_taken = self._is_taken(at_its_place)
        if not is_taken and at_its_place.request.get("hash") == wanted:
            return call
        left = [
            event
            for event in (*self.ahead, *self._apart.values())
            if (event.kind, event.agent) == (call.kind, call.agent) and not self._is_taken(event)
        ]
        same = [event for event in left if event.request.get("hash") == wanted]
        if not (found := same or (left if is_taken else [])):
            return call
        self._moved.add(found[0].address)
        return dataclasses.replace(call, position=found[0].position)

    def _is_taken(self, event: Event) -> bool:
        return event.address in self._asked or event.address in self._moved

    def peek(self, call: Call) -> Event | None:
        """Return a call's recorded event before its delivery, if the event exists and matches the call; else None."""
        event = self.event_ahead(call.address)
        return None if event is None or self.differences(event, call) else event

    def take_apart(self, address: str) -> Event | None:
        """Return and remove the console event or given-up call of an address; None if the address has none."""
        return self._apart.pop(address, None)

    def differences(self, recorded: Event, call: Call) -> list[str]:
        """Return a line for each difference between a recorded event and a call; no line if the event is accepted."""
        return [] if recorded.accepted else self._session.differences(recorded, call, self._by_address.get)

    async def take(self, call: Call) -> Event | None:
        """Wait until a call's recorded event is delivered; return it. Return None if `leave` drops the event first."""
        asked = _Asked(call, asyncio.get_running_loop().create_future())
        self._asked[call.address] = asked
        self._changed.set()
        try:
            return await asked.delivered
        finally:
            self._asked.pop(call.address, None)

    async def wait_until_over(self, call: Call) -> None:
        """Wait until the replay is over. `call` has no recorded event, so the replay may report drift meanwhile."""
        if self._over.is_set():
            return
        self._waiting_live.append(call)
        self._changed.set()
        try:
            await self._over.wait()
        finally:
            self._waiting_live.remove(call)

    def fail(self, error: Exception) -> None:
        """Raise an error in every call that waits for its recorded event."""
        for asked in self._asked.values():
            if not asked.delivered.done():
                asked.delivered.set_exception(error)

    def leave(self) -> None:
        """Drop all events that are not delivered yet. The calls that wait for them are made live."""
        self.ahead.clear()
        self._addresses.clear()
        self._apart.clear()
        self._changed.set()
        for asked in self._asked.values():
            _deliver(asked, None)

    def made_after_failures(self) -> list[Event]:
        """Return the recorded calls that the program makes only after a call that failed and is now made again.

        The program kept the failure, as `gather(..., return_exceptions=True)` does, made these calls and then ended
        with the failure. `run` waited for the first of them in vain. Return no call if this isn't so: then the program
        differs from the record.
        """
        failures = self._journal.past.failed
        failed = [failures[call.address] for call in self._waiting_live if call.address in failures]
        if not failed or not self._is_repeating:
            return []
        left = (*self.ahead, *self._apart.values())
        after = sorted((event for event in left if event.asked_after >= min(failed)), key=lambda event: event.seq)
        return after if self.ahead[0] in after else []

    def drop(self, events: Collection[Event]) -> None:
        """Drop events that no longer count and are not delivered yet."""
        for event in events:
            self._addresses.discard(event.address)
            self._apart.pop(event.address, None)
        self.ahead = deque(event for event in self.ahead if event.address in self._addresses)

    async def run(self) -> tuple[int, str] | None:
        """Deliver all events in order; return None after the last one.

        If the program differs from the record, return the number of the last event before the difference, and a text.
        """
        while self.ahead:
            await idle(self._session)
            if not self.ahead:
                break
            event = self.ahead[0]
            asked = self._asked.get(event.address)
            if asked is None:
                if await self._is_asked_in_time(event):
                    continue
                asked_later = [one for one in self.ahead if one.address in self._asked]
                asks_for = ", ".join(sorted({str(one) for one in (*self._waiting_live, *asked_later)}))
                return event.seq - 1, f"{event} is next on record, but this run asks for {asks_for}. {CHOICE_HINT}"
            differing = self.differences(event, asked.call)
            if differing:
                return event.seq - 1, f"{event} is not what this run asks for: {'; '.join(differing)}"
            self.ahead.popleft()
            self._addresses.discard(event.address)
            self.active_ms = event.active_ms
            self.delivered(event)
            _deliver(asked, event)
        await idle(self._session)
        self.over_since = time.monotonic()
        self._over.set()
        return None

    async def _is_asked_in_time(self, event: Event) -> bool:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        # Wait longer for a call that the recorded run made late: this run may make it late, too.
        late = round(2 * max(0, event.asked_ms - self.active_ms) / 1000, 1)
        notice = loop.call_later(DRIFT_PATIENCE, self._tell_waiting, event, late)
        try:
            while event.address in self._addresses and event.address not in self._asked:
                self._changed.clear()
                patience = self._patience()
                if patience is None:
                    await self._changed.wait()
                    begun = loop.time()
                    continue
                left = begun + patience + late - loop.time()
                if left <= 0:
                    return False
                await wait_until_set(self._changed, left)
            return True
        finally:
            notice.cancel()

    def _tell_waiting(self, event: Event, late: float) -> None:
        if (patience := self._patience()) is not None:
            limit = patience + late
            self._journal.log.warning(
                "%s is next on record: waiting up to %g s for the run to ask for it", event, limit
            )

    def _patience(self) -> float | None:
        """Return how many seconds to wait for the program to make the next recorded call; None for no limit.

        While no call waits, there is no limit: the program is doing other work, and will then make a call or end.
        """
        if not self._is_repeating:
            return DRIFT_PATIENCE
        return TRIED_PATIENCE if self._waiting_live else None

    @property
    def _is_repeating(self) -> bool:
        """Whether an earlier run made all calls that wait, but no result of them is recorded."""
        return not self._asked and all(self._journal.was_tried(call.address) for call in self._waiting_live)


def _is_apart(event: Event) -> bool:
    """Return whether an event is delivered outside the order of events: the line of an `input()`, or a given-up call.

    `input()` can't wait, and the program decides when to give a call up.
    """
    return isinstance(event.content, GivenUp) or event.kind is Kind.CONSOLE


def _deliver(asked: _Asked, event: Event | None) -> None:
    if not asked.delivered.done():
        asked.delivered.set_result(event)
