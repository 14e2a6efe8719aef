"""The store as the server sees it: one call, one transition, one transaction."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from nexum_engine.store.db import Db

P = ParamSpec("P")
T = TypeVar("T")


class Store(ABC):
    """A database, on which the transitions of `executions`, `tasks` and `leases` run one after the other.

    A dialect supplies `run`, `opened_as`, `failed` and `close`.
    """

    @property
    @abstractmethod
    def opened_as(self) -> str:
        """The database, for a person: an absolute path, or a URL without its password."""

    @property
    @abstractmethod
    def failed(self) -> asyncio.Future[str]:
        """Resolves, with the reason, when the database can't be trusted any more and the server has to stop."""

    on_unknown: Sequence[Callable[[], None]] = ()
    """Called when the outcome of transactions is unknown: whoever waits for one should look again."""

    @abstractmethod
    def run(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Submit a transition; it runs in one transaction, after those that were submitted before it.

        Awaiting the answer waits until it is durable. That raises the transition's own error, or StoreUnavailable when
        the outcome is unknown.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish what was submitted and release the database."""
