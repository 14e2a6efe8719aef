"""Hands a run its recorded events in their order; what it asks for after that is called live, and recorded.

Every event passes one turnstile. It lets one through, waits until the event loop has come to rest, and lets the next
one through: in the live run in the order of recording, in a replay in the same. So parallel branches of a team meet
again in the order in which they met, and whoever comes after them gets the same prompt.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autogen_core import CancellationToken

from durable_autogen.errors import DriftError
from durable_autogen.events import Event, Kind
from durable_autogen.failures import Failure, ordinary
from durable_autogen.journal import TAKE_OVER_PATIENCE, Journal
from durable_autogen.quiet import in_recorded_call, rest
from durable_autogen.replay import Call, Replay
from nexum_engine.errors import NexumError
from nexum_engine.model import Task

OnDrift = Literal["stop", "continue"]
NO_TASK: Mapping[str, Any] = {"task": []}
"""The beginning of a session in which a program runs its agents itself."""


@dataclass(frozen=True)
class Outcome:
    """The result of an event that was asked for."""

    content: Any
    replayed: bool


@dataclass(frozen=True)
class _Raised:
    """The failure of an event that was asked for."""

    error: Exception


@dataclass(frozen=True, eq=False)
class _Survived:
    """A failure that the program may have survived: it is recorded when something comes after it."""

    task: Task
    call: Call
    error: Exception
    asked_ms: int


class Recorder:
    """The events of one run. `failed` resolves when the run can't go on; everything asked for then fails with it."""

    def __init__(self, journal: Journal, *, on_drift: OnDrift = "stop") -> None:
        self.journal = journal
        self.on_drift = on_drift
        self.failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.ended: str | None = None
        """Why the recorded run was over, if it was and if nothing may be asked for after it."""
        self.call_error: Exception | None = None
        """What the last model call or input raised, unless something followed it: AutoGen passes on only its text."""
        self.last_recorded_ms = 0
        """When the last event that an agent has got was recorded, in milliseconds since 1970."""
        self.epoch = 0
        """That event's epoch: how many times the session had gone on with a changed program."""
        self.live: Counter[str] = Counter()
        self.replayed: Counter[str] = Counter()
        self.messages = [event for event in journal.events if event.kind is Kind.MESSAGE]
        """User messages that forks have added."""
        self.delivered: set[int] = set()
        """The sequence numbers of those that an agent has seen."""
        self.as_task: set[int] = set()
        """The sequence numbers of those that were given as a task of their own, because the run was over."""
        for event in journal.events:
            if event.kind is Kind.BEGIN:
                self.passed(event)
        self._seq_of = {event.address: event.seq for event in journal.events}
        self._survived: list[_Survived] = []
        self._turnstile = asyncio.Lock()
        self._calls: set[asyncio.Task[None]] = set()
        self._replay = Replay(journal, on_passed=self._passed_in_replay, on_drift=self._drift, tell=self.tell)
        self._replaying = asyncio.create_task(self._run_replay(), name="replay")

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
        for running in (self._replaying, *self._calls):
            running.cancel()
        await asyncio.gather(self._replaying, *self._calls, return_exceptions=True)

    def stop(self, error: Exception) -> None:
        """Fail the run."""
        if not self.failed.done():
            self.failed.set_result(error)
        self._replay.fail(error)
        for call in self._calls:
            call.cancel()

    def is_recorded(self, address: str) -> bool:
        """Whether the event is still ahead in the record."""
        return self._replay.is_ahead(address)

    def comes_before(self, address: str, message: Event) -> bool:
        """Whether the event belongs to what was recorded before the message was added."""
        return self._seq_of.get(address, message.seq) < message.seq

    def passed(self, event: Event) -> None:
        """The session has come as far as this event."""
        self.last_recorded_ms, self.epoch = event.recorded_ms, event.epoch

    async def begin(self, content: Mapping[str, Any] = NO_TASK, request: Mapping[str, Any] | None = None) -> None:
        """Record the beginning of a session that has none, or of one that goes on as another program."""
        async with self._turnstile:
            if request is not None or not self.journal.events:
                position = f"begin/{self.journal.epoch}"
                self.passed(await self.journal.add(Kind.BEGIN, "", position, content, request or {}))

    @property
    def is_live(self) -> bool:
        """Whether all that is recorded was asked for."""
        return self._replay.over_since is not None

    @property
    def active_now_ms(self) -> int:
        """How long the session has been at work by now."""
        since = self._replay.over_since
        return self._replay.active_ms + (0 if since is None else round((time.monotonic() - since) * 1000))

    async def end(self, stop_reason: str) -> None:
        """The run is over, and whole. Raises DriftError if more was recorded than it asked for."""
        if self._replay.ahead:
            event = self._replay.ahead[0]
            await self.drift(event.seq - 1, f"the run ended before anybody asked for {event}")
        async with self._turnstile:
            await self._record_survived()
        await self.journal.end(stop_reason, live=self.live, replayed=self.replayed)

    # ---- Asking ------------------------------------------------------------------------------------------------------

    async def event(
        self,
        kind: Kind,
        agent: str,
        position: str,
        request: Mapping[str, Any],
        perform: Callable[[], Awaitable[Any]],
        cancellation_token: CancellationToken | None = None,
    ) -> Outcome:
        """The recorded event, or what `perform` returns, recorded.

        What `perform` raises is recorded if the program goes on after it, and raised again in a replay; if the run ends
        with it, it is asked for again the next time. Who is cancelled, by itself or by its token, has asked in vain:
        nothing is recorded, and the replay of the same program cancels it again.
        """
        asking = asyncio.ensure_future(self._event(kind, agent, position, request, perform))
        if cancellation_token is not None:
            cancellation_token.link_future(asking)
        return await asking

    async def _event(
        self, kind: Kind, agent: str, position: str, request: Mapping[str, Any], perform: Callable[[], Awaitable[Any]]
    ) -> Outcome:
        self._check_not_failed()
        outcome = await self._outcome_of(Call(kind, agent, position, request), perform)
        if isinstance(outcome, _Raised):
            # Here in a replay, too, and without where it came from: AutoGen tells models the traceback.
            raise outcome.error.with_traceback(None) from None
        return outcome

    async def _outcome_of(self, call: Call, perform: Callable[[], Awaitable[Any]]) -> Outcome | _Raised:
        if self._replay.is_ahead(call.address):
            event = await self._replay.take(call)
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

    async def _live(
        self, call: Call, perform: Callable[[], Awaitable[Any]], let_through: asyncio.Future[Outcome | _Raised]
    ) -> None:
        try:
            # Nothing new is paid for while it can still turn out that the program is another one.
            await self._replay.wait_until_over(call)
            if self.ended is not None:
                why = self.ended or "it had its answer"
                last = self.journal.events[-1].seq
                await self.drift(last, f"the recorded run was over ({why}), this one asks for {call}")
            asked_ms = self.active_now_ms
            task = await self.journal.begin(call.kind, call.agent, call.position)
            try:
                content = await self._perform(call, perform)
            except Exception as error:  # noqa: BLE001 - it is the asking agent's
                await self._let_failure_through(_Survived(task, call, error, asked_ms), let_through)
                return
            async with self._turnstile:
                self._check_not_failed()
                await self._record_survived()
                event = await self._record(task, call, content, asked_ms)
                await rest()
                self.passed(event)
                if not let_through.done():
                    let_through.set_result(Outcome(event.content, replayed=False))
                await rest()
        except asyncio.CancelledError:
            if let_through.cancelled() and not self.failed.done():
                await self._take_back(call)
            elif not let_through.done():
                let_through.set_exception(
                    self.failed.result() if self.failed.done() else RuntimeError("the call was cancelled")
                )
            raise
        except Exception as error:  # noqa: BLE001 - it is the asking agent's
            if isinstance(error, NexumError):
                self.stop(error)
            if not let_through.done():
                let_through.set_exception(error)

    async def _take_back(self, call: Call) -> None:
        """What was recorded while its asker gave up has reached nobody, and must not reach it in a replay."""
        event = next((one for one in reversed(self.journal.events) if one.address == call.address), None)
        if event is not None:
            try:
                await self.journal.revoke(event)
            except NexumError as error:
                self.stop(error)

    async def _perform(self, call: Call, perform: Callable[[], Awaitable[Any]]) -> Any:
        in_recorded_call.set(True)
        return await ordinary(perform(), str(call))

    async def _record(
        self, task: Task, call: Call, content: Any, asked_ms: int, failure: Failure | None = None
    ) -> Event:
        recording = asyncio.ensure_future(
            self.journal.record(
                task,
                call.kind,
                call.agent,
                call.position,
                content,
                call.request,
                failure=failure,
                active_ms=self.active_now_ms,
                asked_ms=asked_ms,
            )
        )
        try:
            return await asyncio.shield(recording)
        except asyncio.CancelledError:
            # The server may have it: then it has to be known here as well.
            await asyncio.wait({recording}, timeout=TAKE_OVER_PATIENCE)
            raise
        finally:
            recording.cancel()

    def _check_not_failed(self) -> None:
        if self.failed.done():
            raise self.failed.result()

    # ---- Failures ----------------------------------------------------------------------------------------------------

    def _raised(self, call: Call, error: Exception) -> _Raised:
        if call.kind in (Kind.REPLY, Kind.INPUT):
            self.call_error = error
        return _Raised(error)

    async def _let_failure_through(self, failed: _Survived, let_through: asyncio.Future[Outcome | _Raised]) -> None:
        """Most failures end the run, and are not recorded. What comes after one may show that the program survived it,
        or come from another branch: a replay finds out which."""
        async with self._turnstile:
            self._check_not_failed()
            self._survived.append(failed)
            await rest()
            if not let_through.done():
                let_through.set_result(self._raised(failed.call, failed.error))
            await rest()

    async def _record_survived(self) -> None:
        while self._survived:
            failed = self._survived[0]
            try:
                await self._record(failed.task, failed.call, None, failed.asked_ms, Failure.of(failed.error))
            finally:
                # Who was cancelled meanwhile may have recorded it all the same.
                if any(event.address == failed.call.address for event in self.journal.events):
                    self._survived.remove(failed)
        self.call_error = None

    # ---- Replaying ---------------------------------------------------------------------------------------------------

    async def _run_replay(self) -> None:
        try:
            await self._replay.run()
        except Exception as error:  # noqa: BLE001 - whoever waits for an event has to know
            self.stop(error)

    def _passed_in_replay(self, event: Event) -> None:
        self.passed(event)
        self.call_error = None

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
        left = len(self._replay.ahead)
        self.tell(f"[Nexum] session {session} goes on live from here; {left} recorded event(s) are left behind")
        await self.journal.branch(after, what)
        self._seq_of = {address: seq for address, seq in self._seq_of.items() if seq <= after}
        await self._replay.leave()
