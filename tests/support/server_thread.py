"""Servers in threads of the test's process, on real sockets. They start faster than processes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificates, private_file

from nexum_engine.event_loop import LoopThread
from nexum_engine.server import Limits, ServerTls, Tokens, run_server
from nexum_engine.server.bounds import DEFAULT_LIMITS

SOON = 20.0  # seconds


class ServerThread:
    """A running server and its address."""

    def __init__(
        self, database_url: str, listen: str, tls: ServerTls | None, tokens: Tokens | None, limits: Limits
    ) -> None:
        self._thread = LoopThread("server")

        async def start() -> str:
            started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            self._stop = asyncio.Event()
            self._serving = asyncio.create_task(
                run_server(
                    listen,
                    database_url,
                    lease=30,
                    stop=self._stop,
                    tls=tls,
                    tokens=tokens,
                    limits=limits,
                    on_ready=lambda address, _: started.set_result(address),
                )
            )
            watched: set[asyncio.Future[Any]] = {started, self._serving}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if self._serving.done():
                self._serving.result()
            return started.result()

        self.address = asyncio.run_coroutine_threadsafe(start(), self._thread.loop).result(SOON)
        self.port = int(self.address.rpartition(":")[2])

    def stop(self) -> None:
        async def stop() -> None:
            self._stop.set()
            await self._serving

        asyncio.run_coroutine_threadsafe(stop(), self._thread.loop).result(SOON)
        self._thread.loop.call_soon_threadsafe(self._thread.loop.stop)
        self._thread.join(SOON)


@contextmanager
def server_thread(
    folder: Path,
    *,
    listen: str = "127.0.0.1:0",
    tls: ServerTls | None = None,
    tokens: Tokens | None = None,
    limits: Limits = DEFAULT_LIMITS,
    database_url: str = "",
) -> Iterator[ServerThread]:
    """Run a server for the length of a `with`, by default on `folder`/nexum.db."""
    server = ServerThread(database_url or f"sqlite:///{folder / 'nexum.db'}", listen, tls, tokens, limits)
    try:
        yield server
    finally:
        server.stop()


def folders_of_one_database(parent: Path) -> tuple[Path, Path]:
    """Make the folders `one` and `two`, each with a copy of one new database.

    Clients take the servers of these folders for servers on one database.
    """
    one, two = parent / "one", parent / "two"
    one.mkdir()
    with server_thread(one):
        pass
    shutil.copytree(one, two)
    return one, two


class Secured:
    """A server that uses TLS and tokens and listens on all addresses, with the settings of its clients."""

    def __init__(self, server: ServerThread, certificates: Certificates) -> None:
        self.server = server
        self.certificates = certificates
        self.address = f"localhost:{server.port}"

    def env(self, token: str, **changes: str) -> dict[str, str]:
        return {"NEXUM_ADDRESS": self.address, "NEXUM_TLS_CA": self.certificates.ca, "NEXUM_TOKEN": token, **changes}


@contextmanager
def secured_server(folder: Path, tokens: str) -> Iterator[Secured]:
    """Run a server with TLS and these tokens."""
    certificates = Certificates(folder)
    known = Tokens(Path(private_file(folder / "tokens", tokens)))
    with server_thread(folder, listen="0.0.0.0:0", tls=certificates.server_tls(), tokens=known) as server:
        yield Secured(server, certificates)


def use(monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]) -> str:
    """Set the environment variables of a client; return the server's address."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env["NEXUM_ADDRESS"]
