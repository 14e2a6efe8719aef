"""What a durable run asks for and gets: the recorded events in their order, then live ones, recorded as they come.

Every event passes one turnstile. It lets one through, waits until the event loop has come to rest, and lets the next
one through: in the live run in the order of recording, in a replay in the same. So parallel branches of a team meet
again in the order in which they met, and whoever comes after them gets the same prompt.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from durable_autogen.errors import DriftError
from durable_autogen.events import Event, Kind, name_of
from durable_autogen.failures import Failure, ordinary
from durable_autogen.journal import Journal
from durable_autogen.quiet import in_recorded_call, rest
from durable_autogen.request import differences
from nexum_engine.errors import NexumError
from nexum_engine.model import Task

OnDrift = Literal["stop", "continue"]
DRIFT_PATIENCE = 10.0  # seconds that a recorded event may be waited for while the run asks for what is new
HELD_PATIENCE = 1.0  # seconds in which a program that survived a failure may go on by itself


@dataclass(frozen=True)
class Outcome:
    """What became of an event that was asked for."""

    content: Any
    replayed: bool


@dataclass(frozen=True)
class _Call:
    """An event that is asked for."""

    kind: Kind
    agent: str
    position: str
    request: Mapping[str, Any]

    @property
    def address(self) -> str:
        return f"{self.agent}/{self.position}"

    def __str__(self) -> str:
        return name_of(self.kind, self.agent, self.position)


@dataclass
class _Asked:
    request: Mapping[str, Any]
    let_through: asyncio.Future[Event | None]


@dataclass(frozen=True)
class _Raised:
    """What became of an event that failed."""

    error: Exception


class Recorder:
    """The events of one run. `failed` resolves when the run can't go on; everything asked for then fails with it."""

    def __init__(self, journal: Journal, *, on_drift: OnDrift = "stop") -> None:
        self.journal = journal
        self.on_drift = on_drift
        self.failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.ended: str | None = None
        """Why the recorded run was over, if it was and if nothing may be asked for after it."""
        self.call_error: Exception | None = None
        """What the last model call or input raised if nothing came after it, as AutoGen passes only its text on."""
        self.last_recorded_ms = 0
        """When the last event that an agent has got was recorded, in milliseconds since 1970."""
        self.active_ms = 0
        """How long the session had been at work by then."""
        self.epoch = 0
        """That event's: how often the session had gone on with a changed program."""
        self.live: Counter[str] = Counter()
        self.replayed: Counter[str] = Counter()
        self.messages = [event for event in journal.events if event.kind is Kind.MESSAGE]
        """User messages that forks have added."""
        self.delivered: set[int] = set()
        """The numbers of those that an agent has seen."""
        self.as_task: set[int] = set()
        """The numbers of those that were a task of their own, because the run before them had ended."""
        self._seq_of = {event.address: event.seq for event in journal.events}
        self._ahead = deque(event for event in journal.events if event.kind.is_asked_for)
        self._addresses = {event.address for event in self._ahead}
        self._asked: dict[str, _Asked] = {}
        self._held: list[tuple[Event, _Asked]] = []
        """Recorded failures that were asked for: whether the program survived them shows in what it asks for next."""
        self._waiting_live: dict[str, bool] = {}
        """What has to wait for the end of the replay, and whether an earlier run has asked for it, too."""
        self._survived: list[tuple[Task, _Call, Exception]] = []
        self._changed = asyncio.Event()
        self._all_replayed = asyncio.Event()
        self._live_since = time.monotonic()
        self._active_before = 0
        self._turnstile = asyncio.Lock()
        self._calls: set[asyncio.Task[None]] = set()
        self._replay = asyncio.create_task(self._let_recorded_through(), name="replay")

    def tell(self, text: str) -> None:
        """Say something to the person who runs it. Where that can't be said, the run ends: AutoGen would wait for ever
        for the agent that it is said for."""
        try:
            self.journal.tell(text)
        except Exception as error:  # noqa: BLE001 - the program's own, or a console that is gone
            self.stop(error)

    async def close(self) -> None:
        """Stop what is under way; nothing more is recorded."""
        self.stop(NexumError("the run is over"))
        for running in (self._replay, *self._calls):
            running.cancel()
        await asyncio.gather(self._replay, *self._calls, return_exceptions=True)

    def stop(self, error: Exception) -> None:
        """Fail the run."""
        if not self.failed.done():
            self.failed.set_result(error)
        for asked in self._asked.values():
            if not asked.let_through.done():
                asked.let_through.set_exception(error)
        for call in self._calls:
            call.cancel()

    def is_recorded(self, address: str) -> bool:
        """Whether the event is still ahead in the record."""
        return address in self._addresses

    def comes_before(self, address: str, message: Event) -> bool:
        """Whether the event belongs to what was recorded before the message was added."""
        return self._seq_of.get(address, message.seq) < message.seq

    def remaining(self) -> list[Event]:
        """What is recorded and was not asked for yet."""
        return list(self._ahead)

    def passed(self, event: Event) -> None:
        """The session has come as far as this event."""
        self.last_recorded_ms, self.active_ms, self.epoch = event.recorded_ms, event.active_ms, event.epoch

    @property
    def is_live(self) -> bool:
        """Whether all that is recorded was asked for."""
        return self._all_replayed.is_set()

    @property
    def active_now_ms(self) -> int:
        """How long the session has been at work by now."""
        if not self.is_live:
            return self.active_ms
        return self._active_before + round((time.monotonic() - self._live_since) * 1000)

    async def end(self, stop_reason: str) -> None:
        """The run is over, and whole. Raises DriftError if more was recorded than it asked for."""
        for event in self.remaining()[:1]:
            await self.drift(event.seq - 1, f"the run ended before anybody asked for {event}")
        async with self._turnstile:
            await self._record_survived()
        await self.journal.end(stop_reason, live=self.live, replayed=self.replayed)

    # ---- Asking ------------------------------------------------------------------------------------------------------

    async def event(
        self, kind: Kind, agent: str, position: str, request: Mapping[str, Any], perform: Callable[[], Awaitable[Any]]
    ) -> Outcome:
        """The recorded event, or what `perform` returns, recorded.

        What `perform` raises is recorded if the program goes on after it, and raised again in a replay; if the run ends
        with it, it is asked for again the next time.
        """
        self._check_not_failed()
        outcome = await self._outcome_of(_Call(kind, agent, position, request), perform)
        if isinstance(outcome, _Raised):
            # Here in a replay, too, and without where it came from: AutoGen tells models the traceback.
            raise outcome.error.with_traceback(None) from None
        return outcome

    async def _outcome_of(self, call: _Call, perform: Callable[[], Awaitable[Any]]) -> Outcome | _Raised:
        if call.address in self._addresses:
            event = await self._recorded(call)
            if event is not None:
                if event.failure is None:
                    return Outcome(event.content, replayed=True)
                return self._raised(call, event.failure.again())
        let_through: asyncio.Future[Outcome | _Raised] = asyncio.get_running_loop().create_future()
        running = asyncio.create_task(self._live(call, perform, let_through))
        self._calls.add(running)
        running.add_done_callback(self._calls.discard)
        try:
            return await let_through
        except asyncio.CancelledError:
            running.cancel()
            raise

    async def _recorded(self, call: _Call) -> Event | None:
        asked = _Asked(call.request, asyncio.get_running_loop().create_future())
        self._asked[call.address] = asked
        self._changed.set()
        try:
            return await asked.let_through
        finally:
            self._asked.pop(call.address, None)

    async def _live(
        self, call: _Call, perform: Callable[[], Awaitable[Any]], let_through: asyncio.Future[Outcome | _Raised]
    ) -> None:
        try:
            if not self.is_live:
                # Nothing new is paid for while it can still turn out that the program is another one.
                self._waiting_live[str(call)] = self.journal.was_tried(call.address)
                self._changed.set()
                await self._all_replayed.wait()
                self._waiting_live.pop(str(call), None)
            if self.ended is not None:
                why = self.ended or "it had its answer"
                last = self.journal.events[-1].seq
                await self.drift(last, f"the recorded run was over ({why}), this one asks for {call}")
            task = await self.journal.begin(call.kind, call.agent, call.position)
            try:
                content = await self._perform(call, perform)
            except Exception as error:  # noqa: BLE001 - it is the asking agent's
                await self._let_failure_through(task, call, error, let_through)
                return
            async with self._turnstile:
                self._check_not_failed()
                await self._record_survived()
                event = await self._record(task, call, content)
                await rest()
                self.passed(event)
                if not let_through.done():
                    let_through.set_result(Outcome(event.content, replayed=False))
                await rest()
        except asyncio.CancelledError:
            if not let_through.done():
                let_through.set_exception(
                    self.failed.result() if self.failed.done() else RuntimeError("the call was cancelled")
                )
            raise
        except Exception as error:  # noqa: BLE001 - it is the asking agent's
            if isinstance(error, NexumError):
                self.stop(error)
            if not let_through.done():
                let_through.set_exception(error)

    async def _perform(self, call: _Call, perform: Callable[[], Awaitable[Any]]) -> Any:
        in_recorded_call.set(True)
        return await ordinary(perform(), str(call))

    async def _record(self, task: Task, call: _Call, content: Any, failure: Failure | None = None) -> Event:
        return await self.journal.record(
            task,
            call.kind,
            call.agent,
            call.position,
            content,
            call.request,
            failure=failure,
            active_ms=self.active_now_ms,
        )

    def _check_not_failed(self) -> None:
        if self.failed.done():
            raise self.failed.result()

    # ---- Failures ----------------------------------------------------------------------------------------------------

    def _raised(self, call: _Call, error: Exception) -> _Raised:
        if call.kind in (Kind.REPLY, Kind.INPUT):
            self.call_error = error
        return _Raised(error)

    async def _let_failure_through(
        self, task: Task, call: _Call, error: Exception, let_through: asyncio.Future[Outcome | _Raised]
    ) -> None:
        """Most failures end the run, and are not recorded. What comes after one may show that the program survived it,
        or come from another branch: a replay finds out which."""
        async with self._turnstile:
            self._check_not_failed()
            self._survived.append((task, call, error))
            await rest()
            if not let_through.done():
                let_through.set_result(self._raised(call, error))
            await rest()

    async def _record_survived(self) -> None:
        while self._survived:
            task, call, error = self._survived[0]
            await self._record(task, call, None, Failure.of(error))
            del self._survived[0]
        self.call_error = None

    # ---- Replaying ---------------------------------------------------------------------------------------------------

    async def _let_recorded_through(self) -> None:
        try:
            while self._ahead:
                await rest()
                event = self._ahead[0]
                asked = self._asked.get(event.address)
                if asked is None:
                    if not await self._is_asked_in_time(event):
                        others = sorted(
                            {*self._waiting_live, *(str(e) for e in self._ahead if e.address in self._asked)}
                        )
                        await self._drift(event, [f"nobody asked for it; the run asks for {', '.join(others)}"])
                    continue
                differing = [] if event.accepted else differences(event.request, asked.request)
                if differing:
                    await self._drift(event, differing)
                    continue
                self._ahead.popleft()
                self._addresses.discard(event.address)
                if event.failure is None:
                    self.passed(event)
                    self.call_error = None
                    self._let_through(asked, event)
                elif self.journal.ended is not None:
                    self._let_through(asked, event)  # the recorded run went on after all of its failures
                else:
                    self._held.append((event, asked))
            await rest()
            await self._ask_again()
            self._live_since, self._active_before = time.monotonic(), self.active_ms
            self._all_replayed.set()
        except Exception as error:  # noqa: BLE001 - whoever waits for an event has to know
            self.stop(error)

    def _let_through(self, asked: _Asked, event: Event | None) -> None:
        if not asked.let_through.done():
            asked.let_through.set_result(event)

    async def _is_asked_in_time(self, event: Event) -> bool:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        # What came late in the recorded run may come late again.
        late = 2 * max(0, event.active_ms - self.active_ms) / 1000
        while event.address in self._addresses and event.address not in self._asked:
            self._changed.clear()
            if self._held and (self._was_survived(self._held[0][0]) or loop.time() >= begun + HELD_PATIENCE + late):
                # What comes next in the record is not asked for before this failure is known.
                failed, asked = self._held.pop(0)
                self._let_through(asked, failed)
                await rest()
                begun = loop.time()
                continue
            # As long as nobody waits for something new, the program is at work on something of its own.
            held = {one.address for one, _ in self._held}
            is_new = not all(self._waiting_live.values()) or any(address not in held for address in self._asked)
            left = begun + (HELD_PATIENCE if held else DRIFT_PATIENCE) + late - loop.time()
            if is_new and not held and left <= 0:
                return False
            try:
                await asyncio.wait_for(self._changed.wait(), left if is_new or held else None)
            except (asyncio.TimeoutError, TimeoutError):
                continue
            if not is_new:
                begun = loop.time()
        return True

    def _was_survived(self, failed: Event) -> bool:
        """Whether the same agent, or one that it works for, has asked for something after it."""
        return any(
            f"{failed.agent}/".startswith(f"{one.agent}/")
            for one in self.journal.events
            if one.seq > failed.seq and one.kind.is_asked_for
        )

    async def _ask_again(self) -> None:
        """Nothing more is recorded: the failures that are left have ended the run, and are made up for."""
        for event, asked in self._held:
            await self.journal.revoke(event)
            self._let_through(asked, None)
        self._held.clear()

    async def _drift(self, event: Event, differing: list[str]) -> None:
        await self.drift(event.seq - 1, f"{event} is not what this run asks for: {'; '.join(differing)}")

    async def drift(self, after: int, what: str) -> None:
        """The run has left the record after this event's number: stop, or go on live from here. Raises DriftError."""
        session = self.journal.session
        self.ended = None
        if self.on_drift == "stop":
            raise DriftError(
                f"session {session} has recorded another run. {what[0].upper()}{what[1:]}. Run what was recorded, or "
                "take another session, or go on live from here with on_drift='continue' (--on-drift continue)"
            )
        self.tell(f"[Nexum] {what}")
        self.tell(
            f"[Nexum] session {session} goes on live from here; {len(self._ahead)} recorded event(s) are left behind"
        )
        await self.journal.branch(after, what)
        self.epoch = self.journal.epoch
        await self._ask_again()
        self._ahead.clear()
        self._addresses.clear()
        self._changed.set()
        for asked in self._asked.values():
            if not asked.let_through.done():
                asked.let_through.set_result(None)
