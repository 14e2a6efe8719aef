"""The polls of workers that wait for tasks.

All of it is memory: after a restart the waiting calls come again, and the store knows the rest.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable
from functools import partial

from nexum_engine.clock import Clock
from nexum_engine.errors import NexumError
from nexum_engine.records import Task
from nexum_engine.store import Store, tasks
from nexum_engine.store.results import Claim, ReadyTask

POLL_COUNTS_FOR_MS = 2000
"""How long after a poll its worker still counts as polling."""
MAX_REMEMBERED_VERSIONS = 1000
"""Of how many versions it is remembered what was due and who polled: any client can name new ones."""
MAX_REMEMBERED_SLOTS = 10_000

Slot = tuple[str, str]
"""A worker's id and its own name for one of its slots."""


class _HandedOut:
    """The task that each slot was handed last, until it is reported.

    A slot that asks while its last task is not reported never had that answer. Evicting an entry means that a lost
    answer waits for its lease.
    """

    def __init__(self) -> None:
        self._task: dict[Slot, str] = {}
        self._slot: dict[str, Slot] = {}
        self._asked_again: set[str] = set()

    def put(self, slot: Slot, task_id: str) -> None:
        """The slot was handed a task."""
        self.take_away(self._task.get(slot, ""))
        self._task[slot], self._slot[task_id] = task_id, slot
        if len(self._task) > MAX_REMEMBERED_SLOTS:
            self.take_away(next(iter(self._slot)))

    def take_away(self, task_id: str) -> None:
        """The task was reported, or is the slot's no more."""
        slot = self._slot.pop(task_id, None)
        if slot is not None:
            del self._task[slot]
            self._asked_again.discard(task_id)

    def unanswered(self, slot: Slot) -> str:
        """The slot's last task, if it is not reported; else empty."""
        return self._task.get(slot, "")

    def ask_again(self, task_id: str) -> None:
        """The slot asks for its last task: from now on no earlier call of the slot may give it back."""
        self._asked_again.add(task_id)

    def is_asked_again(self, task_id: str) -> bool:
        return task_id in self._asked_again


class _WaitingPoll:
    """A worker's slot. Either idle, or it has a claim under way whose outcome its own coroutine awaits."""

    def __init__(self, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int, slot: str) -> None:
        self.worker_id = worker_id
        self.slot = (worker_id, slot) if slot else None
        self.version_hashes = version_hashes
        self.max_bytes = max_bytes
        self.claim: asyncio.Future[Claim] | None = None
        self.idle: asyncio.Future[None] | None = None
        self.asked_at = 0
        """The newest arrival when the claim was submitted: it may not have seen later ones."""
        self.leaving = False

    def wake(self) -> None:
        if self.idle is not None and not self.idle.done():
            self.idle.set_result(None)


class Polls:
    """Hands due tasks to waiting polls."""

    def __init__(self, store: Store, clock: Clock, lease_ms: int) -> None:
        self._store = store
        self._clock = clock
        self._lease_ms = lease_ms
        self._polls: dict[str, list[_WaitingPoll]] = defaultdict(list)
        self._last_poll_ms: dict[str, int] = {}
        self._arrivals = 0
        self._last_arrival: dict[str, int] = {}
        """The number of the newest task that became due, by version, the latest last."""
        self._forgotten_arrival = 0
        """Upper bound for versions evicted from `_last_arrival`."""
        self._due: dict[str, int] = {}
        """Upper bound of due tasks per version; no entry means unknown."""
        self._handed_out = _HandedOut()
        self._poll_of: dict[Slot, _WaitingPoll] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._streamed_workers: set[str] = set()
        self._draining_workers: set[str] = set()

    async def next_task(
        self, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int, wait_ms: int, slot: str = ""
    ) -> Task | None:
        """A task for the worker, at once or as soon as one is due; None when the time is up or the server stops.

        A slot, if it is named, takes one task at a time: one that it did not report is handed to it again.
        """
        if worker_id in self._draining_workers:
            return None
        poll = _WaitingPoll(worker_id, version_hashes, max_bytes, slot)
        if poll.slot is not None:
            if (earlier := self._poll_of.get(poll.slot)) is not None:
                # Nobody waits for its answer any more.
                earlier.leaving = True
                earlier.wake()
            self._poll_of[poll.slot] = poll
        deadline = self._clock.now_ms() + wait_ms
        for version_hash in version_hashes:
            self._polls[version_hash].append(poll)
            self._remember_poll(version_hash)
        try:
            if self._is_unanswered(poll) or self._may_be_due(version_hashes):
                self._submit_claim(poll)
            while True:
                if poll.claim is not None:
                    claim = await asyncio.shield(poll.claim)
                    poll.claim = None
                    if claim.task is not None:
                        return claim.task
                    if claim.oversized is not None:
                        self._offer(claim.oversized)
                    if self._arrived_since(poll.asked_at, version_hashes):
                        self._submit_claim(poll)
                        continue
                left_ms = deadline - self._clock.now_ms()
                if left_ms <= 0 or self._stopping or poll.leaving:
                    return None
                await self._idle(poll, left_ms)
        finally:
            if poll.slot is not None and self._poll_of.get(poll.slot) is poll:
                del self._poll_of[poll.slot]
            for version_hash in version_hashes:
                self._forget(poll, version_hash)
            if poll.claim is not None:
                # The call was given up while its claim was under way: nobody is there to take the task.
                self.release(poll.claim)

    def take_due(
        self, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int, slot: str = ""
    ) -> asyncio.Future[Claim] | None:
        """Submit a claim here and now, behind what was submitted before; None if nothing can be due."""
        if self._stopping or worker_id in self._draining_workers:
            return None
        poll = _WaitingPoll(worker_id, version_hashes, max_bytes, slot)
        if not self._is_unanswered(poll) and not self._may_be_due(version_hashes):
            return None
        for version_hash in version_hashes:
            self._remember_poll(version_hash)
        self._submit_claim(poll)
        return poll.claim

    def reported(self, task_id: str) -> None:
        """The task was reported, so its worker received it."""
        self._handed_out.take_away(task_id)

    def _is_unanswered(self, poll: _WaitingPoll) -> bool:
        return poll.slot is not None and self._handed_out.unanswered(poll.slot) != ""

    def _may_be_due(self, version_hashes: tuple[str, ...]) -> bool:
        return any(self._due.get(version_hash) != 0 for version_hash in version_hashes)

    def _forget(self, poll: _WaitingPoll, version_hash: str) -> None:
        polls = self._polls[version_hash]
        polls.remove(poll)
        if not polls:
            del self._polls[version_hash]
        self._remember_poll(version_hash)

    def _remember_poll(self, version_hash: str) -> None:
        now_ms = self._clock.now_ms()
        self._last_poll_ms[version_hash] = now_ms
        if len(self._last_poll_ms) > MAX_REMEMBERED_VERSIONS:
            recent = {v: ms for v, ms in self._last_poll_ms.items() if now_ms - ms <= POLL_COUNTS_FOR_MS}
            self._last_poll_ms = recent
            # A version that isn't here is looked up, so forgetting costs one claim.
            self._due = {v: due for v, due in self._due.items() if v in recent}

    async def _idle(self, poll: _WaitingPoll, left_ms: int) -> None:
        loop = asyncio.get_running_loop()
        poll.idle = loop.create_future()
        timer = loop.call_later(left_ms / 1000, poll.wake)
        try:
            await poll.idle
        finally:
            timer.cancel()
            poll.idle = None

    def _submit_claim(self, poll: _WaitingPoll) -> None:
        poll.asked_at = self._arrivals
        lease_ms, streamed = self.lease_of(poll.worker_id)
        unanswered = "" if poll.slot is None else self._handed_out.unanswered(poll.slot)
        if unanswered:
            self._handed_out.ask_again(unanswered)
        poll.claim = asyncio.ensure_future(
            self._store.run(
                tasks.claim, poll.worker_id, poll.version_hashes, poll.max_bytes, lease_ms, streamed, unanswered
            )
        )
        poll.claim.add_done_callback(partial(self._learn, poll, poll.asked_at, unanswered))

    def lease_of(self, worker_id: str) -> tuple[int, bool]:
        """How long what the worker takes is its own, in ms, and whether it keeps a stream."""
        streamed = worker_id in self._streamed_workers
        return self._lease_ms if streamed else 2 * self._lease_ms, streamed

    def _arrived_since(self, asked_at: int, version_hashes: tuple[str, ...]) -> bool:
        # A forgotten version may have had the newest of those that were forgotten: that costs one claim.
        return any(self._last_arrival.get(version, self._forgotten_arrival) > asked_at for version in version_hashes)

    def _learn(self, poll: _WaitingPoll, asked_at: int, unanswered: str, done: asyncio.Future[Claim]) -> None:
        """Learn from a claim. Callbacks run in the order of the claims' transactions, so the count is never too low."""
        if done.cancelled() or done.exception() is not None:
            return
        claim = done.result()
        if claim.again:
            # What this poll was woken for, if it was, is another's.
            for version_hash in poll.version_hashes:
                self._offer(ReadyTask(version_hash, 0))
            return
        # What the slot was handed before is over.
        self._handed_out.take_away(unanswered)
        if claim.task is not None:
            if claim.task.version_hash in self._due:
                self._due[claim.task.version_hash] -= 1
            if poll.slot is not None:
                self._handed_out.put(poll.slot, claim.task.task_id)
        elif claim.oversized is None and not self._arrived_since(asked_at, poll.version_hashes):
            self._due.update(dict.fromkeys(poll.version_hashes, 0))

    def task_ready(self, task: ReadyTask) -> None:
        """A task became due, or will have when what was submitted before this call is stored.

        The claim is submitted here and now, behind the transition that makes the task, so that both share a
        transaction and the worker has the task as soon as its maker has the acknowledgement.
        """
        self._arrivals += 1
        self._last_arrival.pop(task.version_hash, None)
        self._last_arrival[task.version_hash] = self._arrivals
        if len(self._last_arrival) > MAX_REMEMBERED_VERSIONS:
            self._forgotten_arrival = self._last_arrival.pop(next(iter(self._last_arrival)))
        if task.version_hash in self._due:
            self._due[task.version_hash] += 1
        self._offer(task)

    def _offer(self, task: ReadyTask) -> None:
        for poll in self._polls.get(task.version_hash, ()):
            if poll.max_bytes < task.task_bytes or poll.leaving:
                continue
            if poll.idle is not None and not poll.idle.done():
                self._submit_claim(poll)
                poll.wake()
                return

    def has_poller(self, version_hash: str) -> bool:
        """Whether a worker polls for the version, or did within the last two seconds."""
        last = self._last_poll_ms.get(version_hash)
        return bool(self._polls.get(version_hash)) or (
            last is not None and self._clock.now_ms() - last <= POLL_COUNTS_FOR_MS
        )

    def worker_connected(self, worker_id: str) -> None:
        """The worker keeps a WorkerStream: what it takes has the shorter lease, which its beats renew."""
        self._streamed_workers.add(worker_id)
        # One that still drains says so at once.
        self._draining_workers.discard(worker_id)

    def worker_disconnected(self, worker_id: str) -> None:
        """Its stream ended."""
        self._streamed_workers.discard(worker_id)
        self._draining_workers.discard(worker_id)

    def drain(self, worker_id: str) -> None:
        """The worker takes no more tasks until its stream ends: answer the polls that it has waiting."""
        self._draining_workers.add(worker_id)
        for polls in self._polls.values():
            for poll in polls:
                if poll.worker_id == worker_id:
                    poll.leaving = True
                    poll.wake()

    def give_back(self, task: Task) -> None:
        """The call that took the task is gone before its answer was sent."""
        done: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        done.set_result(Claim(task))
        self.release(done)

    def release(self, claim: Awaitable[Claim]) -> None:
        """Nobody is there any more to take the task of a claim."""

        async def release() -> None:
            try:
                task = (await claim).task
            except Exception:  # noqa: BLE001 - the call that submitted it was told
                return
            try:
                # If its slot asks again, it is that call's.
                if task is None or self._handed_out.is_asked_again(task.task_id):
                    return
                self._handed_out.take_away(task.task_id)
                changed = await self._store.run(
                    tasks.release, task.task_id, "the worker was gone before the task reached it"
                )
            except NexumError:
                return  # if it was handed out all the same, its lease runs out
            for ready in changed.ready:
                self.task_ready(ready)

        running = asyncio.ensure_future(release())
        self._releases.add(running)
        running.add_done_callback(self._releases.discard)

    def look_again(self) -> None:
        """Make every waiting poll ask the store again, since nobody knows what was stored."""
        self._due.clear()
        for polls in self._polls.values():
            for poll in polls:
                if poll.claim is None:
                    self._submit_claim(poll)
                poll.wake()

    async def stop(self) -> None:
        """Answer every waiting poll."""
        self._stopping = True
        for polls in self._polls.values():
            for poll in polls:
                poll.wake()
        while self._releases:
            await asyncio.gather(*self._releases, return_exceptions=True)
