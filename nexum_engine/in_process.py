"""The servers that run in this process, and the channel that calls one of them without gRPC.

A server has a thread and an event loop of its own. A call goes to that event loop and back.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from nexum_engine.wire.status import rpc_error

_ENDED = "the server in this process has ended"


class LocalServer(Protocol):
    """A server in this process. Its coroutines run in its event loop, and raise grpc.aio.AioRpcError."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    async def call(self, method: str, request: bytes, metadata: Sequence[Any]) -> Message:
        """Answer a unary call. Nobody else may hold the answer."""

    async def stream(
        self, method: str, requests: AsyncIterator[Message], metadata: Sequence[Any], answer: Callable[[Message], None]
    ) -> None:
        """Call `answer` with each answer of a stream, until the stream is over."""


_servers: dict[str, LocalServer] = {}


def server_at(target: str) -> LocalServer | None:
    """Return this process's server that listens on HOST:PORT, or None."""
    return _servers.get(target)


@contextmanager
def listed(target: str, server: LocalServer) -> Iterator[None]:
    """List a server for the length of a `with`: the clients in this process then call it without gRPC."""
    _servers[target] = server
    try:
        yield
    finally:
        _servers.pop(target, None)


class InProcessChannel:
    """A channel with the methods of `grpc.aio.Channel` that this project's calls need.

    Its calls raise `grpc.aio.AioRpcError`, as those of `grpc.aio` do.
    """

    def __init__(self, server: LocalServer) -> None:
        self._server = server

    async def close(self) -> None:
        """Do nothing: the calls of this channel share nothing."""

    def unary_unary(
        self, path: str, *, request_serializer: Callable[[Any], bytes], **_: object
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Return a function that makes one call of the method."""
        server, method = self._server, path.rpartition("/")[2]

        async def call(request: Any, *, timeout: float | None = None, metadata: Sequence[Any] = ()) -> Any:
            answering = _submit(server.call(method, request_serializer(request), metadata), server.loop)
            try:
                await asyncio.wait({answering}, timeout=timeout)
            finally:
                answering.cancel()  # does nothing if there is an answer
            if answering.cancelled():
                raise rpc_error(grpc.StatusCode.UNAVAILABLE, _ENDED)
            if not answering.done():
                raise rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            return answering.result()

        return call

    def stream_stream(self, path: str, **_: object) -> Callable[..., InProcessStream]:
        """Return a function that opens a stream of the method."""
        server, method = self._server, path.rpartition("/")[2]

        def call(*, metadata: Sequence[Any] = ()) -> InProcessStream:
            return InProcessStream(server, method, metadata)

        return call


class InProcessStream:
    """An open stream, with the methods of `grpc.aio.StreamStreamCall` that the heartbeat needs."""

    def __init__(self, server: LocalServer, method: str, metadata: Sequence[Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server_loop = server.loop
        self._requests: asyncio.Queue[Message] = asyncio.Queue()  # of the server's loop
        self._answers: asyncio.Queue[Message | None] = asyncio.Queue()
        self._serving = _submit(server.stream(method, self._incoming(), metadata, self._answer), server.loop)
        self._serving.add_done_callback(lambda _: self._answers.put_nowait(None))

    async def _incoming(self) -> AsyncIterator[Message]:
        while True:
            yield await self._requests.get()

    def _answer(self, answer: Message) -> None:
        self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call `callback` when the stream is over."""
        self._serving.add_done_callback(callback)

    def cancel(self) -> None:
        """End the stream."""
        self._serving.cancel()

    async def write(self, request: Message) -> None:
        """Send a request. Raises asyncio.InvalidStateError if the stream is over."""
        try:
            self._server_loop.call_soon_threadsafe(self._requests.put_nowait, request)
        except RuntimeError as error:
            raise asyncio.InvalidStateError("the stream is over") from error

    async def read(self) -> Any:
        """Return the next answer, or grpc.aio.EOF. Raises grpc.aio.AioRpcError if the stream broke."""
        answer = await self._answers.get()
        if answer is not None:
            return answer
        self._answers.put_nowait(None)  # for the next call of `read`
        if self._serving.cancelled():
            raise rpc_error(grpc.StatusCode.UNAVAILABLE, _ENDED)
        self._serving.result()
        return grpc.aio.EOF


def _submit(work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
    """Run a coroutine in a server's event loop. It does not get the caller's context: it is not the caller's work."""
    try:
        submitted = contextvars.Context().run(asyncio.run_coroutine_threadsafe, work, loop)
    except RuntimeError as error:  # the loop is closed
        work.close()
        raise rpc_error(grpc.StatusCode.UNAVAILABLE, _ENDED) from error
    return asyncio.wrap_future(submitted)


def _after_fork() -> None:
    """Forget the servers: a forked process doesn't have their threads. It reaches them over TCP."""
    global _servers
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_servers))
    _servers = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
