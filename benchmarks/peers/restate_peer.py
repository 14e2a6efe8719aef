"""Restate: a handler that its server invokes over HTTP, in a worker process.

- https://docs.restate.dev/develop/python/serving: Hypercorn with this page's settings.
- https://docs.restate.dev/services/invocation/clients/python-sdk: the client, with an idempotency key for each call.
- https://docs.restate.dev/references/server-config: the server's defaults, on loopback. The server syncs its log
  (`rocksdb-disable-wal-fsync = false`).

The service is registered once. After the worker process is killed, a new one listens on the same address, and the
server invokes the handler again.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from peers.base import Call, Group, Host, Peer, Settings, argument, executed_at, retried, tool

MODULES = Path(__file__).resolve().parent.parent / "node_modules"


def server_program() -> Path | None:
    """Return the path of the server's program. npm installs it near the command on PATH, or in node_modules."""
    script = shutil.which("restate-server")
    roots = [MODULES / "@restatedev"]
    if script is not None:
        # The command on PATH is a script. The program that it starts is in the package for this platform.
        roots.insert(0, Path(script).resolve().parent.parent.parent)
    for root in roots:
        for program in root.glob("restate-server-*/bin/restate-server*"):
            return program
    return None


def make_service() -> tuple[Any, Any]:
    """Return the service and its handler."""
    restate: Any = importlib.import_module("restate")
    service = restate.Service("Tools")

    @service.handler()
    async def no_op(ctx: Any, argument: str) -> str:
        return tool(argument)

    return service, no_op


class ServiceCaller:
    """Calls the service through the server."""

    def __init__(self, client: Any, handler: Any) -> None:
        self._client = client
        self._handler = handler

    async def run(self, name: str, calls: int) -> list[Call]:
        """Make the calls of a run."""
        made = []
        for number in range(calls):
            began = time.time()
            result = await self._client.service_call(
                self._handler, argument(name, number, calls), idempotency_key=f"{name}/{number}"
            )
            made.append(Call(began, executed_at(result), time.time()))
        return made


class Restate(Peer):
    """An invocation of a Restate service."""

    name = "restate"
    title = "Restate"
    group = Group.WORKER
    pages = (
        "https://docs.restate.dev/develop/python/serving",
        "https://docs.restate.dev/services/invocation/clients/python-sdk",
        "https://docs.restate.dev/references/server-config",
    )
    setup = (
        "One server with its defaults; a worker process with Hypercorn; a call is an invocation with an idempotency "
        "key. A killed worker is restarted at its address."
    )
    imports = ("restate", "httpx", "h2")
    needs = ("hypercorn",)
    install = (
        "pip install 'restate-sdk[serde]' hypercorn 'httpx[http2]' && "
        "npm install --prefix benchmarks @restatedev/restate-server"
    )
    restarts_worker = True

    def missing(self) -> str | None:
        """Return how to install what is missing, or None if nothing is missing."""
        lacks = super().missing()
        return lacks or (f"{self.install} (no restate-server)" if server_program() is None else None)

    async def serve(self, host: Host) -> Settings:
        """Start the server."""
        ports = {name: host.port(name) for name in ("ingress", "admin", "node", "service")}
        await host.program(
            [str(server_program()), "--no-logo", "--listen-mode", "tcp", "--base-dir", str(host.folder / "restate")],
            env={
                "RESTATE_BIND_IP": "127.0.0.1",
                "RESTATE_ADVERTISED_HOST": "127.0.0.1",
                "RESTATE_BIND_ADDRESS": f"127.0.0.1:{ports['node']}",
                "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ports['ingress']}",
                "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{ports['admin']}",
                "RESTATE_DISABLE_TELEMETRY": "true",
                "RESTATE_LOG_FILTER": "warn",
            },
        )
        return {name: str(port) for name, port in ports.items()}

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[ServiceCaller]:
        """Register the service if no service is registered, and connect the client."""
        httpx: Any = importlib.import_module("httpx")
        restate: Any = importlib.import_module("restate")
        _, handler = make_service()
        ingress = f"http://127.0.0.1:{settings['ingress']}"
        deployments = f"http://127.0.0.1:{settings['admin']}/deployments"
        async with httpx.AsyncClient() as plain:

            async def look() -> Any:
                (await plain.get(f"{ingress}/restate/health")).raise_for_status()
                return (await plain.get(deployments)).raise_for_status().json()["deployments"]

            async def register() -> None:
                service = {"uri": f"http://127.0.0.1:{settings['service']}"}
                (await plain.post(deployments, json=service)).raise_for_status()

            if not await retried(look):
                await retried(register)
        async with restate.create_client(ingress) as client:
            yield ServiceCaller(client, handler)

    async def work(self, settings: Settings, ready: Callable[[], None]) -> None:
        """Serve the service."""
        restate: Any = importlib.import_module("restate")
        hypercorn: Any = importlib.import_module("hypercorn")
        serve: Any = importlib.import_module("hypercorn.asyncio").serve
        service, _ = make_service()
        config = hypercorn.Config()
        config.bind = [f"127.0.0.1:{settings['service']}"]
        config.h2_max_concurrent_streams = 2147483647
        config.keep_alive_max_requests = 2147483647
        config.keep_alive_timeout = 2147483647
        serving = asyncio.ensure_future(serve(restate.app(services=[service]), config))

        async def look() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", int(settings["service"]))
            writer.close()

        await retried(look)
        ready()
        await serving
        sys.exit("Hypercorn ended")
