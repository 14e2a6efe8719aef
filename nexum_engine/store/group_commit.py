"""The queue of a store: one thread takes all transitions that wait, runs them, and commits them together."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from typing import Any, Concatenate, ParamSpec, TypeVar

from nexum_engine.errors import StoreUnavailable
from nexum_engine.store.base import Store
from nexum_engine.store.db import SNAPSHOTS, Db
from nexum_engine.store.submitted import Submitted

P = ParamSpec("P")
T = TypeVar("T")
Transition = Callable[[Db], Any]

MAX_BATCH = 256  # transitions in one transaction
LOG_INTERVAL = 10.0  # seconds between two log lines about the same error

logger = logging.getLogger(__name__)


class Kind(Enum):
    """Which transitions may share a transaction."""

    TOGETHER = "with others of this kind"
    SNAPSHOT = "with others that read one snapshot"
    ALONE = "with no other"


@dataclass
class _Submission:
    transition: Transition
    submitted: Submitted[Any]
    kind: Kind


class CommitFailed(Exception):
    """A whole transaction has failed, with all its transitions."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.cause = cause

    def for_caller(self) -> StoreUnavailable:
        return StoreUnavailable("the database could not confirm the transaction, so it may or may not be stored: retry")


class GroupCommitStore(Store):
    """A store whose transitions share a transaction if they were submitted in one turn of the event loop, or while the
    previous transaction was being written. If one transition fails, the others are still committed.

    A dialect supplies the abstract methods.
    """

    _reads_snapshots = False
    """Whether the transitions in SNAPSHOTS need a snapshot.

    They need one if another server can change the database between two statements of a transaction.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[str] = self._loop.create_future()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="nexum-store")
        self._waiting: list[_Submission] = []
        self._submitted = 0
        self._idle = asyncio.Event()
        """Set while no transition waits or runs."""
        self._idle.set()
        self._recovering: asyncio.Task[None] | None = None
        self._closed = False
        self._logged, self._logged_at = "", 0.0

    @abstractmethod
    def _run_batch(self, transitions: list[Transition], kind: Kind) -> list[Any]:
        """Run transitions of one kind in the writer thread. Return a list with each transition's result or exception.

        Raises CommitFailed if it is unknown whether the transitions are stored.
        """

    @abstractmethod
    async def _recover(self, error: CommitFailed) -> None:
        """Connect to the database again after a failed transaction, or mark the store as failed."""

    @property
    def failed(self) -> asyncio.Future[str]:
        return self._failed

    @property
    def submitted(self) -> int:
        return self._submitted

    def run(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Submitted[T]:
        is_snapshot = self._reads_snapshots and transition in SNAPSHOTS
        kind = Kind.SNAPSHOT if is_snapshot else Kind.TOGETHER
        return self._submit(lambda db: transition(db, *args, **kwargs), kind)

    def run_alone(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Submitted[T]:
        return self._submit(lambda db: transition(db, *args, **kwargs), Kind.ALONE)

    def _submit(self, transition: Callable[[Db], T], kind: Kind) -> Submitted[T]:
        submitted: Submitted[T] = Submitted(self._loop)
        if self._closed or self._failed.done():
            submitted.settle(stopping())
            return submitted
        self._waiting.append(_Submission(transition, submitted, kind))
        self._submitted += 1
        if self._idle.is_set():
            self._idle.clear()
            # In the next turn of the loop: the transitions that are submitted in this turn share the transaction.
            self._loop.call_soon(self._write_waiting)
        return submitted

    def _write_waiting(self) -> None:
        """Hand the next batch to the writer thread, if any transition waits."""
        if self._waiting:
            self._writer.submit(self._write, self._next_batch())
        else:
            self._idle.set()

    def _write(self, batch: list[_Submission]) -> None:
        """Run a batch in the writer thread, and tell the event loop how it went."""
        # The thread calls the loop itself. With `run_in_executor`, each transaction would take two more turns of the
        # loop.
        try:
            outcomes = self._run_batch([one.transition for one in batch], batch[0].kind)
        except Exception as error:  # noqa: BLE001 - also after a bug, every caller must get an answer
            failure = error if isinstance(error, CommitFailed) else CommitFailed(error)
            self._loop.call_soon_threadsafe(self._commit_failed, batch, failure)
        else:
            self._loop.call_soon_threadsafe(self._committed, batch, outcomes)

    def _committed(self, batch: list[_Submission], outcomes: list[Any]) -> None:
        self._write_waiting()  # first, so that the writer thread works meanwhile
        for submission, outcome in zip(batch, outcomes, strict=True):
            submission.submitted.settle(outcome)

    def _commit_failed(self, batch: list[_Submission], error: CommitFailed) -> None:
        async def recover() -> None:
            try:
                await self._recover(error)
            finally:
                self._committed(batch, [error.for_caller()] * len(batch))

        self._recovering = self._loop.create_task(recover(), name="recover the database")

    def _next_batch(self) -> list[_Submission]:
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

    def _log_failure(self, database: object, error: CommitFailed) -> None:
        """Log that a transaction has failed. While a disk is full, callers retry several times a second."""
        text, now = str(error), self._loop.time()
        if text != self._logged or now - self._logged_at >= LOG_INTERVAL:
            self._logged, self._logged_at = text, now
            logger.error("database %s: %s; nothing that was acknowledged is lost", database, text)

    def _look_again(self) -> None:
        """Make the calls that wait query the store."""
        for look_again in self.on_unknown:
            look_again()

    def _refuse_waiting(self, reason: str, error: CommitFailed) -> None:
        """Mark the store as failed, and raise an error to the callers of the waiting transitions."""
        if not self._failed.done():
            self._failed.set_result(reason)
        for submission in self._waiting:
            submission.submitted.settle(error.for_caller())
        self._waiting = []


def stopping() -> StoreUnavailable:
    """Return the error of a call that comes while the server stops."""
    return StoreUnavailable("the server is stopping: retry when it is running again")
