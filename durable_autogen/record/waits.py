"""Durable waits: sleeps, and waits for events that are sent to the session.

A wait is recorded by two events. The first one (WAIT) is recorded before the wait begins, and holds the latest time at
which the wait ends. So a crash doesn't extend the wait. The second one (SLEEP or EVENT) is recorded at the end of the
wait. So a replay continues the program in the recorded order.
"""

from __future__ import annotations

import asyncio
import math
import time

from durable_autogen.record.events import Call, Kind, Mark, Received, TimedOut, Waiting, end_of_wait, name_of
from durable_autogen.record.log import at_time
from durable_autogen.record.pending_call import Performed
from durable_autogen.record.recorder import Recorder
from durable_autogen.record.sent_events import check_event_name, expect
from durable_autogen.record.storable import decoded, encoded, representable
from nexum_engine import jsontext
from nexum_engine.connection import MAX_SERVER_WAIT, OUTAGE_PATIENCE
from nexum_engine.errors import ExecutionNotFound, InvalidRequest
from nexum_engine.records import ExecutionStatus
from nexum_engine.workflow import MAX_SECONDS

CLOCK_INTERVAL = 10.0  # seconds until a sleep reads the clock again: the machine may have been suspended


class Waits:
    """The durable waits of one run.

    No two waits receive the same event. Events of one name are received in the order of their numbers.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._client = recorder.journal.client
        self._recorder = recorder
        self._log = recorder.journal.log
        self._receiving: dict[object, tuple[str, int] | None] = {}
        """For each wait that is under way: the event that it has received but not yet recorded, or None."""

    async def sleep(self, agent: str, seconds: float) -> None:
        """Sleep for `seconds`, or until the recorded end if an earlier run began the sleep (see `Session.sleep`)."""
        position, waiting = await self._begin(agent, "sleep", "", _checked(seconds, "seconds"))
        assert waiting.until_ms is not None
        until_ms = waiting.until_ms

        async def perform(_: Call) -> Performed:
            if time.time() * 1000 < until_ms:
                self._log.info("sleeping until %s", at_time(until_ms))
                self._warn_if_changed(name_of(Kind.WAIT, agent, position), waiting, seconds)
            while (left := until_ms / 1000 - time.time()) > 0:  # noqa: ASYNC110 - it waits for no event
                await asyncio.sleep(min(left, CLOCK_INTERVAL))
            return Performed(None, Mark())

        await self._recorder.call(Call(Kind.SLEEP, agent, end_of_wait(position)), perform)

    async def receive(self, agent: str, name: str, timeout: float | None) -> object:
        """Return the payload of the next event `name` (see `Session.wait_for_event`).

        Raises TimeoutError if no such event is sent in time.
        """
        check_event_name(name)
        self._recorder.journal.may_leave_open = True
        seconds = None if timeout is None else _checked(timeout, "timeout")
        position, waiting = await self._begin(agent, "event", name, seconds)
        wait = object()

        async def perform(_: Call) -> Performed:
            self._warn_if_changed(name_of(Kind.WAIT, agent, position), waiting, seconds)
            content = await self._received(wait, name, waiting.until_ms)
            return Performed(None, content)

        self._receiving[wait] = None
        try:
            answer = await self._recorder.call(Call(Kind.SENT_EVENT, agent, end_of_wait(position)), perform)
        finally:
            del self._receiving[wait]
        if isinstance(answer.content, Received):
            return decoded(answer.content.payload)
        raise TimeoutError(f"no event {name!r} was sent within {waiting.seconds or 0:g} s")

    async def _begin(self, agent: str, what: str, name: str, seconds: float | None) -> tuple[str, Waiting]:
        """Record that a wait begins, and when it will end. Return the wait's position and the recorded content."""
        # Leave the seconds out of the fingerprint: a program may compute them from the clock.
        request = {"hash": f"{what} {name}", "event": name} if name else {"hash": what}
        call = Call(Kind.WAIT, agent, self._recorder.next_position(agent, what), request)

        async def perform(_: Call) -> Performed:
            until_ms = None if seconds is None else math.ceil((time.time() + seconds) * 1000)
            return Performed(None, Waiting(event=name, seconds=seconds, until_ms=until_ms))

        answer = await self._recorder.call(call, perform)
        assert isinstance(answer.content, Waiting)
        return answer.position, answer.content

    def _warn_if_changed(self, name: str, waiting: Waiting, seconds: float | None) -> None:
        if waiting.seconds != seconds:
            was, now = ("no limit" if one is None else f"{one:g} s" for one in (waiting.seconds, seconds))
            self._log.warning("%s: the recorded time counts (%s), not the program's new one (%s)", name, was, now)

    async def _received(self, wait: object, name: str, until_ms: int | None) -> Received | TimedOut:
        is_logged = False
        while True:
            number = self._next_number(name)
            left = math.inf if until_ms is None else until_ms / 1000 - time.time()
            expected = await expect(
                self._client, self._recorder.journal.session, name, number, patience=OUTAGE_PATIENCE
            )
            try:
                observed = await self._client.get_execution(
                    expected.execution_id,
                    wait=min(max(left, 0), MAX_SERVER_WAIT) if is_logged else 0,
                    patience=OUTAGE_PATIENCE,
                )
            except ExecutionNotFound:
                continue  # the server's database was replaced: start the execution there
            execution = observed.execution
            if execution.status is ExecutionStatus.COMPLETED and number == self._next_number(name):
                # Before that, the time at the server is of no interest: its clock may be ahead of this clock.
                if left <= 0 and until_ms is not None and (execution.ended_ms or 0) > until_ms:
                    return TimedOut()  # the event was sent too late: leave it to the next wait
                if wait in self._receiving:
                    self._receiving[wait] = (name, number)
                payload = jsontext.parse(execution.outputs()["event"], "the payload")
                return Received(event=name, number=number, payload=representable(encoded(payload)))
            if execution.status is ExecutionStatus.RUNNING:
                if left <= 0:
                    return TimedOut()
                if not is_logged:
                    is_logged = True
                    until = "" if until_ms is None else f" until {at_time(until_ms)}"
                    command = self._recorder.journal.command("send")
                    self._log.warning("waiting for event %r%s (send it: %s %s)", name, until, command, name)

    def _next_number(self, name: str) -> int:
        """Return the number of the first event `name` that no wait of the session has received."""
        taken = {one[1] for one in self._receiving.values() if one is not None and one[0] == name}
        for event in self._recorder.journal.events:
            # Ignore the events that a fork copied: they were sent to the original session. The events that are sent to
            # the fork are numbered from 1 again.
            if isinstance(event.content, Received) and event.content.event == name and not event.accepted:
                taken.add(event.content.number)
        return next(number for number in range(1, len(taken) + 2) if number not in taken)


def _checked(seconds: float, what: str) -> float:
    if not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_SECONDS:  # NaN fails this check, too
        raise InvalidRequest(f"{what} must be a number from 0 to {MAX_SECONDS:,.0f}, not {seconds!r}")
    return float(seconds)
