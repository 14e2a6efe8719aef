"""The bare limit of a call: the same three processes and two commits as a durable call, without an engine.

The client and the worker each have one bidirectional stream to the server, with raw bytes. The server commits the start
of each call, passes the call to the worker, commits the result, and passes the result to the client.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from floor import ARGUMENT, RESULT, Plain, process, serve

SCRIPT = str(Path(__file__).resolve())
_CALLS, _WORK = "/benchmark.Bare/Calls", "/benchmark.Bare/Work"
_NUMBER = 8  # bytes; each message of a call begins with the call's number
_READY = b"ready"  # the worker's first message


class _Server(grpc.GenericRpcHandler):
    """Pass messages between one client and one worker."""

    def __init__(self, plain: Plain) -> None:
        self._plain = plain
        self._client: Any = None
        self._worker: Any = None
        self._callers: dict[bytes, bytes] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        calls = handler_call_details.method == _CALLS
        return grpc.stream_stream_rpc_method_handler(self._calls if calls else self._work)

    async def _calls(self, _requests: object, context: Any) -> None:
        self._client = context
        while (message := await context.read()) is not grpc.aio.EOF:
            number = self._plain.start().to_bytes(_NUMBER, "big")
            self._callers[number] = message[:_NUMBER]
            await self._worker.write(number + message[_NUMBER:])

    async def _work(self, _requests: object, context: Any) -> None:
        await context.read()
        self._worker = context
        await context.write(_READY)
        while (message := await context.read()) is not grpc.aio.EOF:
            number = message[:_NUMBER]
            self._plain.complete(int.from_bytes(number, "big"))
            await self._client.write(self._callers.pop(number) + message[_NUMBER:])


async def _work(address: str) -> None:
    """Run the worker: answer each call with the result."""
    async with grpc.aio.insecure_channel(address) as channel:
        stream: Any = channel.stream_stream(_WORK)()
        await stream.write(_READY)
        await stream.read()
        print("ready", flush=True)
        result = RESULT.encode()
        while (message := await stream.read()) is not grpc.aio.EOF:
            await stream.write(message[:_NUMBER] + result)


class BareLimit:
    """The client that makes the calls of the bare limit. No engine takes part in these calls."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._made = 0
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def call(self) -> None:
        """Make one call."""
        self._made += 1
        number = self._made.to_bytes(_NUMBER, "big")
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        async with self._writing:  # gRPC allows one write at a time
            await self._stream.write(number + ARGUMENT.encode())
        await answered

    async def _read(self) -> None:
        while (message := await self._stream.read()) is not grpc.aio.EOF:
            self._waiting.pop(message[:_NUMBER]).set_result(message[_NUMBER:])

    def close(self) -> None:
        """End the stream."""
        self._reader.cancel()
        self._stream.cancel()


@asynccontextmanager
async def open_bare_limit(folder: Path) -> AsyncIterator[BareLimit]:
    """Run the server and the worker for the length of a `with`; yield the client."""
    async with (
        process([SCRIPT, "serve", str(folder / "bare.db")], cwd=folder) as server,
        process([SCRIPT, "work", server.address], cwd=folder),
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        client = BareLimit(channel.stream_stream(_CALLS)())
        try:
            yield client
        finally:
            client.close()


if __name__ == "__main__":
    what, where = sys.argv[1:]
    asyncio.run(_work(where) if what == "work" else serve(_Server(Plain(Path(where)))))
