"""The interface of a store. `Store.run` runs one transition inside a transaction."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from nexum_engine.store.db import Db

P = ParamSpec("P")
T = TypeVar("T")


class Store(ABC):
    """A database on which the transitions of `executions`, `tasks`, `leases` and `retry` run one after the other.

    A dialect supplies `run`, `opened_as`, `failed` and `close`.
    """

    @property
    @abstractmethod
    def opened_as(self) -> str:
        """The database's name for a person: an absolute path, or a URL without its password."""

    @property
    @abstractmethod
    def failed(self) -> asyncio.Future[str]:
        """A future for the reason why the database can't be trusted any more. When it resolves, stop the server."""

    on_unknown: Sequence[Callable[[], None]] = ()
    """Callbacks to run when it is unknown whether a transaction was stored. They make waiting calls query the store."""

    @abstractmethod
    def run(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Submit a transition. It runs in one transaction, after the transitions submitted before it.

        The awaitable returns the transition's result once the transaction is durable. It raises the transition's error,
        or StoreUnavailable if it is unknown whether the transaction was stored.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish the submitted transitions and release the database."""
