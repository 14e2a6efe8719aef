"""The server that the runs of this process share: a running server, or one in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import thread as _executors  # noqa: F401 - registers its hook for the interpreter's end
from pathlib import Path
from typing import Any

from nexum_engine import DEFAULT_LEASE, DEFAULT_LISTEN
from nexum_engine.channel import is_forked
from nexum_engine.client import NexumClient
from nexum_engine.connection import DEFAULT_ADDRESS, RECONNECT_DELAY, FoundAddress
from nexum_engine.errors import NexumError, NotANexumServer, ServerError, ServerUnavailable, StoreLocked
from nexum_engine.event_loop import LoopThread, call_in
from nexum_engine.forks import in_forked_process, never_free
from nexum_engine.location import database_url, default_database_url, own_database, read_address

_log = logging.getLogger(__name__)

ANY_PORT = "127.0.0.1:0"
WATCH_INTERVAL = 0.3  # seconds between checks of a server of another process
PATIENCE = 10.0  # seconds that a new server waits for an ending server to release the database
SLOW_START = 3.0  # seconds until a log line explains why the database isn't open
EXIT_PATIENCE = 10.0  # seconds that an ending interpreter waits for the server to close the database
MAX_RESTARTS, RESTART_WINDOW = 5, 60.0  # give up if more than MAX_RESTARTS are needed within RESTART_WINDOW seconds


class Restarts:
    """The times of the restarts in the last RESTART_WINDOW seconds."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def count(self, what: str) -> None:
        """Count a restart of `what`. Raises ServerError if there were too many."""
        now = asyncio.get_running_loop().time()
        self._times = [*(at for at in self._times if now - at < RESTART_WINDOW), now]
        if len(self._times) > MAX_RESTARTS:
            raise ServerError(f"{what} ended again: giving up after {MAX_RESTARTS} restarts within a minute")


class Host:
    """The server of a folder's runs. The server is available from `ready` until the last user leaves.

    The server is the one that has the folder's database open, else one that a person started on the default port. If
    neither answers, a thread of this process opens the database and serves. If a server ends while it is in use, the
    thread opens the database in its place.

    With `owners`, a published Nexum server is ignored: it doesn't support owned executions.
    """

    def __init__(self, database: Path | None, owners: bool, predecessor: Host | None) -> None:
        self.chosen: Future[None] = Future()
        """Done when `address`, `is_published` and `is_here` are known. The server may still be starting."""
        self.ready: Future[None] = Future()
        self.ended: Future[None] = Future()
        self.is_published = False
        """Whether it is a published Nexum server: one that isn't this project's and lacks this project's additions."""
        self.is_here = False
        """Whether the server runs in this process."""
        self.address = ""
        """The server's address for NexumClient or --nexum: HOST:PORT, or the path of its database."""
        self._database = database
        # Read DATABASE_URL now: the program may change it later, or change the working folder.
        self._url = default_database_url() if database is None else database_url(database)
        self._needs_owners = owners
        self._predecessor = predecessor
        self._logged: str = "" if predecessor is None else predecessor._logged
        """The last logged reason for which this process opened the database. It isn't logged twice in a row."""
        self._users: dict[Callable[[Exception], None], threading.Thread] = {}
        self._client: NexumClient
        self._listen = DEFAULT_LISTEN
        """The address that this process's server tries first."""
        self._uses_default_port = False
        """Whether the client uses the server on the default port, whichever database that server has open."""
        self._stop = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._restarts = Restarts()
        self._is_over = False
        self._keeping: asyncio.Task[None] | None = None
        self._thread = LoopThread("nexum")
        self._thread.loop.call_soon_threadsafe(self._begin, context=contextvars.Context())

    # ---- For the users, in any thread --------------------------------------------------------------------------------

    @classmethod
    def enter(cls, on_given_up: Callable[[Exception], None], *, owners: bool) -> Host:
        """Return the host of this folder's runs. The caller then waits for `ready`, and finally calls `leave`.

        `on_given_up` is called in the host's thread if the host gives up after too many restarts.
        """
        database = own_database()
        key = default_database_url() if database is None else os.path.realpath(database), owners
        with _lock:
            host = _hosts.get(key)
            if host is None or host._is_over or not host._users:
                host = _hosts[key] = cls(database, owners, host)
            host._users[on_given_up] = threading.current_thread()
        return host

    async def leave(self, on_given_up: Callable[[Exception], None]) -> None:
        """Stop using the host. The host's last user waits until the host has ended."""
        with _lock:
            del self._users[on_given_up]
            if self._users or self not in _hosts.values():
                return
        self._end()
        await asyncio.shield(asyncio.wrap_future(self.ended))
        self._thread.join()  # takes little time: the host has ended

    def _end(self) -> None:
        call_in(self._thread.loop, self._cancel)

    def end_at_exit(self) -> None:
        """Wait for the threads that use the host, as the interpreter does at its end. Then end the host's thread."""
        for thread in list(self._users.values()):
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        self._end()
        self._thread.join(EXIT_PATIENCE)

    # ---- In the host's thread ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._keeping = self._thread.loop.create_task(self._keep(), name="keep a server")
        self._keeping.add_done_callback(lambda _: self._ended())

    def _ended(self) -> None:
        self._thread.loop.stop()
        self.ended.set_result(None)

    def _cancel(self) -> None:
        assert self._keeping is not None  # `_begin` has run, because it was scheduled earlier
        self._keeping.cancel()

    async def _keep(self) -> None:
        try:
            if self._predecessor is not None:
                await asyncio.shield(asyncio.wrap_future(self._predecessor.ended))
                self._predecessor = None
            self._client = NexumClient()
            try:
                self.is_here = not await self._find()
                if self.is_here:
                    await self._turn_to_own()
                self.address = FoundAddress(self._client.address)
                self.chosen.set_result(None)
                if self.is_here and self._serving is None:
                    await self._open("")
                self.ready.set_result(None)
                await self._replace_what_vanishes()
            finally:
                self._stop.set()
                if self._serving is not None:
                    await asyncio.gather(self._serving, return_exceptions=True)
                await self._client.close()
        except Exception as error:  # noqa: BLE001 - the users get every error
            with _lock:
                self._is_over, users = True, list(self._users)
            if not self.ready.done():
                for future in (self.ready, self.chosen):
                    if not future.done():
                        future.set_exception(error)
                return
            for on_given_up in users:
                on_given_up(error)

    async def _find(self) -> bool:
        """Return whether a server for this folder's runs already answers."""
        try:
            info = await self._client.server_info()
        except (ServerUnavailable, NotANexumServer):
            return False
        if info is None and self._needs_owners:
            # Take a free port, because a published server has the default port. Even if both servers could listen on
            # that port, localhost would lead to only one of them.
            self._listen = ANY_PORT
            return False
        own, address = self._database, self._client.address
        self.is_published = info is None
        self._uses_default_port = address == DEFAULT_ADDRESS
        if not self._uses_default_port and own is not None:
            self._listen = read_address(own) or DEFAULT_LISTEN
        elif info is not None:
            _log.info("using the server on %s (database %s)", address, info.database)
        return True

    async def _turn_to_own(self) -> None:
        """Replace the client with a client for the server that has this folder's database open."""
        if self._database is None:
            # No file beside the database will name the server's address, so start the server first.
            await self._open("")
        await self._client.close()
        self._client = NexumClient(FoundAddress(self._listen) if self._database is None else str(self._database))

    async def _open(self, why: str) -> None:
        """Open the database in this process, unless another process opens it first.

        `why` is the reason that the log gives for the opening.
        """
        if is_forked():
            raise ServerUnavailable(
                "no Nexum server answers, and a forked process can't open the database itself: start a server with "
                "python -m nexum_engine, or start the process by spawn instead of fork"
            )
        loop = asyncio.get_running_loop()
        begun, is_explained = loop.time(), False
        self.is_here = True
        while True:
            try:
                await self._serve(why)
                return
            except (StoreLocked, ServerError):
                # Retry for PATIENCE seconds: the server that holds the database or the port may be ending.
                if loop.time() - begun > PATIENCE:
                    raise
                if loop.time() - begun > SLOW_START and not is_explained:
                    _log.info("waiting: another server may still have the database open")
                    is_explained = True
            with contextlib.suppress(ServerUnavailable, NotANexumServer):
                await self._client.ping()
                self.is_here = False
                why = f"{why}; " if why else ""
                _log.info("%sanother run has just opened the database: using its server", why)
                return
            await asyncio.sleep(RECONNECT_DELAY)

    async def _serve(self, why: str) -> None:
        """Open the database and listen. Raises StoreError, and ServerError if the port can't be used."""
        from nexum_engine.server import run_server  # slow to import, and not needed if a server is found

        listen = self._listen
        ready: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        serving = asyncio.create_task(
            run_server(
                listen,
                self._url,
                lease=DEFAULT_LEASE,
                stop=self._stop,
                else_free_port=not self._uses_default_port,
                embedded=True,
                on_ready=lambda *opened: ready.set_result(opened),
            ),
            name="serve",
        )
        self._serving = serving
        watched: set[asyncio.Future[Any]] = {serving, ready}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            self._serving = None
            serving.result()
        self._listen, database = ready.result()
        if not why:
            why = f"no server on {DEFAULT_ADDRESS}" if self._listen == listen else f"{DEFAULT_ADDRESS} is in use"
        where = "" if self._listen == DEFAULT_LISTEN else f" and listens on {self._listen}"
        if why != self._logged:
            _log.info("%s: this program opened the database%s (%s)", why, where, database)
        self._logged = why

    async def _replace_what_vanishes(self) -> None:
        silent = 0
        while True:
            if self._serving is not None:
                await asyncio.wait({self._serving})
                error = self._serving.exception()
                self._serving = None
                await self._restart(f"the server in this program ended ({error})")
                continue
            await asyncio.sleep(WATCH_INTERVAL)
            try:
                await self._client.ping()
                silent = 0
            except ServerUnavailable:
                silent += 1
                if silent >= 2:
                    silent = 0
                    await self._restart("the server does not answer")

    async def _restart(self, why: str) -> None:
        self._restarts.count("the server")
        try:
            await self._open(why)
        except NexumError as error:
            _log.warning("%s; retrying", error)


# ---- The hosts of this process ---------------------------------------------------------------------------------------

_hosts: dict[tuple[str, bool], Host] = {}
_lock = threading.Lock()


def _end_at_exit() -> None:
    for host in list(_hosts.values()):
        host.end_at_exit()


# End the hosts that a program has left open. The last registered hook runs first, so this one runs before the hook of
# concurrent.futures, which ends the server's executor. A function registered with `atexit` would run too late.
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(_end_at_exit)


@in_forked_process
def _forget_hosts() -> None:
    """Forget the hosts: a forked process doesn't have their threads."""
    global _hosts, _lock
    never_free(_hosts)  # SQLite would close a connection, and delete a log that the parent process still needs
    _hosts, _lock = {}, threading.Lock()
