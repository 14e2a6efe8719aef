"""A gRPC channel in pure Python, for forked processes and for heartbeats.

The core of grpcio works in threads. A fork copies their state but not the threads, so grpcio hangs in the child, or
ends it with a segmentation fault. grpclib has no threads.

Heartbeats have an event loop of their own. All event loops of a process share one queue of grpcio: if the heartbeats
used grpcio, too, each answer of a call would wake both loops, and often reach the caller's loop by way of the other one.
A call through a worker took 6 % longer. (Heartbeats with TLS, or to a name such as localhost, do use grpcio.)
"""

from __future__ import annotations

import asyncio
import contextvars
import ssl
from asyncio import BaseTransport
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import grpclib.client
from google.protobuf.message import DecodeError
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.protocol import H2Protocol

from nexum_engine.wire.status import ANSWERED, CODE_OF_NUMBER, RETRY_AFTER, rpc_error

Serialize = Callable[[Any], bytes]
Deserialize = Callable[[bytes], Any]
_Stream = grpclib.client.Stream[bytes, bytes]


class _Codec(CodecBase):
    """A codec that passes bytes through unchanged: the stub serializes the messages."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


class _Protocol(H2Protocol):
    """grpclib's HTTP/2, for servers of all kinds: another program may listen on the server's port."""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        # Ignore the events that grpclib doesn't know, such as a frame of an unknown type.
        self.processor.processors = defaultdict(lambda: _ignore, self.processor.processors)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except Exception as error:  # noqa: BLE001 - the event loop would log the error with a traceback
            self.processor.close(f"the server's answer is malformed: {error}")


def _ignore(_: object) -> None:
    """Do nothing."""


class _Connection(grpclib.client.Channel):
    def _protocol_factory(self) -> H2Protocol:
        return _Protocol(grpclib.client.Handler(), self._config, self._h2_config)

    def __del__(self) -> None:
        """Don't report an open connection: when the process ends, the operating system closes it."""


class PurePythonChannel:
    """A channel with the methods of `grpc.aio.Channel` that this project's calls need.

    Its calls raise `grpc.aio.AioRpcError`, as calls of `grpc.aio` do. Create it in an event loop.
    """

    def __init__(self, target: str, tls: ssl.SSLContext | None) -> None:
        host, _, port = target.rpartition(":")
        self._connection = _Connection(host.strip("[]"), int(port), codec=_Codec(), ssl=tls)

    async def close(self) -> None:
        """Close the connection. Calls that are under way fail."""
        self._connection.close()

    def unary_unary(
        self, path: str, *, request_serializer: Serialize, response_deserializer: Deserialize, **_: object
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Return a function that calls the RPC `path`."""
        method = grpclib.client.UnaryUnaryMethod[bytes, bytes](self._connection, path, bytes, bytes)

        async def exchange(stream: _Stream, request: bytes) -> Any:
            with _as_rpc_errors(stream):
                async with stream:
                    await stream.send_message(request, end=True)
                    answer = await stream.recv_message()
                if answer is None:
                    raise StreamTerminatedError("the server sent no answer")
                return response_deserializer(answer)

        async def call(request: Any, *, timeout: float | None = None, metadata: Sequence[Any] = ()) -> Any:
            stream = method.open(timeout=timeout, metadata=metadata)
            return await _in_own_context(exchange(stream, request_serializer(request)))

        return call

    def stream_stream(
        self, path: str, *, request_serializer: Serialize, response_deserializer: Deserialize, **_: object
    ) -> Callable[..., PurePythonStream]:
        """Return a function that opens a stream of the RPC `path`."""
        method = grpclib.client.StreamStreamMethod[bytes, bytes](self._connection, path, bytes, bytes)

        def call(*, metadata: Sequence[Any] = ()) -> PurePythonStream:
            return PurePythonStream(method.open(metadata=metadata), request_serializer, response_deserializer)

        return call


class PurePythonStream:
    """An open stream, with the methods of `grpc.aio.StreamStreamCall` that the heartbeat needs."""

    def __init__(self, stream: _Stream, serialize: Serialize, deserialize: Deserialize) -> None:
        self._stream = stream
        self._serialize, self._deserialize = serialize, deserialize
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._is_open = asyncio.Event()
        self._reading = _in_own_context(self._read_all())
        # Mark the error of `_read_all` as retrieved: if this process closes the stream, nobody reads the error.
        self._reading.add_done_callback(lambda reading: reading.cancelled() or reading.exception())

    async def _read_all(self) -> None:
        try:
            with _as_rpc_errors(self._stream):
                async with self._stream:
                    await self._stream.send_request()
                    self._is_open.set()
                    async for answer in self._stream:
                        self._answers.put_nowait(answer)
                    await self._stream.end()
        except grpc.RpcError:
            if not self._has_ended_well():
                raise
        finally:
            self._is_open.set()
            self._answers.put_nowait(None)

    def _has_ended_well(self) -> bool:
        """Return whether the server has ended the stream without an error. It may close the connection right then."""
        opened = getattr(self._stream, "_stream", None)
        return opened is not None and dict(opened.trailers or ()).get("grpc-status") == "0"

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call `callback` when the stream is over."""
        self._reading.add_done_callback(callback)

    def cancel(self) -> None:
        """End the stream."""
        self._reading.cancel()

    async def write(self, request: Any) -> None:
        """Send a request. Raises asyncio.InvalidStateError if the stream is over."""
        data = self._serialize(request)
        await self._is_open.wait()
        if self._reading.done():
            raise asyncio.InvalidStateError("the stream is over")
        try:
            await self._stream.send_message(data)
        except Exception as error:
            raise asyncio.InvalidStateError("the stream is over") from error

    async def read(self) -> Any:
        """Return the next answer, or grpc.aio.EOF. Raises grpc.aio.AioRpcError if the stream broke."""
        answer = await self._answers.get()
        if answer is None:
            self._answers.put_nowait(None)  # for the next call of `read`
            await self._reading
            return grpc.aio.EOF
        with _as_rpc_errors(self._stream):
            return self._deserialize(answer)


def _in_own_context(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run `work` in a task without the caller's context variables: its connection is not part of the caller's work."""
    return contextvars.Context().run(asyncio.create_task, work)


@contextmanager
def _as_rpc_errors(stream: _Stream) -> Iterator[None]:
    try:
        yield
    except GRPCError as error:
        # Read the headers themselves: `trailing_metadata` has no keys that begin with "grpc-", and is None if the server
        # has ended the stream while a request was being sent.
        received = dict(stream._stream.trailers or stream._stream.headers or ())
        trailing = grpc.aio.Metadata(*((key, received[key]) for key in (ANSWERED, RETRY_AFTER) if key in received))
        raise rpc_error(CODE_OF_NUMBER[error.status.value], error.message or "", trailing) from error
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from error
    except DecodeError as error:
        raise rpc_error(grpc.StatusCode.UNKNOWN, f"its answer is malformed: {error}") from error
    except (OSError, StreamTerminatedError) as error:
        raise rpc_error(grpc.StatusCode.UNAVAILABLE, str(error)) from error
    except Exception as error:
        # grpclib raises errors of any class if a connection breaks while it opens, and for malformed answers.
        details = f"the connection broke, or the answer is malformed: {type(error).__name__}"
        raise rpc_error(grpc.StatusCode.UNAVAILABLE, details) from error
