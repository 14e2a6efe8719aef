"""The servers that run in this process, and the channel that calls one of them without gRPC.

A server has a thread and an event loop of its own. A call goes to that event loop and back.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from nexum_engine.event_loop import call_in
from nexum_engine.forks import in_forked_process, never_free
from nexum_engine.wire.status import rpc_error


class LocalServer(Protocol):
    """A server in this process. Its coroutines run in its event loop, and raise grpc.aio.AioRpcError."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    async def call(self, method: str, request: bytes, metadata: Sequence[Any]) -> Message:
        """Answer a unary call. The answer is a new message: the caller may change it."""

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
    """Inside a `with` block, let the clients in this process call the server at `target` without gRPC."""
    _servers[target] = server
    try:
        yield
    finally:
        _servers.pop(target, None)


class InProcessChannel:
    """A channel with the methods of `grpc.aio.Channel` that this project's calls need.

    Its calls raise `grpc.aio.AioRpcError`, as calls of `grpc.aio` do.
    """

    def __init__(self, server: LocalServer) -> None:
        self._server = server

    async def close(self) -> None:
        """Do nothing: a channel to a server in this process has no connection."""

    def unary_unary(
        self, path: str, *, request_serializer: Callable[[Any], bytes], **_: object
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Return a function that calls the RPC `path`."""
        server, method = self._server, path.rpartition("/")[2]

        async def call(request: Any, *, timeout: float | None = None, metadata: Sequence[Any] = ()) -> Any:
            answering = _Exchange(server.loop, partial(server.call, method, request_serializer(request), metadata))
            timer = None if timeout is None else asyncio.get_running_loop().call_later(timeout, answering.time_out)
            try:
                return await answering.outcome
            finally:
                if timer is not None:
                    timer.cancel()
                answering.cancel()

        return call

    def stream_stream(self, path: str, **_: object) -> Callable[..., InProcessStream]:
        """Return a function that opens a stream of the RPC `path`."""
        server, method = self._server, path.rpartition("/")[2]

        def call(*, metadata: Sequence[Any] = ()) -> InProcessStream:
            return InProcessStream(server, method, metadata)

        return call


class InProcessStream:
    """An open stream, with the methods of `grpc.aio.StreamStreamCall` that the heartbeat needs."""

    def __init__(self, server: LocalServer, method: str, metadata: Sequence[Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server_loop = server.loop
        self._requests: asyncio.Queue[Message] = asyncio.Queue()  # used in the server's event loop only
        self._answers: asyncio.Queue[Message | None] = asyncio.Queue()
        self._serving = _Exchange(server.loop, partial(server.stream, method, self._incoming(), metadata, self._answer))
        self._serving.outcome.add_done_callback(lambda _: self._answers.put_nowait(None))

    async def _incoming(self) -> AsyncIterator[Message]:
        while True:
            yield await self._requests.get()

    def _answer(self, answer: Message) -> None:
        call_in(self._loop, self._answers.put_nowait, answer)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call `callback` when the stream is over."""
        self._serving.outcome.add_done_callback(callback)

    def cancel(self) -> None:
        """End the stream."""
        self._serving.cancel()
        self._serving.outcome.cancel()

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
        await self._serving.outcome
        return grpc.aio.EOF


class _Exchange:
    """A coroutine in a server's event loop, whose outcome is a future in the caller's event loop."""

    def __init__(self, server_loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server_loop = server_loop
        self._task: asyncio.Task[Any] | None = None
        self.outcome: asyncio.Future[Any] = self._loop.create_future()
        """The result of the coroutine, or grpc.aio.AioRpcError."""
        # Run the coroutine without the caller's context variables: the server's work is not part of the caller's work.
        self._in_server_loop(lambda: self._begin(work))

    def _in_server_loop(self, callback: Callable[[], None]) -> None:
        try:
            self._server_loop.call_soon_threadsafe(callback, context=contextvars.Context())
        except RuntimeError:  # the loop is closed
            self._fail(grpc.StatusCode.UNAVAILABLE, "the server in this process has ended")

    def _begin(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._task = self._server_loop.create_task(work())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()  # read the error even if the caller has gone
        call_in(self._loop, self._deliver, task, error)

    def _deliver(self, task: asyncio.Task[Any], error: BaseException | None) -> None:
        if task.cancelled():
            self._fail(grpc.StatusCode.UNAVAILABLE, "the server in this process has ended")
        elif not self.outcome.done():
            self.outcome.set_result(task.result()) if error is None else self.outcome.set_exception(error)

    def _fail(self, code: grpc.StatusCode, details: str) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(rpc_error(code, details))

    def _cancel(self) -> None:
        assert self._task is not None  # `_begin` has run, because it was scheduled earlier
        self._task.cancel()

    def time_out(self) -> None:
        """End the wait for the outcome. Call this, and `cancel`, in the caller's event loop."""
        self._fail(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def cancel(self) -> None:
        """Cancel the coroutine if it still runs."""
        if self.outcome.done() and not self.outcome.cancelled():
            self.outcome.exception()  # mark the error as retrieved: the caller may have been cancelled meanwhile
        if self._task is None or not self._task.done():
            self._in_server_loop(self._cancel)


@in_forked_process
def _forget_servers() -> None:
    """Forget the servers: a forked process doesn't have their threads, and calls them over TCP."""
    global _servers
    never_free(_servers)
    _servers = {}
