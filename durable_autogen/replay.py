"""The recorded events of a run, let through one at a time in their order, as the run asks for them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from durable_autogen.events import Event, Kind, name_of
from durable_autogen.journal import Journal
from durable_autogen.quiet import rest
from durable_autogen.request import differences

DRIFT_PATIENCE = 10.0  # seconds that a recorded event may be waited for while the run asks for what is new
TRIED_PATIENCE = 30.0  # the same, while it asks for no more than what was in flight when an earlier run ended
HELD_PATIENCE = 1.0  # seconds in which a program that survived a failure may go on by itself


@dataclass(frozen=True)
class Call:
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


class Replay:
    """What the record has ahead of the run.

    A recorded failure is held back until it shows whether the program survived it: if something that came after it is
    asked for only when the failure is known, it did; if not, the failure ended the run, and the call is made again.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        on_passed: Callable[[Event], None],
        on_drift: Callable[[Event, list[str]], Awaitable[None]],
        tell: Callable[[str], None],
    ) -> None:
        self.ahead = deque(event for event in journal.events if event.kind.is_asked_for)
        """What was not asked for yet."""
        self.active_ms = 0
        """How long the session had been at work when the last event that was let through was recorded."""
        self.over_since: float | None = None
        """When all that is recorded had been asked for, by time.monotonic()."""
        self._journal = journal
        self._on_passed = on_passed
        self._on_drift = on_drift
        self._tell = tell
        self._addresses = {event.address for event in self.ahead}
        self._asked: dict[str, _Asked] = {}
        self._held: list[tuple[Event, _Asked]] = []
        self._waiting_live: dict[str, bool] = {}
        """What has to wait for the end of the replay, and whether an earlier run has asked for it, too."""
        self._changed = asyncio.Event()
        self._over = asyncio.Event()

    def is_ahead(self, address: str) -> bool:
        """Whether the event of this address is recorded and was not let through yet."""
        return address in self._addresses

    async def take(self, call: Call) -> Event | None:
        """The recorded event when its turn has come; None if it counts no more, and the call is to be made."""
        asked = _Asked(call.request, asyncio.get_running_loop().create_future())
        self._asked[call.address] = asked
        self._changed.set()
        try:
            return await asked.let_through
        finally:
            self._asked.pop(call.address, None)

    async def wait_until_over(self, call: Call) -> None:
        """Return when all that is recorded was asked for. What waits here is new, which may show another program."""
        if self._over.is_set():
            return
        self._waiting_live[str(call)] = self._journal.was_tried(call.address)
        self._changed.set()
        try:
            await self._over.wait()
        finally:
            self._waiting_live.pop(str(call), None)

    def fail(self, error: Exception) -> None:
        """Raise this for everybody who waits for a recorded event."""
        for asked in self._asked.values():
            if not asked.let_through.done():
                asked.let_through.set_exception(error)

    async def leave(self) -> None:
        """What is ahead counts no more: whoever waits for it makes the call."""
        await self._call_again()
        self.ahead.clear()
        self._addresses.clear()
        self._changed.set()
        for asked in self._asked.values():
            _let_through(asked, None)

    async def run(self) -> None:
        """Let everything through; return when nothing is ahead. Raises what `on_drift` raises."""
        while self.ahead:
            await rest()
            event = self.ahead[0]
            asked = self._asked.get(event.address)
            if asked is None:
                if not await self._is_asked_in_time(event):
                    others = {*self._waiting_live, *(str(one) for one in self.ahead if one.address in self._asked)}
                    await self._on_drift(event, [f"nobody asked for it; the run asks for {', '.join(sorted(others))}"])
                continue
            differing = [] if event.accepted else differences(event.request, asked.request)
            if differing:
                await self._on_drift(event, differing)
                continue
            self.ahead.popleft()
            self._addresses.discard(event.address)
            if event.failure is None:
                self.active_ms = event.active_ms
                self._on_passed(event)
                _let_through(asked, event)
            elif self._journal.ended is not None:
                _let_through(asked, event)  # the recorded run went on after all of its failures
            else:
                self._held.append((event, asked))
        await rest()
        await self._call_again()
        self.over_since = time.monotonic()
        self._over.set()

    async def _is_asked_in_time(self, event: Event) -> bool:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        # What was asked for late in the recorded run may be asked for late again.
        late = round(2 * max(0, event.asked_ms - self.active_ms) / 1000, 1)
        notice = loop.call_later(DRIFT_PATIENCE, self._tell_waiting, event, late)
        try:
            while event.address in self._addresses and event.address not in self._asked:
                self._changed.clear()
                if self._held and (self._was_survived(self._held[0][0]) or loop.time() >= begun + HELD_PATIENCE + late):
                    # What comes next in the record is not asked for before this failure is known.
                    failed, asked = self._held.pop(0)
                    _let_through(asked, failed)
                    await rest()
                    begun = loop.time()
                    continue
                patience = self._patience()
                left = None if patience is None else begun + patience + late - loop.time()
                if left is not None and left <= 0 and not self._held:
                    return False
                with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), left)
                if patience is None:
                    begun = loop.time()
            return True
        finally:
            notice.cancel()

    def _tell_waiting(self, event: Event, late: float) -> None:
        if (patience := self._patience()) is not None:
            limit = patience + late
            self._tell(f"[Nexum] {event} is next on record: waiting up to {limit:g} s for the run to ask for it")

    def _patience(self) -> float | None:
        """How long the run may go without asking for what is recorded next, in seconds.

        As long as nobody waits, the program is at work on something of its own, and will ask for it or end.
        """
        held = {one.address for one, _ in self._held}
        if held:
            return HELD_PATIENCE
        if self._asked or not all(self._waiting_live.values()):
            return DRIFT_PATIENCE
        return TRIED_PATIENCE if self._waiting_live else None

    def _was_survived(self, failed: Event) -> bool:
        """Whether the same agent, or one that it works for, has asked for something after it."""
        return any(
            f"{failed.agent}/".startswith(f"{one.agent}/")
            for one in self._journal.events
            if one.seq > failed.seq and one.kind.is_asked_for
        )

    async def _call_again(self) -> None:
        """Nothing more is recorded: the failures that are left have ended the run, and are made up for."""
        for event, asked in self._held:
            await self._journal.revoke(event)
            _let_through(asked, None)
        self._held.clear()


def _let_through(asked: _Asked, event: Event | None) -> None:
    if not asked.let_through.done():
        asked.let_through.set_result(event)
