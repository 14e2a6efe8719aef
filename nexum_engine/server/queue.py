"""The limit of the number of tasks that wait for workers."""

from __future__ import annotations

import asyncio

from nexum_engine.store import Store, reading

COUNT_INTERVAL = 1.0  # seconds, at least, between two counts


class Queue:
    """An upper bound of the number of tasks that wait for workers.

    The tasks are counted only when the starts since the last count may have filled the queue. Another server on the
    same database counts only its own starts, so several servers together may exceed the limit by what they start
    between two counts.
    """

    def __init__(self, store: Store, limit: int) -> None:
        self.limit = limit
        self._store = store
        self._tasks = limit
        """The number of tasks at the last count, plus the number that may have been added since."""
        self._counted = float("-inf")
        self._counting: asyncio.Task[None] | None = None

    async def is_full(self) -> bool:
        """Return whether the queue is full. If it may be full, count its tasks first."""
        if self._tasks >= self.limit:
            now = asyncio.get_running_loop().time()
            is_under_way = self._counting is not None and not self._counting.done()
            if not is_under_way and now - self._counted >= COUNT_INTERVAL:
                self._counted = now
                self._counting = asyncio.create_task(self._count(), name="count the queue")
            if self._counting is not None:
                await asyncio.shield(self._counting)
        return self._tasks >= self.limit

    async def _count(self) -> None:
        self._tasks = await self._store.run(reading.queued_tasks, self.limit)

    def add(self) -> None:
        """Note that a task may have been added."""
        self._tasks += 1
