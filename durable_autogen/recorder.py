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

from console import say
from durable_autogen.errors import DriftError
from durable_autogen.journal import Event, Journal, Kind, RunSummary, name_of
from durable_autogen.quiet import in_recorded_call, rest
from durable_autogen.request import differences
from nexum_engine.errors import NexumError

OnDrift = Literal["stop", "continue"]
DRIFT_PATIENCE = 10.0  # seconds that a recorded event may be waited for while the run asks for others


@dataclass(frozen=True)
class Outcome:
    """What became of an event that was asked for."""

    content: Any
    replayed: bool


@dataclass
class _Asked:
    request: Mapping[str, Any]
    let_through: asyncio.Future[Event | None]


class Recorder:
    """The events of one run. `failed` resolves when the run can't go on; everything asked for then fails with it."""

    def __init__(self, journal: Journal, *, on_drift: OnDrift = "stop") -> None:
        self.journal = journal
        self.on_drift = on_drift
        self.failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.ended: str | None = None
        """Why the recorded run was over, if it was and if nothing may be asked for after it."""
        self.call_error: Exception | None = None
        """What the last failed model call or input raised, as AutoGen passes only its text on."""
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
        self._waiting_live: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._all_replayed = asyncio.Event()
        self._live_since = time.monotonic()
        self._active_before = 0
        self._turnstile = asyncio.Lock()
        self._calls: set[asyncio.Task[None]] = set()
        self._replay = asyncio.create_task(self._let_recorded_through(), name="replay")

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

    def summary(self, stop_reason: str) -> RunSummary:
        return RunSummary(stop_reason=stop_reason, live=dict(self.live), replayed=dict(self.replayed))

    # ---- Asking ------------------------------------------------------------------------------------------------------

    async def event(
        self, kind: Kind, agent: str, position: str, request: Mapping[str, Any], perform: Callable[[], Awaitable[Any]]
    ) -> Outcome:
        """The recorded event, or what `perform` returns, recorded. What `perform` raises is not recorded."""
        if self.failed.done():
            raise self.failed.result()
        loop = asyncio.get_running_loop()
        address = f"{agent}/{position}"
        if address in self._addresses:
            asked = self._asked[address] = _Asked(request, loop.create_future())
            self._changed.set()
            try:
                event = await asked.let_through
            finally:
                self._asked.pop(address, None)
            if event is not None:
                return Outcome(event.content, replayed=True)
        let_through: asyncio.Future[Any] = loop.create_future()
        call = asyncio.create_task(self._live(kind, agent, position, request, perform, let_through))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            return Outcome(await let_through, replayed=False)
        except asyncio.CancelledError:
            call.cancel()
            raise

    async def _live(
        self,
        kind: Kind,
        agent: str,
        position: str,
        request: Mapping[str, Any],
        perform: Callable[[], Awaitable[Any]],
        let_through: asyncio.Future[Any],
    ) -> None:
        try:
            if not self._all_replayed.is_set():
                # Nothing new is paid for while it can still turn out that the program is another one.
                self._waiting_live[name_of(kind, agent, position)] = 1
                self._changed.set()
                await self._all_replayed.wait()
                self._waiting_live.pop(name_of(kind, agent, position), None)
            if self.ended is not None:
                what = f"the recorded run was over ({self.ended or 'it had its answer'}), this one asks for "
                await self.drift(self.journal.events[-1].seq, what + name_of(kind, agent, position))
            task = await self.journal.begin(kind, agent, position)
            try:
                content = await self._perform(perform, name_of(kind, agent, position))
            except Exception as error:
                if kind is not Kind.TOOL:
                    self.call_error = error
                if not self.failed.done():
                    await self.journal.give_up(task, f"{type(error).__name__}: {error}")
                raise
            async with self._turnstile:
                if self.failed.done():
                    raise self.failed.result()
                active_ms = self._active_before + round((time.monotonic() - self._live_since) * 1000)
                event = await self.journal.record(task, kind, agent, position, content, request, active_ms=active_ms)
                await rest()
                self.passed(event)
                if not let_through.done():
                    let_through.set_result(content)
                await rest()
        except asyncio.CancelledError:
            if not let_through.done():
                let_through.set_exception(
                    self.failed.result() if self.failed.done() else RuntimeError("the call was cancelled")
                )
            raise
        except Exception as error:  # noqa: BLE001 - it is the asking agent's
            if isinstance(error, NexumError) and not self.failed.done():
                self.stop(error)
            if not let_through.done():
                let_through.set_exception(error)

    async def _perform(self, perform: Callable[[], Awaitable[Any]], name: str) -> Any:
        """Whatever ends the call is an ordinary error: AutoGen waits for ever for a tool that ends as cancelled."""
        in_recorded_call.set(True)

        async def contained() -> Any:
            try:
                return await perform()
            except (Exception, asyncio.CancelledError):
                raise
            except BaseException as error:
                # SystemExit and its like would end the event loop.
                raise RuntimeError(f"{name} ended with {type(error).__name__}: {error}") from error

        running = asyncio.ensure_future(contained())
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            raise
        if running.cancelled():
            raise RuntimeError(f"{name} ended with CancelledError")
        return running.result()

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
                self.passed(event)
                asked.let_through.set_result(event)
            await rest()
            self._live_since, self._active_before = time.monotonic(), self.active_ms
            self._all_replayed.set()
        except Exception as error:  # noqa: BLE001 - whoever waits for an event has to know
            self.stop(error)

    async def _is_asked_in_time(self, event: Event) -> bool:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while event.address in self._addresses and event.address not in self._asked:
            self._changed.clear()
            # As long as nobody waits for something else, the program is at work on something of its own.
            waiting = bool(self._waiting_live or self._asked)
            left = begun + DRIFT_PATIENCE - loop.time()
            if waiting and left <= 0:
                return False
            try:
                await asyncio.wait_for(self._changed.wait(), left if waiting else None)
            except (asyncio.TimeoutError, TimeoutError):
                continue
            if not waiting:
                begun = loop.time()
        return True

    async def _drift(self, event: Event, differing: list[str]) -> None:
        what = f"{event} is not what this run asks for: {'; '.join(differing)}"
        await self.drift(event.seq - 1, what)

    async def drift(self, after: int, what: str) -> None:
        """The run has left the record after this event's number: stop, or go on live from here. Raises DriftError."""
        session = self.journal.session
        self.ended = None
        if self.on_drift == "stop":
            raise DriftError(
                f"session {session} has recorded another run. {what[0].upper()}{what[1:]}. Run what was recorded, or "
                "take another session, or go on live from here with on_drift='continue' (--on-drift continue)"
            )
        say(f"[Nexum] {what}")
        say(f"[Nexum] session {session} goes on live from here; {len(self._ahead)} recorded event(s) are left behind")
        await self.journal.branch(after, what)
        self.epoch = self.journal.epoch
        self._ahead.clear()
        self._addresses.clear()
        self._changed.set()
        for asked in self._asked.values():
            if not asked.let_through.done():
                asked.let_through.set_result(None)
