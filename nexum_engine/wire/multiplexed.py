"""A gRPC channel that makes many calls over one stream, because an RPC for each call costs more.

A call with a large request is made as an RPC of its own. So is every call to a server without the RPC `Calls`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.frames import CALLS, OPENED, take_batch
from nexum_engine.wire.status import CODE_OF_NUMBER, CUT_OFF, rpc_error, trailing_metadata

MAX_STREAMED_BYTES = 16 * 1024
"""The largest request that is sent on the stream. A larger one would delay the other calls."""
END_REPORT = 0.05  # seconds to wait until grpcio reports the end of a stream
T = TypeVar("T")


class _NotOpened(Exception):
    """The stream could not be opened. No request was sent on it."""

    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__(code.name)
        self.code = code


class MultiplexedChannel:
    """A channel with the methods of `grpc.aio.Channel` that this project's calls need.

    Its calls go over the given `channel`, and `close` also closes that channel. The calls raise
    `grpc.aio.AioRpcError`, as calls of `grpc.aio` do. Create and use a MultiplexedChannel in one event loop.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._open = channel.stream_stream(
            CALLS, request_serializer=pb.CallFrames.SerializeToString, response_deserializer=pb.CallFrames.FromString
        )
        self.stream_stream = channel.stream_stream
        self._stream: _Stream | None = None
        self._has_calls = True

    async def close(self) -> None:
        """Close the connection. Calls that are under way fail."""
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close()

    def unary_unary(
        self,
        path: str,
        *,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], T],
        **options: Any,
    ) -> Callable[..., Coroutine[Any, Any, T]]:
        """Return a function that calls the RPC `path`."""
        alone = self._channel.unary_unary(
            path, request_serializer=lambda data: data, response_deserializer=response_deserializer, **options
        )
        method = path.rpartition("/")[2]

        async def call(request: Any, *, timeout: float | None = None, metadata: Sequence[Any] = ()) -> T:
            data = request_serializer(request)
            if self._has_calls and len(data) <= MAX_STREAMED_BYTES:
                if self._stream is None or self._stream.is_over:
                    self._stream = _Stream(self._open(metadata=metadata))
                try:
                    return response_deserializer(await self._stream.call(method, data, timeout))
                except DecodeError as error:
                    raise rpc_error(grpc.StatusCode.UNKNOWN, f"its answer is malformed: {error}") from error
                except _NotOpened as error:
                    # Make the call as an RPC of its own. If that RPC fails too, its error says why.
                    self._has_calls = error.code is not grpc.StatusCode.UNIMPLEMENTED
            answer: T = await alone(data, timeout=timeout, metadata=metadata)
            return answer

        return call


class _Stream:
    """One open stream. When it breaks, its calls fail with the status of the stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._calls: dict[int, tuple[asyncio.Future[bytes], list[bytes]]] = {}
        """The calls that wait for their answers, with the parts of the answers that have arrived."""
        self._last = 0
        self._unsent: list[pb.CallFrame] = []
        self._has_unsent = asyncio.Event()
        self._is_open = asyncio.Event()
        self.is_over = False
        self._is_closing = False
        self._is_writing = True
        # Run the tasks without the caller's context variables: the stream outlives the call that opens it.
        context = contextvars.Context()
        self._writing = context.run(asyncio.create_task, self._write(), name="write calls")
        self._reading = context.run(asyncio.create_task, self._read(), name="read answers of calls")

    async def close(self) -> None:
        self._is_closing = True
        self._end_writing()
        ending: set[asyncio.Future[None]] = {self._reading, self._writing}
        await asyncio.wait({self._writing}, timeout=END_REPORT)
        if self._writing.done() and self._is_open.is_set() and not self.is_over:
            # Let the server end the stream: this is faster than `_cancel_stream`.
            ending.add(asyncio.ensure_future(self._stream.done_writing()))
            await asyncio.wait({self._reading}, timeout=END_REPORT)
        if not self.is_over:
            await self._cancel_stream()
        # Wait for the end of each operation, even of those that grpcio reports after the end of the stream.
        await asyncio.gather(*ending, return_exceptions=True)

    def _end_writing(self) -> None:
        """Make the task `_write` end. While the task sends a message, don't cancel it: that would cancel the stream."""
        self._is_writing = False
        self._has_unsent.set()
        if not self._is_open.is_set():
            self._writing.cancel()

    async def _cancel_stream(self) -> None:
        """Cancel the stream, and give grpcio time to tell this event loop that the stream has ended.

        grpcio has nothing to await for that, so sleep for a short time. If the loop were closed earlier, grpcio would
        print a traceback in another event loop.
        """
        self._stream.cancel()
        await asyncio.sleep(END_REPORT)

    async def call(self, method: str, data: bytes, timeout: float | None) -> bytes:
        """Make a call, and return its encoded answer. Raises AioRpcError, _NotOpened."""
        self._last += 1
        number = self._last
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        self._calls[number] = answer, []
        timer = None if timeout is None else loop.call_later(timeout, self._time_out, answer)
        self._send(pb.CallFrame(call=number, method=method, message=data))
        try:
            return await answer
        finally:
            if timer is not None:
                timer.cancel()
            if self._calls.pop(number, None) is not None and not self.is_over:
                self._send(pb.CallFrame(call=number, cancel=True))

    def _time_out(self, answer: asyncio.Future[bytes]) -> None:
        if not answer.done():
            answer.set_exception(rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _send(self, frame: pb.CallFrame) -> None:
        self._unsent.append(frame)
        self._has_unsent.set()

    async def _write(self) -> None:
        """Send the frames. Frames that are ready at the same time share a message."""
        await self._is_open.wait()
        with contextlib.suppress(asyncio.InvalidStateError, grpc.RpcError):  # `_read` gets the reason
            while True:
                await self._has_unsent.wait()
                if not self._is_writing:
                    return
                frames = take_batch(self._unsent)
                if not self._unsent:
                    self._has_unsent.clear()
                await self._stream.write(pb.CallFrames(frames=frames))

    async def _read(self) -> None:
        """Give the calls their answers until the stream is over."""
        code, details = grpc.StatusCode.UNAVAILABLE, "the server ended the stream of calls"
        try:
            # Wait for the initial metadata before the first request: if the server refuses the stream while a request
            # is being sent, grpcio loses the server's status.
            if OPENED in tuple(await self._stream.initial_metadata()):
                self._is_open.set()
            while (frames := await self._stream.read()) is not grpc.aio.EOF:
                for frame in frames.frames:
                    self._receive(frame)
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
            if details == CUT_OFF and self._is_open.is_set():
                code = grpc.StatusCode.UNAVAILABLE  # the connection broke while a request was being sent
        except asyncio.CancelledError:
            code, details = grpc.StatusCode.CANCELLED, "the connection was closed"
            # Nobody has called `close`: for example, asyncio.run is ending, and cancels all tasks.
            if not self._is_closing:
                await self._cancel_stream()
            raise
        finally:
            self.is_over = True
            self._end_writing()
            calls, self._calls = self._calls, {}
            for answer, _ in calls.values():
                if not answer.done():
                    answer.set_exception(rpc_error(code, details) if self._is_open.is_set() else _NotOpened(code))

    def _receive(self, frame: pb.CallFrame) -> None:
        if frame.call not in self._calls:
            return  # the caller was cancelled, or has reached its time limit
        answer, parts = self._calls[frame.call]
        parts.append(frame.message)
        if frame.more:
            return
        del self._calls[frame.call]
        if answer.done():
            return
        if frame.status:
            trailing = grpc.aio.Metadata(*trailing_metadata(frame.error, frame.retry_after_ms))
            code = CODE_OF_NUMBER.get(frame.status, grpc.StatusCode.UNKNOWN)
            answer.set_exception(rpc_error(code, frame.details, trailing))
        else:
            answer.set_result(b"".join(parts) if len(parts) > 1 else frame.message)
