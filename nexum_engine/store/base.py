"""The interface of a store. `Store.run` runs one transition inside a transaction.

A transition is a function that reads or changes the database through a `Db`, for example `tasks.complete_task`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from nexum_engine.store.db import Db
from nexum_engine.store.results import News
from nexum_engine.store.submitted import Submitted

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Space:
    """The space of a database on the disk, in bytes."""

    total: int
    free: int
    """The part of `total` that is not in use. New executions are stored in it."""
    given_back: int = 0
    """The bytes that `compact` has just released to the disk."""


@dataclass(frozen=True)
class Checked:
    """The result of `check_database`."""

    executions: int
    findings: tuple[str, ...]


class Store(ABC):
    """A database on which transitions run one after the other.

    A dialect supplies the abstract methods.
    """

    @property
    @abstractmethod
    def opened_as(self) -> str:
        """The database's name in messages for people: an absolute path, or a URL without its password."""

    @property
    @abstractmethod
    def database_id(self) -> str:
        """A random value that tells the database from others. A copy, such as a restored backup, has the same value."""

    @property
    @abstractmethod
    def file(self) -> Path | None:
        """The database's file on this machine, or None if the database is not a file (PostgreSQL)."""

    @property
    @abstractmethod
    def failed(self) -> asyncio.Future[str]:
        """A future that resolves with the reason when the database can't be trusted any more. Then stop the server."""

    @property
    @abstractmethod
    def submitted(self) -> int:
        """How many transitions were submitted so far."""

    on_unknown: Sequence[Callable[[], None]] = ()
    """Callbacks that make waiting calls query the store. They run if nobody knows whether a transaction was stored."""

    def join(self, on_news: Callable[[News], None]) -> None:  # noqa: B027 - most databases have one server
        """Begin to tell the other servers on this database that this server is alive, and to hear what they change.

        `on_news` is called on the event loop soon after each transaction of another server. It is also called from time
        to time, because the news of a transaction may be lost.
        """

    @abstractmethod
    def run(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Submitted[T]:
        """Submit a transition. The transition runs in one transaction, after the transitions submitted before it.

        When the transaction is durable, awaiting the return value returns the transition's result. It raises the
        transition's error, or StoreUnavailable if it is unknown whether the transaction was stored.
        """

    @abstractmethod
    def run_alone(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Submitted[T]:
        """Submit a transition as `run` does, in a transaction of its own, without checks of references between rows.

        Use this for deletions: to check that no row refers to a deleted row, SQLite would read whole tables.
        """

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
