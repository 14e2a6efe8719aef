"""This project: recorded calls in the caller's process, and tool calls that a worker executes.

See docs/your-own-agent.md and docs/durable-runs.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from peers.autogen_peer import ToolCaller
from peers.base import IN_FLIGHT, Call, Group, Host, Peer, Settings, argument, executed_at, tool

if TYPE_CHECKING:
    from nexum_engine.client import NexumClient
    from nexum_engine.owner import Owner


class _WithoutServer(Peer):
    """A row without a server: the caller opens the database in its own process."""

    group = Group.CALLER

    async def serve(self, host: Host) -> Settings:
        """Start nothing; return the URL of the database."""
        return {"url": f"sqlite:///{host.folder / 'nexum.db'}"}

    @asynccontextmanager
    async def opened(self, settings: Settings) -> AsyncIterator[str]:
        """Open the database in this process; yield the address for clients."""
        from nexum_engine.embedded import EmbeddedNexum

        os.environ.pop("NEXUM_ADDRESS", None)
        os.environ["DATABASE_URL"] = settings["url"]
        async with EmbeddedNexum(None, owners=True) as nexum:
            yield nexum.address


class SessionCaller:
    """Calls an AutoGen tool inside durable sessions."""

    def __init__(self) -> None:
        self._tools = ToolCaller()

    async def run(self, name: str, calls: int) -> list[Call]:
        """Make the calls of a run, which is a session."""
        from durable_autogen import DurableSession

        async with DurableSession(name) as session:
            with session.agent("caller"):
                return await self._tools.run(name, calls)


class NexumSession(_WithoutServer):
    """A tool call in a durable session."""

    name = "nexum-session"
    title = "this project: AutoGen tool call in a DurableSession"
    pages = ("docs/durable-runs.md",)
    setup = (
        "No server, SQLite. An agent's calls come one at a time, so only their results are recorded, each by a commit."
    )
    imports = ("durable_autogen", "autogen_core.tools")

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[SessionCaller]:
        """Open the database for all sessions, and make the tool."""
        async with self.opened(settings):
            yield SessionCaller()


class OwnerCaller:
    """Makes calls in this process, and records each finished call with its result."""

    def __init__(self, client: NexumClient, owner: Owner) -> None:
        from nexum_engine.workflow import workflow

        self._client = client
        self._owner = owner
        self._workflow = workflow("compared-call").effect("call").build()

    async def run(self, name: str, calls: int) -> list[Call]:
        """Read the recorded calls of the run, and make the missing calls."""
        recorded = {
            execution.idempotency_key: json.loads(execution.outputs()["call"])["result"]
            for execution in await self._client.list_executions(
                workflow_id=self._workflow.workflow_id, key_prefix=f"{name}/", limit=calls, with_nodes=True
            )
        }
        made = []
        for number in range(calls):
            key = f"{name}/{number}"
            began = time.time()
            if (result := recorded.get(key)) is None:
                input = {"argument": argument(name, number, calls)}
                result = tool(input["argument"])
                await self._owner.record(self._workflow, input, {"result": result}, idempotency_key=key)
            made.append(Call(began, executed_at(result), time.time()))
        return made


class NexumOwner(_WithoutServer):
    """A call that is recorded only after its end, as a durable session records a model's reply."""

    name = "nexum-owner"
    title = "this project: result recorded by nexum_engine.owner"
    pages = ("docs/architecture.md#what-is-recorded-and-where",)
    setup = "No server, SQLite. The result is recorded by one commit, as a DurableSession records a model's reply."
    imports = ("nexum_engine.owner",)

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[OwnerCaller]:
        """Open the database, and connect an owner."""
        from nexum_engine.client import NexumClient
        from nexum_engine.owner import Owner

        async with self.opened(settings) as address, NexumClient(address) as client, Owner(client) as owner:
            yield OwnerCaller(client, owner)


class TaskCaller:
    """Makes tool calls as demo.py does: with submit_task, and a session file for each run."""

    def __init__(self, client: NexumClient) -> None:
        self._client = client

    async def run(self, name: str, calls: int) -> list[Call]:
        """Make the calls of a run."""
        from submit_task import Session

        session = Session(name, client=self._client, tell=lambda _: None)
        made = []
        for number in range(calls):
            began = time.time()
            found = await session.call("no_op", {"argument": argument(name, number, calls)})
            made.append(Call(began, executed_at(found.text), time.time()))
        return made


class NexumWorker(Peer):
    """A tool call that a worker process executes."""

    name = "nexum-worker"
    title = "this project: submit_task and a worker"
    group = Group.WORKER
    pages: tuple[str, ...] = ("docs/your-own-agent.md", "docs/cost.md")
    setup = f"Server process, SQLite; a worker process with concurrency {IN_FLIGHT}; a session file for each run."
    imports = ("submit_task",)

    async def serve(self, host: Host) -> Settings:
        """Start this project's server."""
        address, url = f"127.0.0.1:{host.port('nexum')}", f"sqlite:///{host.folder / 'nexum.db'}"
        await host.program([sys.executable, "-m", "nexum_engine", "--listen", address, "--database-url", url])
        return {"address": address}

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[TaskCaller]:
        """Connect the caller."""
        from nexum_engine.client import NexumClient

        async with NexumClient(settings["address"]) as client:
            yield TaskCaller(client)

    async def work(self, settings: Settings, ready: Callable[[], None]) -> None:
        """Run the worker of worker.py with the tool of the comparison."""
        from nexum_engine.client import NexumClient
        from nexum_engine.worker import Worker
        from support.tool_calls import bindings
        from support.tools import tool as declare
        from support.tools.web.live import LiveWeb
        from workflow import TOOL_CALL

        @declare(time_limit=86_400)
        async def no_op(argument: str) -> str:
            """Run the tool of the comparison."""
            return tool(argument)

        async with NexumClient(settings["address"]) as client:
            worker = Worker(client, bindings(client, TOOL_CALL, LiveWeb()), concurrency=IN_FLIGHT)
            ready()
            await worker.run(asyncio.Event())


class PublishedNexum(NexumWorker):
    """A published Nexum server, which lacks this project's additions. The user has started it."""

    name = "published"
    title = "published Nexum server, this project's caller and worker"
    pages = ("docs/wire.md#with-a-published-server",)
    setup = "The server that --published names; its own database; the worker polls every 0.1 s, one poll at a time."
    is_whole = False
    address = ""

    async def serve(self, host: Host) -> Settings:
        """Start nothing: the server is running."""
        return {"address": self.address}
