"""The polls of workers that wait for tasks.

Polls are kept only in memory. After a restart of the server, the workers poll again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from nexum_engine.clock import Clock, wait_until_set
from nexum_engine.errors import NexumError
from nexum_engine.records import Task
from nexum_engine.store import Store, tasks
from nexum_engine.store.results import Claim, ReadyTask, StoredStart
from nexum_engine.store.submitted import Submitted

POLL_COUNTS_FOR_MS = 2000
"""How long a version counts as polled after its last poll has ended."""
HELD_MS = 500
"""The pause before an owner retries its start, if its node waits for the end of another attempt, at an unknown time."""
MAX_REMEMBERED_VERSIONS = 1000
"""Above this number of versions, the server forgets the versions without a recent poll.

There is a limit, because clients can invent versions.
"""
T = TypeVar("T")


class _WaitingPoll:
    """A worker's poll, which waits for a due task or for the result of its claim.

    A claim is a submitted transaction that takes a due task, if there still is one.
    """

    def __init__(
        self, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int, announced: Mapping[str, int]
    ) -> None:
        self.worker_id = worker_id
        self.version_hashes = version_hashes
        self.max_bytes = max_bytes
        self.claim: Submitted[Claim] | None = None
        self.idle: asyncio.Future[None] | None = None
        self.leaving = False
        self._announced = announced
        """How many tasks of each version have become due while the version had polls."""
        self.heard: list[int] | None = self._announced_now()
        """The numbers in `announced` when the poll's claim was submitted, or when the poll was last idle. None if the
        poll has ended."""

    def _announced_now(self) -> list[int]:
        return [self._announced.get(version_hash, 0) for version_hash in self.version_hashes]

    def hear(self) -> None:
        self.heard = self._announced_now()

    @property
    def has_missed(self) -> bool:
        """Whether a task became due after the claim was submitted. The claim may have missed that task."""
        return self.heard != self._announced_now()

    @property
    def is_idle(self) -> bool:
        return self.idle is not None and not self.idle.done()

    def wake(self) -> None:
        if self.idle is not None and not self.idle.done():
            self.idle.set_result(None)
            self.hear()


def _discard(waiting: dict[str, dict[T, None]], name: str, one: T) -> None:
    del waiting[name][one]
    if not waiting[name]:
        del waiting[name]


class Polls:
    """The dispatcher of due tasks to waiting polls."""

    def __init__(self, store: Store, clock: Clock, lease_ms: int) -> None:
        self._store = store
        self._clock = clock
        self._lease_ms = lease_ms
        self._polls: dict[str, dict[_WaitingPoll, None]] = defaultdict(dict)
        """The polls of each version, oldest first: those that wait for a task, and those whose claim is under way."""
        self._announced: dict[str, int] = {}
        """By version: how many tasks have become due while the version had polls.

        With this number, a poll finds out that it has missed a task. To mark each poll at each task would take
        milliseconds if thousands of polls wait.
        """
        self._polls_of_worker: dict[str, dict[_WaitingPoll, None]] = defaultdict(dict)
        self._last_poll_ms: dict[str, int] = {}
        self._largest_task: dict[str, int] = {}
        """By version: the size of the largest task that a worker can receive, as this server has stored it."""
        self._forget_above = MAX_REMEMBERED_VERSIONS
        self._due: dict[str, int] = {}
        """By version: an upper bound of the number of due tasks. If a version is missing here, its number is unknown.

        If the number is 0, no claim is submitted, because the claim would find nothing.
        """
        self._openings: dict[str, tuple[int, asyncio.TimerHandle]] = {}
        """By version: when a rate lets a held-back task pass, and the timer that then offers the task."""
        self._owners: dict[str, dict[asyncio.Event, None]] = defaultdict(dict)
        """By version: the owners that wait until the limits let their node pass, the longest waiting first."""
        self._releases: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._last_beat_ms: dict[str, int] = {}
        """The time of the last heartbeat of each worker that has a worker stream."""
        self._draining_workers: set[str] = set()

    async def next_task(
        self, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int, wait_ms: int
    ) -> Task | None:
        """Return a task for the worker as soon as one is due.

        Returns None if `wait_ms` have passed, or if the worker or the server is stopping.
        """
        if worker_id in self._draining_workers:
            return None
        poll = _WaitingPoll(worker_id, version_hashes, max_bytes, self._announced)
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_ms / 1000
        self._add(poll)
        try:
            if self._may_be_due(version_hashes) and not self._is_silent(worker_id):
                self._submit_claim(poll)
            while True:
                if poll.claim is not None:
                    claim = await poll.claim
                    poll.claim = None
                    if claim.task is not None:
                        return claim.task
                    if claim.oversized is not None:
                        self._offer(claim.oversized)
                if poll.has_missed and not poll.leaving and not self._is_silent(worker_id):
                    self._submit_claim(poll)
                    continue
                left = end - loop.time()
                if left <= 0 or self._stopping or poll.leaving:
                    return None
                await self._idle(poll, left)
        finally:
            self._remove(poll)
            if poll.claim is not None:
                # The poll no longer hears of tasks that become due. So its claim must not set the number of due tasks
                # to 0: see `_count`.
                poll.heard = None
                # Release the task that the claim may have taken: the worker's call was cancelled during the claim.
                self._begin_release(self._release_claimed(poll.claim))

    def _may_be_due(self, version_hashes: tuple[str, ...]) -> bool:
        return any(self._due.get(version_hash) != 0 for version_hash in version_hashes)

    def _add(self, poll: _WaitingPoll) -> None:
        self._polls_of_worker[poll.worker_id][poll] = None
        for version_hash in poll.version_hashes:
            self._polls[version_hash][poll] = None
            if poll.max_bytes > self._largest_task.get(version_hash, 0):
                noting = self._store.run(tasks.note_largest_task, version_hash, poll.max_bytes)
                noting.when_stored(partial(self._largest_noted, version_hash, poll.max_bytes))
            self._remember_poll(version_hash)

    def _largest_noted(self, version_hash: str, max_bytes: int, is_registered: bool) -> None:
        if is_registered:  # else the next poll must note it
            self._largest_task[version_hash] = max(max_bytes, self._largest_task.get(version_hash, 0))

    def _remove(self, poll: _WaitingPoll) -> None:
        _discard(self._polls_of_worker, poll.worker_id, poll)
        for version_hash in poll.version_hashes:
            _discard(self._polls, version_hash, poll)
            if version_hash not in self._polls:
                self._announced.pop(version_hash, None)
            self._remember_poll(version_hash)

    def _remember_poll(self, version_hash: str) -> None:
        now_ms = self._clock.now_ms()
        self._last_poll_ms[version_hash] = now_ms
        if len(self._last_poll_ms) > self._forget_above:
            self._last_poll_ms = {v: ms for v, ms in self._last_poll_ms.items() if now_ms - ms <= POLL_COUNTS_FOR_MS}
            # Also forget the numbers of due tasks of the forgotten versions: the next poll for such a version then
            # submits a claim.
            self._due = {v: due for v, due in self._due.items() if v in self._last_poll_ms}
            self._largest_task = {v: size for v, size in self._largest_task.items() if v in self._last_poll_ms}
            # Scan the versions again only when their number has doubled: the time of a scan grows with their number.
            self._forget_above = max(MAX_REMEMBERED_VERSIONS, 2 * len(self._last_poll_ms))

    async def _idle(self, poll: _WaitingPoll, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        poll.idle = loop.create_future()
        timer = loop.call_later(seconds, poll.wake)
        try:
            await poll.idle
        finally:
            timer.cancel()
            poll.idle = None

    def _submit_claim(self, poll: _WaitingPoll) -> None:
        poll.hear()
        lease_ms, streamed = self.lease_of(poll.worker_id)
        poll.claim = self._store.run(
            tasks.claim, poll.worker_id, poll.version_hashes, poll.max_bytes, lease_ms, streamed
        )
        poll.claim.when_stored(partial(self._count, poll))

    def _count(self, poll: _WaitingPoll, claim: Claim) -> None:
        """Update the number of due tasks after a claim.

        Claims are counted in the order of their transactions. Otherwise a claim that found no task could set the number
        to 0 before an earlier claim subtracts its task, and the number would become too low.
        """
        for version_hash, opens_ms in claim.opening:
            self._offer_at(version_hash, opens_ms)
        if claim.task is not None:
            if claim.task.version_hash in self._due:
                self._due[claim.task.version_hash] -= 1
        elif claim.oversized is None and not poll.has_missed:
            self._due.update(dict.fromkeys(poll.version_hashes, 0))

    def lease_of(self, worker_id: str) -> tuple[int, bool]:
        """Return the length of the worker's leases in ms, and whether the worker has a stream."""
        streamed = worker_id in self._last_beat_ms
        return self._lease_ms if streamed else 2 * self._lease_ms, streamed

    def task_ready(self, task: ReadyTask) -> None:
        """Offer a task to a waiting poll. The task is due now, or when the transitions submitted so far are stored.

        The poll's claim is submitted at once. If the transition that makes the task was submitted just before, the
        claim and that transition share a transaction. The worker then gets the task at the same time as the
        transition's caller gets an answer.
        """
        if task.version_hash in self._due:
            self._due[task.version_hash] += 1
        if task.version_hash in self._polls:
            self._announced[task.version_hash] = self._announced.get(task.version_hash, 0) + 1
        for owner in self._owners.get(task.version_hash, ()):
            owner.set()
        self._offer(task)

    def _offer_at(self, version_hash: str, opens_ms: int) -> None:
        """Offer a task of the version at `opens_ms`, when a rate lets a task pass."""
        if version_hash in self._openings:
            known_ms, timer = self._openings[version_hash]
            if known_ms <= opens_ms:
                return  # a timer for an earlier time is set: after it, the claim says when the next task may pass
            timer.cancel()
        delay_ms = max(0, opens_ms - self._clock.now_ms())
        timer = asyncio.get_running_loop().call_later(delay_ms / 1000, self._open, version_hash)
        self._openings[version_hash] = opens_ms, timer

    def _open(self, version_hash: str) -> None:
        del self._openings[version_hash]
        self.task_ready(ReadyTask(version_hash))

    async def under_limits(
        self, version_hash: str, start: Callable[[], Awaitable[StoredStart]], wait: float
    ) -> tuple[StoredStart, int]:
        """Start the execution of an owner. If limits hold the node back, start again when they may let the node pass.

        After `wait` seconds at the latest, return the result of the last start, and after how many milliseconds the
        owner should retry: 0 if no limit holds the node back.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        woken = asyncio.Event()
        self._owners[version_hash][woken] = None
        try:
            while True:
                woken.clear()
                started = await start()
                if started.held is None:
                    return started, 0
                if started.held_version != version_hash:
                    # The tasks of this version are announced. Start again: the slot may have become free meanwhile.
                    return await self.under_limits(started.held_version, start, end - loop.time())
                left, opens_ms = end - loop.time(), started.held.opens_ms
                left_ms = HELD_MS if opens_ms is None else max(1, opens_ms - self._clock.now_ms())
                if left <= 0 or self._stopping:
                    return started, left_ms
                await wait_until_set(woken, left if opens_ms is None else min(left, left_ms / 1000))
        finally:
            _discard(self._owners, version_hash, woken)

    def _offer(self, task: ReadyTask) -> None:
        for poll in self._polls.get(task.version_hash, ()):
            may_take = poll.is_idle and not poll.leaving and not self._is_silent(poll.worker_id)
            if may_take and poll.max_bytes >= task.task_bytes:
                self._submit_claim(poll)
                poll.wake()
                return

    def waited_for(self) -> list[str]:
        """Return the versions that have waiting polls."""
        return list(self._polls)

    def has_poller(self, version_hash: str) -> bool:
        """Return whether a worker polls for the version, or polled within the last two seconds."""
        last = self._last_poll_ms.get(version_hash)
        return bool(self._polls.get(version_hash)) or (
            last is not None and self._clock.now_ms() - last <= POLL_COUNTS_FOR_MS
        )

    def worker_connected(self, worker_id: str) -> None:
        """Note that the worker has a worker stream. Its next tasks get the shorter lease, which heartbeats renew."""
        self._last_beat_ms[worker_id] = self._clock.now_ms()
        # Forget that the worker was stopping. A worker that is still stopping says so in its first heartbeat.
        self._draining_workers.discard(worker_id)
        # Answer the worker's earlier polls without a task: their connection may be dead.
        self._answer_waiting(worker_id)

    def worker_beats(self, worker_id: str, came_ms: int) -> None:
        """Note a heartbeat that came at `came_ms`. If the worker was silent before, its polls now claim tasks again.

        The caller must first renew the leases of the tasks that the heartbeat names.
        """
        was_silent = self._is_silent(worker_id)
        self._last_beat_ms[worker_id] = came_ms
        if was_silent:
            self._claim_again(self._polls_of_worker.get(worker_id, ()))

    def _is_silent(self, worker_id: str) -> bool:
        """Return whether the worker's leases have run out although its stream is open.

        A silent worker gets no task: its process is probably suspended, and may later continue the very task that the
        worker has lost.
        """
        last_ms = self._last_beat_ms.get(worker_id)
        return last_ms is not None and self._clock.now_ms() - last_ms >= self._lease_ms

    def worker_disconnected(self, worker_id: str) -> None:
        """Note that the worker's stream ended. Answer its polls without a task: it polls again after a reconnection."""
        self._last_beat_ms.pop(worker_id, None)
        self._draining_workers.discard(worker_id)
        self._answer_waiting(worker_id)

    def drain(self, worker_id: str) -> None:
        """Give the worker no more tasks until its stream ends, and answer its waiting polls without a task."""
        self._draining_workers.add(worker_id)
        self._answer_waiting(worker_id)

    def _answer_waiting(self, worker_id: str) -> None:
        for poll in self._polls_of_worker.get(worker_id, ()):
            poll.leaving = True
            poll.wake()

    def release(self, task: Task) -> None:
        """Release a task that was not sent, because the worker's call was cancelled."""
        self._begin_release(self._release(task))

    def _begin_release(self, release: Coroutine[Any, Any, None]) -> None:
        releasing = asyncio.create_task(release)
        self._releases.add(releasing)
        releasing.add_done_callback(self._releases.discard)

    async def _release_claimed(self, claim: Submitted[Claim]) -> None:
        try:
            task = (await claim).task
        except Exception:  # noqa: BLE001 - the claim took no task, or the task's lease will run out
            return
        if task is not None:
            await self._release(task)

    async def _release(self, task: Task) -> None:
        try:
            changed = await self._store.run(
                tasks.release, task.task_id, "the worker's poll was cancelled before the task reached the worker"
            )
        except NexumError:
            return  # if the task is still handed out, its lease will run out
        for ready in changed.ready:
            self.task_ready(ready)

    def look_again(self) -> None:
        """Make every waiting poll claim again. Call this when it is unknown whether a transaction was stored."""
        self._due.clear()
        self._wake_owners()
        self._claim_again(self._all())

    def _wake_owners(self) -> None:
        for owners in self._owners.values():
            for owner in owners:
                owner.set()

    def _all(self) -> list[_WaitingPoll]:
        return [poll for polls in self._polls_of_worker.values() for poll in polls]

    def _claim_again(self, polls: Iterable[_WaitingPoll]) -> None:
        for poll in polls:
            if poll.claim is None:
                self._submit_claim(poll)
            poll.wake()

    async def stop(self) -> None:
        """Tell every waiting poll that there is no task. Wait until tasks that reached no worker are READY again."""
        self._stopping = True
        for _, timer in self._openings.values():
            timer.cancel()
        self._wake_owners()
        for poll in self._all():
            poll.wake()
        while self._releases:
            await asyncio.wait(self._releases)  # with gather, an ended task might never leave the set
