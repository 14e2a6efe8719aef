"""A TCP proxy, for proxies that count or disturb what passes."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import TypeVar

TO_SERVER, TO_CLIENT = "to the server", "to the client"
DIRECTIONS = (TO_SERVER, TO_CLIENT)
P = TypeVar("P", bound="Proxy")


class Proxy:
    """A proxy in a thread. `upstream` is the server's HOST:PORT, or the path of its Unix socket."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._writers: dict[asyncio.StreamWriter, str] = {}
        """The direction of each open writer."""
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections of clients are open."""
        return len(self._writers) // 2

    @property
    def is_used(self) -> bool:
        """Whether a client is connected."""
        return self.connections > 0

    async def before_sending(self, writer: asyncio.StreamWriter, direction: str, chunk: bytes) -> None:
        """Do something with data before it is sent through `writer`. A subclass may override this.

        `chunk` is empty at the end of the data.
        """

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
        self._writers |= {writer: TO_CLIENT, server_writer: TO_SERVER}
        await asyncio.gather(self._pump(reader, server_writer, TO_SERVER), self._pump(server_reader, writer, TO_CLIENT))
        del self._writers[writer], self._writers[server_writer]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        try:
            with suppress(OSError):  # one end has closed the connection
                while chunk := await reader.read(65536):
                    await self.before_sending(writer, direction, chunk)
                    writer.write(chunk)
                    await writer.drain()
            await self.before_sending(writer, direction, b"")
        finally:
            writer.close()

    def __enter__(self: P) -> P:
        """Run the proxy in a thread for the length of a `with`."""

        async def listen() -> None:
            listener = await asyncio.start_server(self._connect, "127.0.0.1", 0)
            self.port = listener.sockets[0].getsockname()[1]

        self._thread.start()
        asyncio.run_coroutine_threadsafe(listen(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
