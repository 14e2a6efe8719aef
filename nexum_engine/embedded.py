"""The server that a program uses: a running server, or one in this process, with its workers as child processes.

A child ends when the pipe to its standard input closes. The operating system closes the pipe, even if the parent is
killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nexum_engine.client import NexumClient
from nexum_engine.connection import FIRST_ANSWER, RECONNECT_DELAY
from nexum_engine.errors import (
    START_A_SERVER,
    NexumError,
    NoOwnedExecutions,
    NotANexumServer,
    ServerNotReady,
    ServerUnavailable,
)
from nexum_engine.event_loop import call_in, running_loop, to_its_end
from nexum_engine.host import WATCH_INTERVAL, Host, Restarts

_log = logging.getLogger(__name__)

_IMPORTED_FROM = Path(__file__).resolve().parent.parent
END_TIMEOUT = 5.0  # seconds before a child that doesn't end is killed


async def start_child(command: list[str], *, env: Mapping[str, str] | None = None, quiet: bool = True) -> Child:
    """Start `python COMMAND` as a child that ends with this process. Its output is piped, or dropped if `quiet`."""
    python_path = os.pathsep.join(filter(None, (str(_IMPORTED_FROM), os.environ.get("PYTHONPATH"))))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        "--until-stdin-closes",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL if quiet else asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": python_path, **(env or {})},
        # Don't let Ctrl+C reach the child: this process ends its children.
        start_new_session=sys.platform != "win32",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    return Child(process)


class Child:
    """A running child process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None

    async def end(self) -> None:
        """Close the child's standard input and wait until the child ends. Kill the child after END_TIMEOUT."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        ending = asyncio.ensure_future(self.process.wait())
        # Don't use wait_for: before Python 3.12, it swallows a cancellation that arrives as the child ends.
        await asyncio.wait({ending}, timeout=END_TIMEOUT)
        if not ending.done():
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        await ending


class EmbeddedNexum:
    """A Nexum server that is available inside an `async with` block.

    If `address` or NEXUM_ADDRESS names a server, that server must answer. Otherwise the program uses the server that
    has this folder's database open, else a server that a person started on the default port. If neither answers, this
    process opens the database, and serves in a thread of its own: on the default port or, if that port is taken, on a
    free one. Programs in other folders never use this server. The server ends when the process leaves its last block.

    A program that uses another program's server opens the database itself if that server has ended.

    While the server is in this process, the given worker scripts run as child processes. A worker that ends early is
    restarted. If the server or a worker has to be restarted too often, the block is cancelled, and the `async with`
    raises ServerError.

    With `owners`, the server must support owned executions. A published Nexum server doesn't: it is refused if its
    address was given, and ignored if it only listens on the default port.

    Messages for a person are logged.

    Raises ServerUnavailable, NotANexumServer, NoOwnedExecutions, StoreError, ServerError.
    """

    def __init__(self, address: str | None, *, workers: Sequence[Path] = (), owners: bool = False) -> None:
        self.address = address or os.environ.get("NEXUM_ADDRESS") or ""
        """The server's address for NexumClient or --nexum: HOST:PORT, or the path of the server's database."""
        self.is_published = False
        """Whether it is a published Nexum server: one that isn't this project's and lacks this project's additions."""
        self._needs_owners = owners
        self._worker_scripts = workers
        self._workers: dict[Path, Child] = {}
        self._watching: asyncio.Task[None] | None = None
        self._restarts = Restarts()
        self._host: Host | None = None
        self._loop: asyncio.AbstractEventLoop
        self._body: asyncio.Task[Any] | None = None
        self._given_up: Exception | None = None

    @property
    def embedded(self) -> bool:
        """Whether the server runs in this process."""
        return self._host is not None and self._host.is_here

    async def __aenter__(self) -> EmbeddedNexum:
        self._loop, self._body = running_loop(), asyncio.current_task()
        try:
            if self.address:
                async with NexumClient(self.address) as client:
                    await _wait_for_server(client)
                    with contextlib.suppress(ServerUnavailable):  # the server may be restarting
                        self.is_published = await client.server_info() is None
            else:
                self._host = Host.enter(self._on_given_up, owners=self._needs_owners)
                await asyncio.shield(asyncio.wrap_future(self._host.chosen))
                self.address, self.is_published = self._host.address, self._host.is_published
                await self._start_workers()  # they wait for the server, which starts at the same time
                await asyncio.shield(asyncio.wrap_future(self._host.ready))
                if self._worker_scripts:
                    self._watching = asyncio.create_task(self._watch(), name="watch workers")
            if self.is_published and self._needs_owners:
                raise NoOwnedExecutions(self.address)
        except BaseException:
            await to_its_end(self._end())
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await to_its_end(self._end())
        if self._given_up is not None and kind is asyncio.CancelledError:
            raise self._given_up

    async def _end(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.gather(*(child.end() for child in self._workers.values()))
        if self._host is not None:
            await self._host.leave(self._on_given_up)

    def _on_given_up(self, error: Exception) -> None:
        call_in(self._loop, self._give_up, error)

    def _give_up(self, error: Exception) -> None:
        assert self._body is not None
        self._given_up = error
        self._body.cancel()

    async def _start_workers(self) -> None:
        """Start each worker that isn't running, if the server runs in this process."""
        for script in self._worker_scripts if self.embedded else ():
            ended = self._workers.get(script)
            if ended is None or ended.ended:
                if ended is not None:
                    self._restarts.count(script.name)
                    code = ended.process.returncode
                    _log.warning("%s ended (exit %s): restarted it", script.name, code)
                self._workers[script] = await start_child([str(script), "--nexum", self.address])

    async def _watch(self) -> None:
        try:
            while True:
                await asyncio.sleep(WATCH_INTERVAL)
                await self._start_workers()
        except NexumError as error:
            self._give_up(error)


async def _wait_for_server(client: NexumClient) -> None:
    """Wait until a Nexum server answers.

    Raises ServerUnavailable if nothing listens on the address. Raises NotANexumServer if a program listens there but
    doesn't answer as a Nexum server within FIRST_ANSWER. A gRPC call alone would wait much longer, and would raise the
    same error in both cases.
    """
    loop = asyncio.get_running_loop()
    give_up = loop.time() + FIRST_ANSWER * max(len(client.connection.targets), 1)
    while True:
        # Run both checks in parallel: on Windows, each check is slow if nothing listens.
        refusal, listens = await asyncio.gather(
            _refusal(client, give_up - loop.time()), asyncio.gather(*map(_somebody_listens, client.connection.targets))
        )
        if refusal is None:
            return
        if not any(listens):
            raise refusal
        # Retry until the time is up: the program that listens may be a Nexum server that is ending.
        if loop.time() >= give_up:
            raise NotANexumServer(
                f"the program that listens on {client.address} does not answer as a Nexum server: end it, or name a "
                "running server with --nexum HOST:PORT"
            )
        await asyncio.sleep(RECONNECT_DELAY)


async def _refusal(client: NexumClient, timeout: float) -> ServerUnavailable | None:
    """Return why no Nexum server answered within `timeout`. Return None if a Nexum server answered."""
    pinging = asyncio.ensure_future(client.ping())
    try:
        await asyncio.wait({pinging}, timeout=timeout)
        if not pinging.done():
            return ServerUnavailable(f"no Nexum server answers on {client.address}: {START_A_SERVER}")
        pinging.result()
    except ServerNotReady:
        return None
    except ServerUnavailable as error:
        return error
    finally:
        pinging.cancel()
    return None


async def _somebody_listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    connecting = asyncio.ensure_future(asyncio.open_connection(host, int(port)))
    try:
        await asyncio.wait({connecting}, timeout=FIRST_ANSWER)
        if not connecting.done():
            return False
        _, writer = connecting.result()
    except OSError:
        return False
    finally:
        connecting.cancel()
    writer.close()
    return True
