"""The leases of connected workers, and the sweep that ends attempts whose lease has run out."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import astuple, replace
from typing import Concatenate, ParamSpec

from nexum_engine import jsontext
from nexum_engine.clock import Clock, wait_until_set
from nexum_engine.errors import InvalidRequest, StoreUnavailable
from nexum_engine.records import DeclaredTool
from nexum_engine.server.polls import Polls
from nexum_engine.server.waiters import Waiters
from nexum_engine.store import Store, leases, reading
from nexum_engine.store.db import Db
from nexum_engine.store.results import Changes, News, ReadyTask
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.workflow import check_id

RECONNECT_GRACE_MS = 1000
"""How long a worker has to reconnect after its stream broke. After that time its tasks are handed out again."""
RESTART_GRACE_MS = 1500
"""How long workers have to reconnect after the server has started. A running worker tries to reconnect several times a
second. So the grace delays only the tasks of workers that died with the server."""
SWEEP_RETRY_MS = 1000  # the pause after a sweep that failed
STALL_MS = 1000
"""A sweep that has waited this long for the store ends nothing: the heartbeats have waited for the store, too."""
LATE = 0.05
"""If the sweep's timer is late by this many seconds, the event loop was blocked, or the process was suspended."""
MAX_BEAT_TASKS = 4000
"""The number of tasks that one heartbeat may name."""
MAX_TOOLS = 500  # of one worker or owner
MAX_TOOL_BYTES = 2000
MAX_LISTED_TOOLS = 1000

logger = logging.getLogger(__name__)
P = ParamSpec("P")


class Liveness:
    """The keeper of workers' leases. It renews leases at each heartbeat, and ends attempts whose lease has run out."""

    def __init__(self, store: Store, polls: Polls, waiters: Waiters, clock: Clock, lease_ms: int) -> None:
        self._store = store
        self._polls = polls
        self._waiters = waiters
        self._clock = clock
        self.lease_ms = lease_ms
        self._connected: dict[str, list[DeclaredTool]] = {}
        """The tools that each connected worker or owner has declared on its newest stream."""
        self._due_ms: int | None = None
        self._due_changed = asyncio.Event()
        self._swept_until_ms = clock.now_ms()
        self._sweeper: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def start(self, dead_process: str = "") -> None:
        """Start the sweep. First reset the leases, so that workers have time to reconnect after a restart.

        The workers and owners in `dead_process` get no time (see `leases.restart`).
        """
        self._store.join(self.hear)
        await self._store.run(leases.restart, RESTART_GRACE_MS, 2 * self.lease_ms, dead_process)
        self._sweeper = asyncio.create_task(self._sweep(), name="sweeper")

    async def stop(self) -> None:
        """End the worker streams and the sweep. The workers keep their tasks."""
        self._stopping.set()
        tasks = [task for task in (self._sweeper, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def beats(self, requests: AsyncIterable[pb.WorkerBeat]) -> AsyncGenerator[pb.WorkerBeatAck, None]:
        """Acknowledge the heartbeats of one worker until its stream breaks or the server stops."""
        worker_id = ""
        declared: list[DeclaredTool] = []
        unnamed: frozenset[str] = frozenset()
        incoming = aiter(requests)
        try:
            while True:
                beat = await self._next_beat(incoming)
                if beat is None:
                    return
                if not worker_id:
                    worker_id = check_id(beat.worker_id, "worker_id")
                    self._connected[worker_id] = declared
                    self._polls.worker_connected(worker_id)
                if len(beat.task_ids) > MAX_BEAT_TASKS:
                    raise InvalidRequest(
                        f"the heartbeat names {len(beat.task_ids):,} tasks; the limit is {MAX_BEAT_TASKS:,}"
                    )
                _declare(beat, declared)
                if beat.draining:
                    self._polls.drain(worker_id)
                came_ms = self._clock.now_ms()
                progress = {one.task_id: one.progress_json for one in beat.progress}
                renewed = await self._store.run(leases.renew, worker_id, tuple(beat.task_ids), self.lease_ms, progress)
                self._polls.worker_beats(worker_id, came_ms)
                if renewed.resumed:
                    self.task_handed_out()
                unnamed_before, unnamed = unnamed, renewed.unnamed
                # If two heartbeats in a row don't name a task, the task never arrived: end its attempt. One heartbeat
                # isn't enough, because the worker may send it before the task arrives. The worker sends the second one
                # after the acknowledgement of the first one, and the server sends this acknowledgement after the task.
                if never_arrived := unnamed & unnamed_before:
                    await self.carry_out(leases.lose, worker_id, never_arrived)
                yield pb.WorkerBeatAck(lease_ms=self.lease_ms, lost_task_ids=renewed.lost)
        finally:
            # Do nothing if the worker has reconnected on a new stream: the worker keeps its tasks.
            if worker_id and self._connected.get(worker_id) is declared:
                del self._connected[worker_id]
                self._polls.worker_disconnected(worker_id)
                if not self._stopping.is_set():
                    self._disconnected(worker_id)

    def is_connected(self, worker_id: str) -> bool:
        """Return whether a worker or owner has a stream at this server."""
        return worker_id in self._connected

    def lease_of_owner(self, owner: str) -> int:
        """Return the length in ms of a lease that an owner gets now.

        An owner without a stream gets the time for a reconnection: its process may have been killed, and the server may
        read the process's last request after the end of its stream.
        """
        return self.lease_ms if self.is_connected(owner) else min(self.lease_ms, RECONNECT_GRACE_MS)

    def tools(self) -> list[DeclaredTool]:
        """Return the tools that connected workers and owners have declared, sorted by name.

        If several of them have declared a tool in the same way, the tool is listed once, with their number.
        """
        counted = Counter(tool for declared in self._connected.values() for tool in set(declared))
        listed = sorted(counted, key=astuple)[:MAX_LISTED_TOOLS]
        return [replace(tool, senders=counted[tool]) for tool in listed]

    async def _next_beat(self, incoming: AsyncIterator[pb.WorkerBeat]) -> pb.WorkerBeat | None:
        """Return the next heartbeat, or None when the stream has ended or the server stops."""

        async def read() -> pb.WorkerBeat | None:
            return await anext(incoming, None)

        reading = asyncio.ensure_future(read())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else None
        finally:
            reading.cancel()
            stopping.cancel()

    def _disconnected(self, worker_id: str) -> None:
        # Submit the shorter leases at once. If they were submitted later, they could come after the first heartbeat on
        # the worker's next stream, and shorten the leases of a worker that has reconnected.
        stored = self._store.run(leases.disconnect, worker_id, RECONNECT_GRACE_MS)
        stored.when_stored(lambda _: self.due_at(self._clock.now_ms() + RECONNECT_GRACE_MS))

    # ---- Sweeping ----------------------------------------------------------------------------------------------------

    async def carry_out(
        self, transition: Callable[Concatenate[Db, P], Changes], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Store a transition, and act on its effects, even if the caller is cancelled."""
        submitted = self._store.run(transition, *args, **kwargs)
        submitted.when_stored(self.apply)
        await submitted

    def apply(self, changed: Changes) -> None:
        """Wake the polls, the waiters and the sweep that must act after a stored transition."""
        for ready in changed.ready:
            self._polls.task_ready(ready)
        for execution in changed.ended:
            self._waiters.execution_ended(execution)
        for execution_id in changed.ended_items:
            self._waiters.ended_by_id(execution_id)
        if changed.due_ms is not None:
            self.due_at(changed.due_ms)

    def hear(self, news: News) -> None:
        """Act on what another server on the same database has changed."""
        for version_hash in news.ready:
            self._polls.task_ready(ReadyTask(version_hash))
        for execution_id in news.ended:
            self._waiters.ended_by_id(execution_id)
        if news.due_ms is not None:
            self.due_at(news.due_ms)
        if news.anything and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look_again(), name="look again")

    async def _look_again(self) -> None:
        """Look for the due tasks and the ended executions that calls wait for: news of them may have been lost."""
        versions, running = self._polls.waited_for(), self._waiters.waited_for()
        self._waiters.forget_running()
        if not versions and not running:
            return
        try:
            missed = await self._store.run(reading.missed, versions, running)
        except StoreUnavailable:
            return  # the next look is soon
        self.hear(missed)

    def due_at(self, due_ms: int) -> None:
        """Make the sweep run no later than `due_ms`, when a lease runs out, a retry is due, or a wait is over."""
        if self._due_ms is None or due_ms < self._due_ms:
            self._due_ms = due_ms
            self._due_changed.set()

    def task_handed_out(self, timeout_ms: int | None = None) -> None:
        """Schedule a sweep for the end of a lease that begins now, or for the end of a shorter time limit."""
        lease_ms = self.lease_ms if timeout_ms is None else min(self.lease_ms, timeout_ms)
        self.due_at(self._clock.now_ms() + lease_ms)

    async def _sweep(self) -> None:
        may_wait_ms: int | None = STALL_MS
        while True:
            self._due_ms = None
            earliest_ms, now_ms = 0, self._clock.now_ms()
            latest_ms = None if may_wait_ms is None else now_ms + may_wait_ms
            try:
                swept = await self._store.run(leases.sweep, self._swept_until_ms, latest_ms)
            except Exception as error:
                if self._store.failed.done():
                    return  # the server stops, and says why
                fault = None if isinstance(error, StoreUnavailable) else error
                logger.warning("could not end the attempts whose lease has run out; retrying in 1 s", exc_info=fault)
                may_wait_ms = -1  # the next sweep only finds out whether the store works again
                self.due_at(self._clock.now_ms() + SWEEP_RETRY_MS)
            else:
                if swept.is_late:
                    # After an outage of the store, workers have as long to send a heartbeat as any disconnected worker.
                    # But they get this time only once: a slow store must not keep the leases for ever.
                    may_wait_ms, earliest_ms = None, self._clock.now_ms() + RECONNECT_GRACE_MS
                    self.due_at(earliest_ms)
                else:
                    may_wait_ms = STALL_MS
                    self._swept_until_ms = now_ms
                    self.apply(swept.changed)
                    if swept.next_ms is not None:
                        self.due_at(swept.next_ms)
            self._due_changed.clear()
            await self._until_due(earliest_ms)

    async def _until_due(self, earliest_ms: int) -> None:
        """Wait until the sweep is due, and at least until `earliest_ms`. If the timer is late, wait longer.

        The event loop has not yet read the heartbeats that came while it was blocked. Workers may have broken their
        streams, because the server didn't answer. They have as long to reconnect as any disconnected worker.
        """
        loop = asyncio.get_running_loop()
        while True:
            if self._due_ms is None:
                await self._due_changed.wait()
            elif (left_ms := max(self._due_ms, earliest_ms) - self._clock.now_ms()) > 0:
                late_at = loop.time() + left_ms / 1000 + LATE
                await wait_until_set(self._due_changed, left_ms / 1000)
                if loop.time() > late_at and not earliest_ms:  # a busy server must not wait for ever
                    earliest_ms = self._clock.now_ms() + RECONNECT_GRACE_MS
            else:
                return
            self._due_changed.clear()


def _declare(beat: pb.WorkerBeat, declared: list[DeclaredTool]) -> None:
    """Add the tools that a heartbeat declares to `declared`. Ignore wrong ones, and those above the limits."""
    for one in beat.tools:
        if len(declared) >= MAX_TOOLS or one.ByteSize() > MAX_TOOL_BYTES:
            continue
        with suppress(InvalidRequest):
            if isinstance(jsontext.parse(one.policy_json, "policy_json"), dict):
                declared.append(DeclaredTool(one.name, one.signature, one.policy_json, one.session))
