"""The store's interface: each call runs one transition in one transaction."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from nexum_engine.store.db import Db

P = ParamSpec("P")
T = TypeVar("T")


class Store(ABC):
    """A database on which the transitions of `executions`, `tasks` and `leases` run one after the other.

    A dialect supplies `run`, `opened_as`, `failed` and `close`.
    """

    @property
    @abstractmethod
    def opened_as(self) -> str:
        """The database's name for a person: an absolute path, or a URL without its password."""

    @property
    @abstractmethod
    def failed(self) -> asyncio.Future[str]:
        """A future that resolves with the reason when the database can't be trusted any more: the server must stop."""

    on_unknown: Sequence[Callable[[], None]] = ()
    """Callbacks for when the outcome of transactions is unknown: waiting calls must look again."""

    @abstractmethod
    def run(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Submit a transition. It runs in one transaction, after the transitions submitted before it.

        The awaitable returns the result once it is durable. It raises the transition's own error, or StoreUnavailable
        if the outcome is unknown.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish the submitted transitions and release the database."""
