"""A TCP proxy with faults: it breaks connections, and holds back or delays what is sent in one or both directions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, unquote

DIRECTIONS = ("to the server", "to the client")


class FaultyProxy:
    """A running proxy. Its methods may be called from any thread."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = {direction: asyncio.Event() for direction in DIRECTIONS}
        self._delay = 0.0
        self.port = 0
        self.broken = 0
        """The number of connections that were broken."""
        self.held = 0
        """The number of times that data was held back or delayed."""

    @property
    def is_used(self) -> bool:
        """Whether a client is connected."""
        return bool(self._writers)

    def break_connections(self) -> None:
        """Reset every open connection."""

        async def reset() -> None:
            for writer in list(self._writers):
                if not writer.is_closing():
                    self.broken += 1
                    writer.transport.abort()

        self._run(reset())

    def hold(self, *directions: str) -> None:
        """Send nothing in these directions until `release`, as a partition of the network does."""
        for direction in directions:
            self._loop.call_soon_threadsafe(self._open[direction].clear)

    def delay(self, seconds: float) -> None:
        """Delay all data. Connections don't wait for each other, so data of one can overtake data of another."""
        self._delay = seconds

    def release(self) -> None:
        """Undo `hold` and `delay`: pass on all data at once."""
        self._delay = 0.0
        for opened in self._open.values():
            self._loop.call_soon_threadsafe(opened.set)

    async def _listen(self) -> int:
        listener = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        for opened in self._open.values():
            opened.set()
        port: int = listener.sockets[0].getsockname()[1]
        return port

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._upstream.startswith("/"):
                server_reader, server_writer = await asyncio.open_unix_connection(self._upstream)
            else:
                host, _, port = self._upstream.rpartition(":")
                server_reader, server_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, server_writer}
        await asyncio.gather(
            self._pump(reader, server_writer, DIRECTIONS[0]), self._pump(server_reader, writer, DIRECTIONS[1])
        )
        self._writers -= {writer, server_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        try:
            while chunk := await reader.read(65536):
                if self._delay or not self._open[direction].is_set():
                    self.held += 1
                    await asyncio.sleep(self._delay)
                    await self._open[direction].wait()
                writer.write(chunk)
                await writer.drain()
        except OSError:
            pass  # one end has closed the connection
        finally:
            writer.close()

    def _run(self, work: object) -> object:
        assert asyncio.iscoroutine(work)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @contextmanager
    def running(self) -> Iterator[FaultyProxy]:
        """Run the proxy in a thread for the length of a `with`."""

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        thread = threading.Thread(target=self._loop.run_forever, name="faulty proxy")
        thread.start()
        try:
            port = self._run(self._listen())
            assert isinstance(port, int)
            self.port = port
            yield self
        finally:
            self._run(end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()


def postgres_proxy(url: str) -> tuple[FaultyProxy, str]:
    """Return a proxy for the PostgreSQL at `url`, and the URL of the proxy: it has {port} in place of the port."""
    import psycopg.conninfo

    given = psycopg.conninfo.conninfo_to_dict(url)
    host, port = unquote(str(given.get("host") or "")), given.get("port") or 5432
    upstream = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else f"{host}:{port}"
    options = f"?options={quote(str(given['options']))}" if given.get("options") else ""
    return FaultyProxy(upstream), f"postgresql://{given['user']}@127.0.0.1:{{port}}/{given['dbname']}{options}"
