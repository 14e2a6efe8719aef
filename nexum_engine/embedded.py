"""The server that a program uses: a running server, or a child process that ends with the program.

A child ends when the pipe to its standard input closes. The operating system closes the pipe, however the parent dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nexum_engine import DEFAULT_LISTEN, ERROR
from nexum_engine.client import NexumClient
from nexum_engine.connection import DEFAULT_ADDRESS, FIRST_ANSWER
from nexum_engine.errors import (
    START_A_SERVER,
    NexumError,
    NoOwnedExecutions,
    NotANexumServer,
    ServerError,
    ServerNotReady,
    ServerUnavailable,
)
from nexum_engine.location import database_url, is_same_database, own_database, read_address

_log = logging.getLogger(__name__)

_IMPORTED_FROM = Path(__file__).resolve().parent.parent
ANY_PORT = "127.0.0.1:0"
LOOK_INTERVAL = 0.1  # seconds
WATCH_INTERVAL = 0.3  # seconds between checks of the children and the server
PATIENCE = 10.0  # seconds for which a new server waits until an ending server releases the database
START_TIMEOUT = 60.0  # seconds, for slow disks and virus scanners
END_TIMEOUT = 5.0  # seconds before a child that doesn't end is killed
SLOW_START = 3.0  # seconds until a log line explains why the server isn't ready
MAX_RESTARTS, RESTART_WINDOW = 5, 60.0  # count and seconds; above the limit, another restart won't help


async def start_child(command: list[str], *, env: Mapping[str, str] | None = None, quiet: bool = True) -> Child:
    """Start `python COMMAND` as a child that ends with this process. Its output is piped, or dropped if `quiet`."""
    python_path = os.pathsep.join(filter(None, (str(_IMPORTED_FROM), os.environ.get("PYTHONPATH"))))
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        "--until-stdin-closes",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL if quiet else asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": python_path, **(env or {})},
        # Don't let Ctrl+C reach the child: this process ends its children.
        start_new_session=sys.platform != "win32",
        creationflags=flags,
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


class _KilledAtStart(ServerError):
    """Another process killed the embedded server while it started. Another start may work."""


class EmbeddedNexum:
    """A Nexum server that is available inside an `async with` block.

    If `address` or NEXUM_ADDRESS names a server, that server must answer. Otherwise the program uses the server that
    has this folder's database open, else a server that a person started on the default port. If neither answers, it
    starts an embedded server and the given worker scripts. The embedded server listens on the default port or, if that
    port is taken, on a free one. Programs in other folders never use the embedded server.

    An embedded server or worker that ends early is restarted. A program that uses another program's embedded server
    restarts that server if it has ended. After too many restarts, the block is cancelled, and the `async with` raises
    ServerError.

    With `owners`, the server must support owned executions: a published Nexum server is refused if its address was
    given, and otherwise ignored.

    `meanwhile` is called while the server and the workers start: put slow imports there. Messages for a person are
    logged.

    Raises ServerUnavailable, NotANexumServer, NoOwnedExecutions, ServerError.
    """

    def __init__(
        self,
        address: str | None,
        *,
        workers: Sequence[Path] = (),
        owners: bool = False,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self.embedded = False
        self.is_published = False
        """Whether the server is a published Nexum server, which knows only the published contract."""
        self._may_start = not (address or os.environ.get("NEXUM_ADDRESS"))
        self._needs_owners = owners
        self._worker_scripts = workers
        self._meanwhile = meanwhile
        self._server: Child | None = None
        self._workers: dict[Path, Child] = {}
        self._client = NexumClient(address)
        # Resolve the path now: the code in the `async with` block may change the working folder.
        self._database = own_database()
        self._listen = DEFAULT_LISTEN
        """The address that a new server tries first."""
        self._is_bound = False
        """Whether the client uses the server on the default port, and not the server with the folder's database."""
        self._watching: asyncio.Task[None] | None = None
        self._restarts: list[float] = []
        self._given_up: NexumError | None = None

    @property
    def address(self) -> str:
        """The server's address for NexumClient or --nexum: HOST:PORT, or the path of the server's database."""
        return self._client.address

    async def __aenter__(self) -> EmbeddedNexum:
        try:
            if self._may_start:
                if not await self._find():
                    await self._turn_to_own()
                    await self._start()
                body = asyncio.current_task()
                assert body is not None
                self._watching = asyncio.create_task(self._watch(body), name="watch server and workers")
            else:
                await self._first_answer()
            if not self.embedded:
                with contextlib.suppress(ServerUnavailable):  # the server may be restarting
                    self.is_published = await self._client.server_info() is None
            if self.is_published and self._needs_owners:
                raise NoOwnedExecutions(self.address)
            self._use_the_time()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self._end()
        if self._given_up is not None and kind is asyncio.CancelledError:
            raise self._given_up

    async def _end(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        children = [*self._workers.values(), *([self._server] if self._server else [])]
        await asyncio.gather(*(child.end() for child in children))
        await self._client.close()

    def _use_the_time(self) -> None:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        meanwhile()

    async def _find(self) -> bool:
        """Return whether a server for this folder's runs already answers."""
        try:
            info = await self._client.server_info()
        except (ServerUnavailable, NotANexumServer):
            return False
        if info is None and self._needs_owners:
            # Take a free port. On the default port, only one of the two servers is reached as localhost.
            self._listen = ANY_PORT
            return False
        own = self._database
        self._is_bound = self.address == DEFAULT_ADDRESS
        if not self._is_bound and own is not None:
            self._listen = read_address(own) or DEFAULT_LISTEN
        elif info is not None and (own is None or not is_same_database(info.database, str(own))):
            _log.info("using the server on %s (database %s)", self.address, info.database)
        return True

    async def _turn_to_own(self) -> None:
        """Replace the client with a client for the server that has this folder's database open."""
        if self._database is not None:  # without a database, the new server fails and prints the error
            await self._client.close()
            self._client = NexumClient(str(self._database))

    async def _first_answer(self) -> None:
        """Wait until a Nexum server answers.

        Raises ServerUnavailable if nothing listens on the address. Raises NotANexumServer if a program listens there
        but doesn't answer as a Nexum server within FIRST_ANSWER. gRPC alone would wait much longer, and would raise
        the same error in both cases.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + FIRST_ANSWER
        while True:
            # Run both checks in parallel: on Windows, each check is slow if nothing listens.
            refusal, somebody_listens = await asyncio.gather(
                self._refusal(give_up - loop.time()), self._somebody_listens()
            )
            if refusal is None:
                return
            if not somebody_listens:
                raise refusal
            # Retry until the time is up: the program that listens may be a Nexum server that is ending.
            if loop.time() >= give_up:
                raise NotANexumServer(
                    f"the program that listens on {self.address} does not answer as a Nexum server: end it, or name "
                    "a running server with --nexum HOST:PORT"
                )
            await asyncio.sleep(LOOK_INTERVAL)

    async def _refusal(self, timeout: float) -> ServerUnavailable | None:
        """Return why no Nexum server answered within `timeout`. Return None if a Nexum server answered."""
        pinging = asyncio.ensure_future(self._client.ping())
        try:
            await asyncio.wait({pinging}, timeout=timeout)
            if not pinging.done():
                return ServerUnavailable(f"no Nexum server answers on {self.address}: {START_A_SERVER}")
            pinging.result()
        except ServerNotReady:
            return None
        except ServerUnavailable as error:
            return error
        finally:
            pinging.cancel()
        return None

    async def _somebody_listens(self) -> bool:
        host, _, port = self.address.rpartition(":")
        if not port.isdecimal():
            return False  # the address is a database's path: nothing to connect to
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

    async def _start(self, why: str = "") -> None:
        """Start a server, and each worker that isn't running. `why` says why the previous server is replaced."""
        listen = self._listen
        command = ["-m", "nexum_engine", "--listen", listen, "--patience", str(PATIENCE)]
        if self._database is not None:
            command += ["--database-url", database_url(self._database)]
        if not self._is_bound:
            command += ["--else-free-port"]
        server = await start_child(command, quiet=False)
        self._server = server
        for script in self._worker_scripts:
            if script not in self._workers:
                await self._start_worker(script)  # don't wait for the server first: the worker does that
        self._use_the_time()
        try:
            line = await self._first_line(server)
        except _KilledAtStart:
            self._count_restart("the embedded server")
            _log.warning("the embedded server was killed while it started: starting it again")
            await self._start(why)
            return
        if line is None:
            why = f"{why}; " if why else ""
            _log.info("%sanother run has just started a server for this folder: using that server", why)
            self._server = None
            await server.end()
            return
        self.embedded = True
        self._listen, _, database = line.partition(" on ")[2].partition(", database ")
        if not why:
            why = f"no server on {DEFAULT_ADDRESS}" if self._listen == listen else f"{DEFAULT_ADDRESS} is in use"
        where = "" if self._listen == DEFAULT_LISTEN else f" on {self._listen}"
        database = database.removesuffix(" (Ctrl+C to stop)")
        _log.info("%s: started one for this run%s (database %s)", why, where, database)

    async def _start_worker(self, script: Path) -> None:
        self._workers[script] = await start_child([str(script), "--nexum", self.address])

    async def _first_line(self, server: Child) -> str | None:
        """Return the line that `server` prints when it is ready. Return None if another server answers instead."""
        assert server.process.stdout is not None
        reading = asyncio.ensure_future(server.process.stdout.readline())
        loop = asyncio.get_running_loop()
        begun = loop.time()
        explained = False
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=WATCH_INTERVAL)
                if reading.done():
                    break
                if loop.time() - begun > START_TIMEOUT:
                    raise ServerError(f"the embedded server did not start within {START_TIMEOUT:g} s")
                if loop.time() - begun > SLOW_START and not explained:
                    _log.info("the embedded server is not ready: another server may still have the database open")
                    explained = True
                with contextlib.suppress(ServerUnavailable, NotANexumServer):
                    await self._client.ping()
                    # Wait for the line: `server` itself may have answered, just before it prints its line.
                    await asyncio.wait({reading}, timeout=1.0)
                    if not reading.done():
                        return None
            line = reading.result().decode("utf-8", "replace").strip()
        finally:
            reading.cancel()
        if not line:
            if await server.process.wait() < 0:
                raise _KilledAtStart("the embedded server was killed while it started")
            raise ServerError(f"the embedded server did not start (exit {server.process.returncode})")
        if line.startswith(ERROR):
            raise ServerError(f"the embedded server did not start: {line.removeprefix(ERROR)}")
        return line

    async def _watch(self, body: asyncio.Task[Any]) -> None:
        try:
            await self._replace_what_vanishes()
        except NexumError as error:
            self._given_up = error
            body.cancel()

    async def _replace_what_vanishes(self) -> None:
        silent = 0
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            if self._server is not None and self._server.ended:
                code = self._server.process.returncode
                self._server = None
                await self._restart(f"the server ended (exit {code})")
                continue
            if self._server is None:
                try:
                    await self._client.ping()
                    silent = 0
                except ServerUnavailable:
                    silent += 1
                    if silent >= 2:
                        silent = 0
                        await self._restart("the server does not answer")
                    continue
            for script, child in list(self._workers.items()):
                if child.ended:
                    self._count_restart(script.name)
                    await self._start_worker(script)
                    _log.warning("%s ended (exit %s): restarted it", script.name, child.process.returncode)

    async def _restart(self, why: str) -> None:
        self._count_restart("the server")
        try:
            await self._start(why)
        except NexumError as error:
            _log.warning("%s; retrying", error)

    def _count_restart(self, what: str) -> None:
        now = asyncio.get_running_loop().time()
        self._restarts = [*(at for at in self._restarts if now - at < RESTART_WINDOW), now]
        if len(self._restarts) > MAX_RESTARTS:
            raise ServerError(f"{what} ended again: giving up after {MAX_RESTARTS} restarts within a minute")
