"""The limit of the number of tasks that wait for workers."""

from __future__ import annotations

import asyncio

from nexum_engine.store import Store, reading

COUNT_INTERVAL = 1.0  # seconds, at least, between two counts


class Queue:
    """An upper bound of the number of tasks that wait for workers.

    The server counts the tasks when it starts, and again when the queue may be full. Between two counts, a server adds
    only the tasks that it starts itself. So if several servers share a database, they may together exceed the limit.
    """

    def __init__(self, store: Store, limit: int) -> None:
        self._limit = limit
        self._store = store
        self._tasks = 0
        """The number of tasks at the last count, plus the number that may have been added since."""
        self._counted = float("-inf")
        self._counting: asyncio.Task[None] | None = None

    async def full_at(self) -> int | None:
        """Return the limit if the queue is full, otherwise None.

        If the queue may be full, count its tasks again, but at most once in COUNT_INTERVAL.
        """
        if self._tasks < self._limit:
            return None
        now = asyncio.get_running_loop().time()
        is_under_way = self._counting is not None and not self._counting.done()
        if not is_under_way and now - self._counted >= COUNT_INTERVAL:
            self._counted = now
            self._counting = asyncio.create_task(self.count(), name="count the queue")
        if self._counting is not None:
            await asyncio.shield(self._counting)
        return None if self._tasks < self._limit else self._limit

    async def count(self) -> None:
        """Count the tasks, up to the limit."""
        self._tasks = await self._store.run(reading.queued_tasks, self._limit)

    def add(self) -> None:
        """Add one to the number of tasks, because a task may have been added."""
        self._tasks += 1
