"""The callers that wait for the end of an execution.

All of this is only in memory: after a restart callers wait again, and the store has everything else.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from nexum_engine.records import Execution


class Waiters:
    """The callers that wait, by execution."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[Execution | None]]] = defaultdict(set)
        self._running: set[str] = set()
        self._stopping = False

    def execution_started(self, execution_id: str) -> None:
        """Note that the execution runs: until `execution_ended`, waiting for it needs no look at the store."""
        self._running.add(execution_id)

    def is_running(self, execution_id: str) -> bool:
        """Return whether the execution is known to run. If False, only the store knows."""
        return execution_id in self._running

    @contextmanager
    def watch(self, execution_id: str) -> Iterator[asyncio.Future[Execution | None]]:
        """Yield a future that resolves with the ended execution, or with None if the caller should look again."""
        future: asyncio.Future[Execution | None] = asyncio.get_running_loop().create_future()
        if self._stopping:
            future.set_result(None)
        self._waiting[execution_id].add(future)
        try:
            yield future
        finally:
            others = self._waiting[execution_id]
            others.discard(future)
            if not others:
                del self._waiting[execution_id]

    def execution_ended(self, execution: Execution) -> None:
        """Answer the callers that wait for the execution."""
        self._running.discard(execution.execution_id)
        for future in self._waiting.get(execution.execution_id, ()):
            if not future.done():
                future.set_result(execution)

    def look_again(self) -> None:
        """Make every waiting caller look at the store: the outcome of earlier transactions is unknown."""
        self._running.clear()
        for waiting in self._waiting.values():
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    def stop(self) -> None:
        """Answer every waiting caller, and later ones at once."""
        self._stopping = True
        self.look_again()
