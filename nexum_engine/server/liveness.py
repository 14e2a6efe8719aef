"""The leases of connected workers, and the sweep that ends attempts whose lease has run out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable

from nexum_engine.clock import Clock
from nexum_engine.errors import StoreUnavailable
from nexum_engine.server.polls import Polls
from nexum_engine.server.waiters import Waiters
from nexum_engine.store import Store, leases
from nexum_engine.store.results import Changed
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.workflow import check_id

RECONNECT_GRACE_MS = 1000
"""How long a worker whose stream broke has to reconnect before its tasks are handed out again."""
RESTART_GRACE_MS = 1500
"""How long workers have to reconnect after the server has started. A live worker tries several times a second, so this
delays only the tasks of a worker that died with the server."""
SWEEP_RETRY_MS = 1000

logger = logging.getLogger(__name__)


class Liveness:
    """The keeper of workers' leases: it renews them at each beat, and ends attempts whose lease has run out."""

    def __init__(self, store: Store, polls: Polls, waiters: Waiters, clock: Clock, lease_ms: int) -> None:
        self._store = store
        self._polls = polls
        self._waiters = waiters
        self._clock = clock
        self._lease_ms = lease_ms
        self._streams: dict[str, object] = {}
        self._due_ms: int | None = None
        self._due_changed = asyncio.Event()
        self._swept_until_ms = clock.now_ms()
        self._sweeper: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Give workers time to reconnect after a restart, and start to sweep."""
        await self._store.run(leases.restart, RESTART_GRACE_MS, 2 * self._lease_ms)
        self._sweeper = asyncio.create_task(self._sweep(), name="sweeper")

    async def stop(self) -> None:
        """End the streams (their workers keep their tasks) and stop sweeping."""
        self._stopping.set()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    async def beats(self, requests: AsyncIterable[pb.WorkerBeat]) -> AsyncGenerator[pb.WorkerBeatAck, None]:
        """Answer one worker's beats until its stream breaks or the server stops."""
        worker_id = ""
        token = object()
        unnamed: frozenset[str] = frozenset()
        incoming = aiter(requests)
        try:
            while True:
                beat = await self._next_beat(incoming)
                if beat is None:
                    return
                if not worker_id:
                    worker_id = check_id(beat.worker_id, "worker_id")
                    self._streams[worker_id] = token
                    self._polls.worker_connected(worker_id)
                if beat.draining:
                    self._polls.drain(worker_id)
                unnamed_before = unnamed
                unnamed = await self._store.run(leases.renew, worker_id, tuple(beat.task_ids), self._lease_ms)
                # A worker may send one beat before a task has arrived. It sends the next beat after the acknowledgement
                # of that beat, which was sent after the task. So two beats without the task show that it was lost.
                if never_arrived := unnamed & unnamed_before:
                    await self.carry_out(self._store.run(leases.lose, worker_id, never_arrived))
                yield pb.WorkerBeatAck(lease_ms=self._lease_ms)
        finally:
            # If the worker has reconnected on a new stream, it keeps its tasks.
            if worker_id and self._streams.get(worker_id) is token:
                del self._streams[worker_id]
                self._polls.worker_disconnected(worker_id)
                if not self._stopping.is_set():
                    self._disconnected(worker_id)

    async def _next_beat(self, incoming: AsyncIterator[pb.WorkerBeat]) -> pb.WorkerBeat | None:
        """Return the next beat; None when the stream is over or the server stops."""

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
        # Submit this at once: after a beat on the worker's next stream it would shorten the leases of a live worker.
        stored = asyncio.ensure_future(self._store.run(leases.disconnect, worker_id, RECONNECT_GRACE_MS))
        stored.add_done_callback(self._count_grace)

    def _count_grace(self, stored: asyncio.Future[None]) -> None:
        # If this could not be stored, the worker's leases are unchanged and run out later.
        if not stored.cancelled() and stored.exception() is None:
            self.due_at(self._clock.now_ms() + RECONNECT_GRACE_MS)

    # ---- Sweeping ----------------------------------------------------------------------------------------------------

    async def carry_out(self, submitted: Awaitable[Changed]) -> None:
        """Apply a transition once it is stored, even if the caller is cancelled before."""
        stored = asyncio.ensure_future(submitted)
        stored.add_done_callback(self._apply_stored)
        await asyncio.shield(stored)

    def _apply_stored(self, stored: asyncio.Future[Changed]) -> None:
        if not stored.cancelled() and stored.exception() is None:
            self.apply(stored.result())

    def apply(self, changed: Changed) -> None:
        """Wake the polls, waiters and the sweep that a stored transition concerns."""
        for ready in changed.ready:
            self._polls.task_ready(ready)
        for execution in changed.ended:
            self._waiters.execution_ended(execution)
        if changed.retry_ms is not None:
            self.due_at(changed.retry_ms)

    def due_at(self, due_ms: int) -> None:
        """Make the sweep run at `due_ms` at the latest, for a lease or a retry."""
        if self._due_ms is None or due_ms < self._due_ms:
            self._due_ms = due_ms
            self._due_changed.set()

    def task_handed_out(self) -> None:
        """Make the sweep run when a lease that begins now runs out."""
        self.due_at(self._clock.now_ms() + self._lease_ms)

    async def _sweep(self) -> None:
        while True:
            self._due_changed.clear()
            self._due_ms = None
            now_ms = self._clock.now_ms()
            try:
                swept = await self._store.run(leases.sweep, self._swept_until_ms)
            except Exception as error:
                fault = None if isinstance(error, StoreUnavailable) else error
                logger.warning("could not sweep the leases; retrying in 1 s", exc_info=fault)
                self.due_at(self._clock.now_ms() + SWEEP_RETRY_MS)
            else:
                self._swept_until_ms = now_ms
                self.apply(swept.changed)
                if swept.next_ms is not None:
                    self.due_at(swept.next_ms)
            self._due_changed.clear()
            await self._until_due()

    async def _until_due(self) -> None:
        while self._due_ms is None or self._due_ms > self._clock.now_ms():
            timeout = None if self._due_ms is None else (self._due_ms - self._clock.now_ms()) / 1000
            try:
                await asyncio.wait_for(self._due_changed.wait(), timeout)
                self._due_changed.clear()
            except (asyncio.TimeoutError, TimeoutError):
                continue
