"""Answer the calls that clients make on `Calls` streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping
from typing import Any, NoReturn

import grpc

from nexum_engine.errors import InvalidRequest, Overloaded
from nexum_engine.server.bounds import MAX_SHOWN_METHOD, MAX_STREAM_CALLS, Budget, Received, Rpc
from nexum_engine.server.refusal import Refused
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.frames import take_batch
from nexum_engine.wire.status import ANSWERED, RETRY_AFTER

PART_BYTES = 64 * 1024
"""The largest part of an answer. Small answers can be sent between the parts of a large one."""
RETRY_AFTER_MS = 1000  # when to retry a call that was refused because of the stream's limits
UNSENT_BYTES = 128 * 1024
"""How many bytes of answers a stream holds for its client. Further answers wait until the client has read some."""
ACK_DELAY = 0.01
"""How many seconds the answer to a worker's report may wait for another answer, such as the worker's next task.

Two answers in one message cost less than two messages. Only the answer to a report that came in one message with a poll
may wait: then nobody waits for it, because the worker has polled already.
"""
FRAME_BYTES = 256
"""The memory that a frame takes in addition to its content."""
_REPORTS = {"CompleteTask", "FailTask"}


class CallContext:
    """The context of a call on a stream. It has the methods of gRPC's context that the RPCs use."""

    def __init__(self, metadata: Any) -> None:
        self._metadata = metadata
        self._callbacks: list[Callable[[Any], None]] = []
        self.is_cancelled = False

    def invocation_metadata(self) -> Any:
        return self._metadata

    def cancelled(self) -> bool:
        return self.is_cancelled

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def end(self) -> None:
        """Run the callbacks of `add_done_callback`, because the call is over. Does nothing the second time."""
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        known = dict(trailing_metadata)
        raise Refused(code, details, known.get(ANSWERED, ""), int(known.get(RETRY_AFTER, 0)))


class CallStreams:
    """The open `Calls` streams of a server. `rpcs` are the RPCs that may be called on a stream, by name.

    At most `max_calls` calls run on all streams together.
    """

    def __init__(self, rpcs: Mapping[str, Rpc], max_calls: int) -> None:
        self.rpcs = rpcs
        self.free_slots = max_calls
        """How many more calls all streams together may run."""
        self._open: set[_Stream] = set()
        self._stopping = False

    async def serve(self, requests: AsyncIterable[pb.CallFrames], metadata: Any) -> AsyncGenerator[pb.CallFrames, None]:
        """Run the calls of one stream, and yield their answers.

        If the stream breaks, its calls are cancelled. Raises InvalidRequest for a malformed frame.
        """
        stream = _Stream(self, metadata)
        self._open.add(stream)
        if self._stopping:
            stream.finish()
        reading = asyncio.create_task(stream.read(requests))
        try:
            while frames := await stream.next_answers():
                yield pb.CallFrames(frames=frames)
            if reading.done():
                reading.result()
        finally:
            self._open.discard(stream)
            reading.cancel()
            stream.cancel_all()

    def stop(self) -> None:
        """Begin no further calls, and end each stream when its calls have been answered."""
        self._stopping = True
        for stream in self._open:
            stream.finish()


class _Stream:
    def __init__(self, all_streams: CallStreams, metadata: Any) -> None:
        self._all = all_streams
        self._metadata = metadata
        self._calls: dict[int, tuple[asyncio.Task[None], CallContext]] = {}
        self._unsent: list[pb.CallFrame] = []
        self._has_news = asyncio.Event()
        """Set when the unsent frames are to be sent, and when the stream may be over."""
        self._sending_later: asyncio.TimerHandle | None = None
        """The timer that sends an answer which may wait; None if no such answer waits."""
        self._room = Budget(UNSENT_BYTES)  # serves the calls in turn
        self._is_finishing = False

    async def read(self, requests: AsyncIterable[pb.CallFrames]) -> None:
        """Begin the calls that arrive, until the client ends the stream."""
        try:
            async for frames in requests:
                has_poll = any(frame.method == "PollTask" for frame in frames.frames)
                for frame in frames.frames:
                    if frame.cancel:
                        self._cancel(frame.call)
                    elif self._is_finishing:
                        continue
                    elif len(self._calls) < MAX_STREAM_CALLS and self._all.free_slots > 0:
                        self._begin(frame, may_wait=has_poll and frame.method in _REPORTS)
                    else:
                        # Wait here until the client reads: refusals that nobody reads must not pile up.
                        await self._send(_refusal(frame.call, _TOO_MANY_CALLS))
        except Exception:
            self.cancel_all()
            raise
        finally:
            self.finish()

    def _begin(self, frame: pb.CallFrame, *, may_wait: bool) -> None:
        if frame.call in self._calls:
            raise InvalidRequest(f"the stream already has a call with the number {frame.call}")
        context = CallContext(self._metadata)
        self._all.free_slots -= 1
        answering = asyncio.create_task(self._answer(frame, context, may_wait))
        self._calls[frame.call] = answering, context

    def _ended(self, call: int) -> None:
        _, context = self._calls.pop(call)
        self._all.free_slots += 1
        context.end()
        if self._is_finishing and not self._calls:
            self._has_news.set()

    def _cancel(self, call: int) -> None:
        if call in self._calls:
            answering, context = self._calls[call]
            context.is_cancelled = True
            # Cancel the task in the next turn, when it has begun: otherwise, it would not run its `finally`.
            asyncio.get_running_loop().call_soon(answering.cancel)

    def cancel_all(self) -> None:
        """Cancel the calls: nobody reads their answers."""
        for call in list(self._calls):
            self._cancel(call)

    def finish(self) -> None:
        """Begin no further calls. The stream is over when its calls have been answered."""
        self._is_finishing = True
        self._has_news.set()

    async def next_answers(self) -> list[pb.CallFrame]:
        """Wait for answers, and return those for the next message. Return an empty list when the stream is over."""
        while not (self._is_finishing and not self._calls):
            await self._has_news.wait()
            if self._unsent:
                break
            self._has_news.clear()
        frames = take_batch(self._unsent)
        if not self._unsent:
            self._has_news.clear()
        if self._sending_later is not None:
            self._sending_later.cancel()
            self._sending_later = None
        self._room.give(sum(map(_held_bytes, frames)))
        return frames

    async def _send(self, frame: pb.CallFrame, *, may_wait: bool = False) -> None:
        await self._room.take(_held_bytes(frame))
        self._unsent.append(frame)
        if not may_wait:
            self._has_news.set()
        elif self._sending_later is None:
            self._sending_later = asyncio.get_running_loop().call_later(ACK_DELAY, self._has_news.set)

    async def _answer(self, frame: pb.CallFrame, context: CallContext, may_wait: bool) -> None:
        try:
            try:
                if not context.is_cancelled:  # the call and its cancellation may come in one message
                    await self._run(frame, context, may_wait)
                return
            except Refused as refused:
                refusal = _refusal(frame.call, refused)
            except asyncio.CancelledError:
                if context.is_cancelled:
                    raise
                # `Answers.reserve` has cancelled this task. Tell the client, which may read again.
                refusal = _refusal(frame.call, _UNREAD)
            context.end()  # the refusal may wait long until the client reads, and needs none of the call's memory
            await self._send(refusal)
        finally:
            self._ended(frame.call)

    async def _run(self, frame: pb.CallFrame, context: CallContext, may_wait: bool) -> None:
        """Run a call, and send its answer in parts. Raises Refused."""
        rpc = self._all.rpcs.get(frame.method)
        if rpc is None:
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, f"no RPC {frame.method[:MAX_SHOWN_METHOD]!r}", "")
        answer = await rpc(Received(frame.message), context)
        message = answer.SerializeToString()
        for begin in range(0, len(message) or 1, PART_BYTES):
            end = begin + PART_BYTES
            part = pb.CallFrame(call=frame.call, message=message[begin:end], more=end < len(message))
            await self._send(part, may_wait=may_wait)


_TOO_MANY_CALLS = Refused(
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    "the stream or the server has reached its limit of calls: retry",
    Overloaded.__name__,
    RETRY_AFTER_MS,
)
_UNREAD = Refused(
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    "the answer was dropped, because it was not read in time: retry, and read answers sooner",
    Overloaded.__name__,
    RETRY_AFTER_MS,
)


def _refusal(call: int, refused: Refused) -> pb.CallFrame:
    return pb.CallFrame(
        call=call,
        status=refused.code.value[0],
        details=refused.details,
        error=refused.error,
        retry_after_ms=refused.retry_after_ms,
    )


def _held_bytes(frame: pb.CallFrame) -> int:
    return FRAME_BYTES + frame.ByteSize()
