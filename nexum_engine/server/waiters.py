"""The callers that wait for the end of an execution.

Waiting callers are kept only in memory. After a restart of the server, the callers wait again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from nexum_engine.records import Execution

MAX_REMEMBERED_EXECUTIONS = 100_000
"""Above this number of running executions, the server forgets which ones run. The next callers query the store."""


class Waiters:
    """The callers that wait for the end of an execution, by execution id."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[Execution | None]]] = defaultdict(set)
        self._running: set[str] = set()
        self._stopping = False

    def execution_started(self, execution_id: str) -> None:
        """Remember that the execution is running. Until `execution_ended`, callers wait for its end without a query."""
        if len(self._running) >= MAX_REMEMBERED_EXECUTIONS:
            self._running.clear()
        self._running.add(execution_id)

    def is_running(self, execution_id: str) -> bool:
        """Return whether the execution is known to be running. If False, query the store to find out."""
        return execution_id in self._running

    @contextmanager
    def watch(self, execution_id: str, seconds: float) -> Iterator[asyncio.Future[Execution | None]]:
        """Yield a future that resolves with the ended execution, or with None if the caller should query the store.

        After `seconds` at the latest, the caller should query the store.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Execution | None] = loop.create_future()
        if self._stopping:
            future.set_result(None)
        timer = loop.call_later(seconds, _settle, future, None)
        self._waiting[execution_id].add(future)
        try:
            yield future
        finally:
            timer.cancel()
            others = self._waiting[execution_id]
            others.discard(future)
            if not others:
                del self._waiting[execution_id]

    def execution_ended(self, execution: Execution) -> None:
        """Answer the callers that wait for the execution. If its payloads are large, the callers query the store."""
        self._answer(execution.execution_id, execution if execution.nodes else None)

    def ended_by_id(self, execution_id: str) -> None:
        """Make the callers that wait for an ended execution query the store: only its id is known here."""
        self._answer(execution_id, None)

    def _answer(self, execution_id: str, ended: Execution | None) -> None:
        self._running.discard(execution_id)
        for future in self._waiting.get(execution_id, ()):
            _settle(future, ended)

    def waited_for(self) -> list[str]:
        """Return the ids of the executions that have waiting callers."""
        return list(self._waiting)

    def forget_running(self) -> None:
        """Let the next callers query the store.

        Another server may have ended an execution, and its news may have been lost.
        """
        self._running.clear()

    def look_again(self) -> None:
        """Make every waiting caller query the store. Call this when it is unknown whether a transaction was stored."""
        self._running.clear()
        for execution_id in self._waiting:
            self._answer(execution_id, None)

    def stop(self) -> None:
        """Make every waiting caller query the store, and let no later caller wait."""
        self._stopping = True
        self.look_again()


def _settle(future: asyncio.Future[Execution | None], ended: Execution | None) -> None:
    if not future.done():
        future.set_result(ended)
