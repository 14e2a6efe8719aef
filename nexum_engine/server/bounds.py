"""Limits on the memory that calls use: the size of each request, and the total size of requests and unread answers.

Only a few requests are read at the same time, because gRPC holds each of them in memory. Each request or answer above
SMALL_BYTES takes a share of a budget. If the budget is used up, calls wait for their shares in order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError, Message

from nexum_engine import DEFAULT_MAX_CALLS, DEFAULT_MAX_QUEUE
from nexum_engine.errors import InvalidRequest, Overloaded, TooLarge
from nexum_engine.jsontext import MAX_PAYLOAD_BYTES
from nexum_engine.server.refusal import Context, abort
from nexum_engine.wire import nexum_pb2 as pb

MAX_RPCS = 10_000
"""The largest number of RPCs at the same time. A stream is one RPC."""
MAX_STREAM_CALLS = 10_000
"""The largest number of calls on one stream at the same time. Calls that wait count."""
MAX_SHOWN_METHOD = 100
"""How many characters of an unknown RPC's name are logged, or repeated in an error."""
SMALL_BYTES = 16 * 1024
"""The size up to which a request or an answer needs no share of a budget."""
MAX_SMALL_REQUEST_BYTES = 256 * 1024  # the largest request without a payload
MAX_REQUEST_BYTES = MAX_PAYLOAD_BYTES + 1024 * 1024
"""The largest request with a payload.

It is above the limit of a payload, so that a slightly too large payload gets the clearer error of the payload's check.
"""
PAYLOAD_READERS, READERS = 12, 24
"""How many requests with a payload, and how many requests without one, are read at the same time."""
READ_PATIENCE = 1.0  # seconds that a request may take to arrive while other requests wait
REQUEST_BUDGET = 192 * 1024 * 1024  # bytes of memory for all requests above SMALL_BYTES
REQUEST_COPIES = 6
"""A request takes this many times its size in memory: as a message, as text, parsed, and as a parameter of SQL."""
MAX_WAITING_REQUESTS = REQUEST_COPIES * 64 * 1024 * 1024
"""The memory, in bytes, that all waiting requests together may need.

Waiting requests are limited, too, because they are in memory already.
"""
ANSWER_BUDGET = 256 * 1024 * 1024  # bytes of memory for all answers above SMALL_BYTES
ANSWER_COPIES = 3  # an answer takes this many times its size in memory
ANSWER_PATIENCE = 5.0  # seconds to wait for a share of the answers' budget
ANSWER_TIMEOUT = 30.0  # seconds for a client to read a large answer

_SERVICE = pb.DESCRIPTOR.services_by_name["NexumService"]
SERVICE_NAME = _SERVICE.full_name
_WITH_PAYLOAD = {
    "RegisterWorkflow",
    "StartExecution",
    "CompleteTask",
    "FailTask",
    "SendEvent",
    "ApproveTask",
    "ResolveNode",
}
_OVERLOADED = (
    "other calls use all the memory that the server may use for calls: retry, and end clients that don't read answers"
)
Rpc = Callable[["Received", Any], Awaitable[Message]]
"""A unary RPC. It takes the encoded request and the call's context."""


@dataclass(frozen=True)
class Limits:
    """The limits that are options of a server."""

    calls: int = DEFAULT_MAX_CALLS
    """The largest number of calls on all streams at the same time, including the calls that wait."""
    queue: int = DEFAULT_MAX_QUEUE
    """The largest number of tasks that wait for workers. When it is reached, no new execution is started."""


DEFAULT_LIMITS = Limits()


class Budget:
    """A number of units that calls share. If too few units are free, calls wait in the order in which they came.

    All waiting calls together may ask for up to `max_waiting` units.
    """

    def __init__(self, total: int, max_waiting: int | None = None) -> None:
        self._total = self._free = total
        self._max_waiting = max_waiting
        self._wanted = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, units: int, patience: float | None = None) -> int:
        """Take `units`, or the whole budget if it is smaller. Return the number to pass to `give`.

        Raises Overloaded if the waiting calls together ask for too many units, or if the units are not free within
        `patience` seconds.
        """
        units = min(units, self._total)
        if not self._waiting and units <= self._free:
            self._free -= units
            return units
        if self._max_waiting is not None and self._wanted + units > self._max_waiting:
            raise Overloaded(_OVERLOADED)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((units, turn))
        self._wanted += units
        try:
            await asyncio.wait({turn}, timeout=patience)
            if not turn.done():
                raise Overloaded(_OVERLOADED)
        except BaseException:
            if turn.done():
                self.give(units)
            else:
                self._waiting.remove((units, turn))
                self._wanted -= units
                self.give(0)  # the next waiting call may need fewer units
            raise
        return units

    def give(self, units: int) -> None:
        """Release units, and let waiting calls take them."""
        self._free += units
        while self._waiting and self._waiting[0][0] <= self._free:
            units, turn = self._waiting.popleft()
            self._free -= units
            self._wanted -= units
            turn.set_result(None)


class Answers:
    """The budget for answers that clients have not read yet."""

    def __init__(self) -> None:
        self._budget = Budget(ANSWER_BUDGET)

    async def reserve(self, context: Context, size: int) -> None:
        """Take a share for an answer of `size` bytes, and keep it until the call has ended. Raises Overloaded.

        Call this before the answer is read from the store. If the client hasn't read the answer within ANSWER_TIMEOUT,
        the call is cancelled.
        """
        if size <= SMALL_BYTES:
            return
        units = await self._budget.take(size * ANSWER_COPIES, ANSWER_PATIENCE)
        call = asyncio.current_task()
        assert call is not None
        # Cancel the call's task: nothing else makes gRPC drop the answer.
        timer = asyncio.get_running_loop().call_later(ANSWER_TIMEOUT, call.cancel)

        def ended(_: Context) -> None:
            timer.cancel()
            self._budget.give(units)

        context.add_done_callback(cast(Any, ended))  # the stubs have a wrong type


class Received:
    """A request that is not decoded yet. `take` returns its bytes once and drops them, to free memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def take(self) -> bytes:
        data, self._data = self._data, b""
        return data


class _Slots:
    """The slots of calls whose requests are being read. If other calls wait for a slot, slow requests are cancelled."""

    def __init__(self, count: int) -> None:
        self._free = Budget(count)
        self._since: dict[asyncio.Task[Any], float] = {}

    async def take(self) -> None:
        """Wait for a slot, and take it for this call."""
        loop, call = asyncio.get_running_loop(), asyncio.current_task()
        assert call is not None
        while True:
            try:
                await self._free.take(1, READ_PATIENCE)
                break
            except Overloaded:
                for slow, since in self._since.items():
                    if loop.time() - since >= READ_PATIENCE:
                        slow.cancel()
        self._since[call] = loop.time()
        call.add_done_callback(self.give)

    def give(self, call: asyncio.Task[Any] | None) -> None:
        """Free the call's slot. Does nothing the second time."""
        if call is not None and self._since.pop(call, None) is not None:
            self._free.give(1)


class Reading(grpc.aio.ServerInterceptor):
    """An interceptor that limits how many requests are read at once. Requests with payloads don't block the others.

    The request of a health check must arrive within READ_PATIENCE. A health check needs no token, so it
    takes no slot: slow health checks of strangers must not block the clients.
    """

    def __init__(self) -> None:
        self._with_payload, self._without = _Slots(PAYLOAD_READERS), _Slots(READERS)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Wait for a slot, and return the method's handler. The slot is freed as soon as the request has arrived."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler
        service, _, method = handler_call_details.method.rpartition("/")
        if service != f"/{SERVICE_NAME}":
            return _prompt(handler)
        slots = self._with_payload if method in _WITH_PAYLOAD else self._without
        await slots.take()

        async def read(request: Received, context: Context) -> Any:
            slots.give(asyncio.current_task())
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(read, handler.request_deserializer, handler.response_serializer)


def _prompt(handler: Any) -> Any:
    """Wrap the handler of a unary RPC: refuse a call whose request doesn't arrive within READ_PATIENCE."""

    async def serve(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async def read() -> Any:
            """Return the request, or None if there is none, or if it is malformed."""
            with suppress(DecodeError):
                return await anext(requests, None)

        reading = asyncio.ensure_future(read())
        await asyncio.wait({reading}, timeout=READ_PATIENCE)
        if not reading.done():
            reading.cancel()
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not arrive in time")
        if reading.result() is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no valid request")
        yield await handler.unary_unary(reading.result(), context)

    # Only a handler for streams can answer before the request has arrived.
    return grpc.stream_stream_rpc_method_handler(serve, handler.request_deserializer, handler.response_serializer)


def rpcs_of(
    servicer: Any, admit: Callable[[Context], Awaitable[None]], stored: Callable[[], Awaitable[None]]
) -> dict[str, Rpc]:
    """Return the unary RPCs of the servicer by name. Each one first checks the size of its request, and calls `admit`.

    `admit` may refuse the call. `stored` waits until the store no longer holds the requests that it has got so far.
    """
    budget = Budget(REQUEST_BUDGET, MAX_WAITING_REQUESTS)

    def unary(method: Any) -> Rpc:
        behaviour, request_type = getattr(servicer, method.name), getattr(pb, method.input_type.name)
        limit = _limit(method.name)

        async def handle(received: Received, context: Context) -> Any:
            share = 0
            try:
                _check(received, limit)
                if received.size > SMALL_BYTES:
                    share = await budget.take(received.size * REQUEST_COPIES)
                await admit(context)
                return await behaviour(_decoded(received, request_type), context)
            except asyncio.CancelledError:
                if share:  # the store still holds the request: it runs the transition although the caller is gone
                    await stored()
                raise
            except Exception as error:  # noqa: BLE001 - `abort` answers with a status
                await abort(context, error)
            finally:
                budget.give(share)

        return handle

    return {method.name: unary(method) for method in _SERVICE.methods if not method.client_streaming}


def add_servicer(servicer: Any, server: grpc.aio.Server) -> None:
    """Add the servicer's RPCs to the server: the unary ones of `servicer.rpcs`, and the streams.

    The size of each message is checked.
    """
    handlers: dict[str, Any] = {}
    for method in _SERVICE.methods:
        name = method.name
        serializer = getattr(pb, method.output_type.name).SerializeToString
        if method.client_streaming:
            streaming = _streaming(getattr(servicer, name), getattr(pb, method.input_type.name), _limit(name))
            handlers[name] = grpc.stream_stream_rpc_method_handler(streaming, Received, serializer)
        else:
            handlers[name] = grpc.unary_unary_rpc_method_handler(servicer.rpcs[name], Received, serializer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


def _limit(method: str) -> int:
    return MAX_REQUEST_BYTES if method in _WITH_PAYLOAD else MAX_SMALL_REQUEST_BYTES


def _streaming(behaviour: Any, request_type: type[Message], limit: int) -> Any:
    async def handle(requests: Any, context: Context) -> Any:
        async def decoded() -> Any:
            async for received in requests:
                _check(received, limit)
                yield _decoded(received, request_type)

        try:
            async with aclosing(behaviour(decoded(), context)) as answers:
                async for answer in answers:
                    yield answer
        except Exception as error:  # noqa: BLE001 - `abort` answers with a status
            await abort(context, error)

    return handle


def _check(received: Received, limit: int) -> None:
    if received.size > limit:
        raise TooLarge(f"the request is {received.size:,} bytes; the limit is {limit:,} bytes")


def _decoded(received: Received, request_type: type[Message]) -> Message:
    try:
        return request_type.FromString(received.take())
    except DecodeError as error:
        raise InvalidRequest(f"the request is not a {request_type.DESCRIPTOR.name} message: {error}") from error
