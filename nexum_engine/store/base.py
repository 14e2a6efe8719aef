"""The store: a queue of transitions, which are taken, run and committed together.

A transition is a function that reads or changes the database through a `Db`, for example `tasks.complete_task`.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from nexum_engine.errors import StoreUnavailable
from nexum_engine.store.db import BRIEF, SNAPSHOTS, Db
from nexum_engine.store.results import News
from nexum_engine.store.submitted import Submitted

P = ParamSpec("P")
T = TypeVar("T")
Transition = Callable[[Db], Any]

MAX_BATCH = 256  # transitions in one transaction
MAX_BRIEF_CHARACTERS = 100_000
"""The longest text that a brief transition may get. To check and store a longer one takes milliseconds."""
LOG_INTERVAL = 10.0  # seconds between two log lines about the same error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Space:
    """The space of a database on the disk."""

    total_bytes: int
    free_bytes: int
    """The part of `total_bytes` that is not in use. New executions are stored in it."""
    released_bytes: int = 0
    """The bytes that `compact` has just released to the disk."""


@dataclass(frozen=True)
class Checked:
    """The result of `check_database`."""

    executions: int
    findings: tuple[str, ...]


class Kind(Enum):
    """Which transitions may share a transaction."""

    TOGETHER = "with others of this kind"
    SNAPSHOT = "with others that read one snapshot"
    ALONE = "with no other"


@dataclass
class Submission:
    """A transition that waits for its transaction."""

    transition: Transition
    submitted: Submitted[Any]
    kind: Kind
    is_brief: bool = False
    is_reading: bool = False


class CommitFailed(Exception):
    """A whole transaction has failed, with all its transitions."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.cause = cause


class Store(ABC):
    """A database on which transitions run one after the other.

    Transitions share a transaction if they were submitted in one turn of the event loop, or while the previous
    transaction was being written. If one transition fails, the others are still committed.

    A dialect supplies the abstract methods.
    """

    on_unknown: Sequence[Callable[[], None]] = ()
    """Callbacks that make waiting calls query the store. They run if nobody knows whether a transaction was stored."""
    _reads_snapshots = False
    """Whether the transitions in SNAPSHOTS need a snapshot.

    They need one if another server can change the database between two statements of a transaction.
    """

    def __init__(self, opened_as: str, database_id: str, file: Path | None) -> None:
        self.opened_as = opened_as
        """The database's name in messages for people: an absolute path, or a URL without its password."""
        self.database_id = database_id
        """A random value that tells the database from others. A copy, such as a restored backup, has the same value."""
        self.file = file
        """The database's file on this machine, or None if the database is not a file (PostgreSQL)."""
        self.submitted = 0
        """How many transitions were submitted so far."""
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[str] = self._loop.create_future()
        """Resolves with the reason when the database can't be trusted any more. Then stop the server."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="nexum-store")
        self._waiting: list[Submission] = []
        self._idle = asyncio.Event()
        """Set while no transition waits or runs."""
        self._idle.set()
        self._recovering: asyncio.Task[None] | None = None
        self._closed = False
        self._logged, self._logged_at = "", 0.0

    def join(self, on_news: Callable[[News], None]) -> None:  # noqa: B027 - most databases have one server
        """Begin to tell the other servers on this database that this server is alive, and to hear what they change.

        `on_news` is called on the event loop soon after each transaction of another server. It is also called from time
        to time, because the news of a transaction may be lost.
        """

    def run(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Submitted[T]:
        """Submit a transition. The transition runs in one transaction, after the transitions submitted before it.

        When the transaction is durable, awaiting the return value returns the transition's result. It raises the
        transition's error, or StoreUnavailable if it is unknown whether the transaction was stored.
        """
        is_reading = transition in SNAPSHOTS
        kind = Kind.SNAPSHOT if is_reading and self._reads_snapshots else Kind.TOGETHER
        texts = (one for one in (*args, *kwargs.values()) if isinstance(one, str))
        is_brief = transition in BRIEF and all(len(text) <= MAX_BRIEF_CHARACTERS for text in texts)
        return self._submit(lambda db: transition(db, *args, **kwargs), kind, is_brief=is_brief, is_reading=is_reading)

    def run_alone(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Submitted[T]:
        """Submit a transition as `run` does, in a transaction of its own, without checks of references between rows.

        Use this for deletions: to check that no row refers to a deleted row, SQLite would read whole tables.
        """
        return self._submit(lambda db: transition(db, *args, **kwargs), Kind.ALONE)

    async def catch_up(self) -> None:
        """Wait until all transitions that were submitted before this call have run."""
        with suppress(StoreUnavailable):
            await self.run(lambda _: None)

    @abstractmethod
    async def compact(self, *, max_bytes: int | None, always: bool) -> Space:
        """Release the database's free space to the disk, but not if more than `max_bytes` are in use.

        Without `always`, at least a quarter of the database must be free. A compaction takes about a second for each
        100 MB in use, and no transition runs meanwhile. Return the database's space at the end.
        """

    @abstractmethod
    async def backup(self, file: Path, *, overwrite: bool, progress: Callable[[int, int], None]) -> int:
        """Write a copy of the database to `file`. Return the copy's size in bytes.

        Transitions run meanwhile, and the copy has the database's state at the end of the copying. The copy gets the
        name `file` only when it is complete. `progress(copied, total)` is called, in another thread, with the bytes
        copied so far. Raises InvalidRequest if the file can't be written, and Conflict if the file exists and
        `overwrite` is false, or if another backup is being made.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish the submitted transitions and release the database."""

    def _check_open(self) -> None:
        """Raise StoreUnavailable while the server stops."""
        if self._closed or self.failed.done():
            raise _stopping()

    # ---- The queue ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def _run_batch(self, transitions: list[Transition], kind: Kind) -> list[Any]:
        """Run transitions of one kind. Return a list with each transition's result or exception.

        Raises CommitFailed if it is unknown whether the transitions are stored.
        """

    @abstractmethod
    async def _recover(self, error: CommitFailed) -> None:
        """Connect to the database again after a failed transaction, or mark the store as failed."""

    def _submit(
        self, transition: Callable[[Db], T], kind: Kind, *, is_brief: bool = False, is_reading: bool = False
    ) -> Submitted[T]:
        submitted: Submitted[T] = Submitted(self._loop)
        if self._closed or self.failed.done():
            submitted.settle(_stopping())
            return submitted
        self._waiting.append(Submission(transition, submitted, kind, is_brief, is_reading))
        self.submitted += 1
        if self._idle.is_set():
            self._idle.clear()
            # In the next turn of the loop: the transitions that are submitted in this turn share the transaction.
            self._loop.call_soon(self._write_waiting)
        return submitted

    def _write_waiting(self) -> None:
        """Write the next batch, if any transition waits. Drop the readings whose callers were cancelled."""
        self._waiting = [one for one in self._waiting if not (one.is_reading and one.submitted.is_abandoned)]
        if self._waiting:
            self._begin_write(self._next_batch())
        else:
            self._idle.set()

    def _begin_write(self, batch: list[Submission]) -> None:
        """Write a batch in the writer thread. A dialect may write it on the event loop instead."""
        self._writer.submit(self._write_in_thread, batch)

    def _write_in_thread(self, batch: list[Submission]) -> None:
        # The thread calls the loop itself. With `run_in_executor`, each transaction would take two more turns of the
        # loop.
        self._loop.call_soon_threadsafe(self._write(batch))

    def _write(self, batch: list[Submission]) -> Callable[[], None]:
        """Run a batch. Return the function that tells the callers how it went: call it on the event loop."""
        try:
            outcomes = self._run_batch([one.transition for one in batch], batch[0].kind)
        except Exception as error:  # noqa: BLE001 - also after a bug, every caller must get an answer
            failure = error if isinstance(error, CommitFailed) else CommitFailed(error)
            return partial(self._commit_failed, batch, failure)
        return partial(self._committed, batch, outcomes)

    def _committed(self, batch: list[Submission], outcomes: list[Any]) -> None:
        # Write the next batch before the callers of this one continue, but only after the effects of this one: effects
        # come in the order of the transactions.
        self._loop.call_soon(self._write_waiting)
        for submission, outcome in zip(batch, outcomes, strict=True):
            submission.submitted.settle(outcome)

    def _commit_failed(self, batch: list[Submission], error: CommitFailed) -> None:
        async def recover() -> None:
            try:
                await self._recover(error)
            finally:
                self._committed(batch, [_unconfirmed()] * len(batch))

        self._recovering = self._loop.create_task(recover(), name="recover the database")

    def _next_batch(self) -> list[Submission]:
        """Take the submissions of the next transaction out of the queue, and return them."""
        kind = self._waiting[0].kind
        # Changes may overtake a waiting reading, but a reading must never overtake a change.
        passed = (Kind.TOGETHER, Kind.SNAPSHOT) if kind is Kind.TOGETHER else (kind,)
        front = list(takewhile(lambda one: one.kind in passed, self._waiting[: 1 if kind is Kind.ALONE else MAX_BATCH]))
        batch = [one for one in front if one.kind is kind]
        self._waiting = [one for one in front if one.kind is not kind] + self._waiting[len(front) :]
        return batch

    async def _end_waiting(self) -> None:
        """Accept no further transitions, and finish those that were submitted."""
        self._closed = True
        await self._idle.wait()

    def _log_failure(self, error: CommitFailed) -> None:
        """Log that a transaction has failed. While a disk is full, callers retry several times a second."""
        text, now = str(error), self._loop.time()
        if text != self._logged or now - self._logged_at >= LOG_INTERVAL:
            self._logged, self._logged_at = text, now
            logger.error("database %s: %s; nothing that was acknowledged is lost", self.opened_as, text)

    def _look_again(self) -> None:
        """Make the calls that wait query the store."""
        for look_again in self.on_unknown:
            look_again()

    def _refuse_waiting(self, reason: str) -> None:
        """Mark the store as failed, and raise an error to the callers of the waiting transitions."""
        if not self.failed.done():
            self.failed.set_result(reason)
        for submission in self._waiting:
            submission.submitted.settle(_unconfirmed())
        self._waiting = []


def _stopping() -> StoreUnavailable:
    return StoreUnavailable("the server is stopping: retry when it is running again")


def _unconfirmed() -> StoreUnavailable:
    return StoreUnavailable("the database could not confirm the transaction, so it may or may not be stored: retry")
