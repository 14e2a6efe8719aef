"""A TCP proxy with faults: it breaks connections, and holds back or delays what is sent in one or both directions."""

from __future__ import annotations

import asyncio
from urllib.parse import quote, unquote

from proxy import DIRECTIONS, Proxy


class FaultyProxy(Proxy):
    """A running proxy. Its methods may be called from any thread."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self._open = {direction: asyncio.Event() for direction in DIRECTIONS}
        for opened in self._open.values():
            opened.set()
        self._forgotten: set[asyncio.StreamWriter] = set()
        self._remembered = asyncio.Event()
        self._delay = 0.0
        self.hits = 0
        """The number of connections that were broken, and of times that data was held back or delayed."""

    def break_connections(self, *directions: str) -> None:
        """Reset every open connection, or only its halves in these directions."""

        async def reset() -> None:
            for writer, direction in list(self._writers.items()):
                if direction in (directions or DIRECTIONS) and not writer.is_closing():
                    self.hits += 1
                    writer.transport.abort()

        asyncio.run_coroutine_threadsafe(reset(), self._loop).result()

    def hold(self, *directions: str) -> None:
        """Send nothing in these directions until `release`, as a partition of the network does.

        If one end closes or resets a connection meanwhile, the other end doesn't notice.
        """
        for direction in directions:
            self._loop.call_soon_threadsafe(self._open[direction].clear)

    def forget_connections(self) -> None:
        """Pass on nothing more of the open connections until `release`, as a firewall that has forgotten them."""

        async def forget() -> None:
            self._forgotten.update(self._writers)

        asyncio.run_coroutine_threadsafe(forget(), self._loop).result()

    def delay(self, seconds: float) -> None:
        """Delay all data. Connections don't wait for each other, so data of one can overtake data of another."""
        self._delay = seconds

    def release(self) -> None:
        """Undo `hold`, `forget_connections` and `delay`: pass on all data at once."""
        self._delay = 0.0
        for opened in (*self._open.values(), self._remembered):
            self._loop.call_soon_threadsafe(opened.set)

    async def before_sending(self, writer: asyncio.StreamWriter, direction: str, chunk: bytes) -> None:
        if self._delay:
            self.hits += 1
            await asyncio.sleep(self._delay)
        if not self._open[direction].is_set():
            self.hits += 1
            await self._open[direction].wait()
        if writer in self._forgotten:
            self.hits += 1
            await self._remembered.wait()


def postgres_proxy(url: str) -> tuple[FaultyProxy, str]:
    """Return a proxy for the PostgreSQL at `url`, and the proxy's URL, in which `{port}` stands for its port."""
    import psycopg.conninfo

    given = psycopg.conninfo.conninfo_to_dict(url)
    host, port = unquote(str(given.get("host") or "")), given.get("port") or 5432
    upstream = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else f"{host}:{port}"
    options = f"?options={quote(str(given['options']))}" if given.get("options") else ""
    return FaultyProxy(upstream), f"postgresql://{given['user']}@127.0.0.1:{{port}}/{given['dbname']}{options}"
