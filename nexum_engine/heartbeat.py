"""A worker's sign of life: one stream to the server, on which it says again and again which tasks it holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from nexum_engine.client import RECONNECT_DELAY, NexumClient
from nexum_engine.errors import NexumError, NotANexumServer, ServerError, ServerUnavailable
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.status import error_of

if TYPE_CHECKING:
    from nexum_engine.client import WorkerStreamCall

FIRST_ACK_TIMEOUT = 3.0  # seconds until a stream that says nothing is opened again
MIN_ACK_TIMEOUT = 1.0  # seconds; later answers get a third of the lease, if that is more
MIN_LEASE_MS = 100  # the shortest that is believed
SECOND_BEAT_AFTER = 0.5  # seconds; less than the grace in which a worker that was cut off keeps its tasks
TELL_AGAIN_AFTER = 10.0  # seconds without a connection


def new_worker_id() -> str:
    """An id that no other worker has, and that tells a person where it runs."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


async def _nothing() -> None:
    """Nothing has to be done before connecting."""


class Heartbeat:
    """Keeps a WorkerStream open, and opens it again when it breaks or the server falls silent.

    `prepare` is awaited before each attempt to connect. `on_connected` is called at the first answer on a stream.
    `on_lost` is called with the reason when the stream is lost or can't be opened: ServerUnavailable if no server
    answers, else what it answered; at once, when the reason is another one, and every 10 s.
    """

    def __init__(
        self,
        client: NexumClient,
        worker_id: str,
        *,
        prepare: Callable[[], Awaitable[None]] = _nothing,
        on_connected: Callable[[], None] = lambda: None,
        on_lost: Callable[[NexumError], None] = lambda _: None,
    ) -> None:
        self.held: set[str] = set()
        """The ids of the tasks that the worker holds. Changing this set does not require calling `beat`."""
        self.draining = False
        """The worker takes no more tasks."""
        self.connected = asyncio.Event()
        """Set while a stream is open and was answered."""
        self.connected_once = False
        """Whether a stream was ever answered."""
        self._held_until = 0.0
        self._client = client
        self._worker_id = worker_id
        self._prepare = prepare
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._told: tuple[type[NexumError], float] | None = None
        self._wake = asyncio.Event()
        self._is_urgent = False

    @property
    def is_holding(self) -> bool:
        """Whether what the worker holds is its own for certain: its last answered beat is younger than half a lease.

        False says nothing: the server may think that the worker has come to a stop, and only the server can tell.
        """
        return self.connected.is_set() and time.monotonic() < self._held_until

    def beat(self) -> None:
        """Beat now and again soon: two beats in a row tell the server which tasks have never arrived."""
        self._is_urgent = True
        self._wake.set()

    async def run(self) -> None:
        """Beat until cancelled. Returns if the server has no WorkerStream.

        Raises InvalidRequest for a worker id that the server refuses, NotANexumServer, and what `prepare` raises except
        for a server that doesn't answer or has a fault: that is waited out.
        """
        while True:
            try:
                await self._prepare()
                await self._client.reach()
                await self._keep_a_stream()
                lost: NexumError = ServerUnavailable(f"the Nexum server on {self._client.address} ended the connection")
            except grpc.RpcError as rpc_error:
                lost = error_of(rpc_error, self._client.address)
                if rpc_error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    return
                if rpc_error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    raise lost from rpc_error
            except NotANexumServer:
                raise
            except ServerError as error:
                lost = error
            self._tell(lost)
            await asyncio.sleep(RECONNECT_DELAY)

    async def _keep_a_stream(self) -> None:
        """One stream, until the server ends it. Raises grpc.RpcError when it breaks, ServerError when it is silent."""
        call = self._client.worker_stream()
        call.add_done_callback(self._stream_ended)
        timeout = FIRST_ACK_TIMEOUT
        # What was handed out around a reconnection has the short lease of a worker that was cut off, and may have come
        # too late to be named in the first beat.
        self._is_urgent = True
        try:
            while True:
                self._wake.clear()
                again_soon, self._is_urgent = self._is_urgent, False
                sent = time.monotonic()
                ack = await self._exchange(call, timeout)
                if ack is None:
                    return
                self._held_until = sent + ack.lease_ms / 2000
                if not self.connected.is_set():
                    self._told = None
                    self.connected_once = True
                    self.connected.set()
                    self._on_connected()
                interval = max(ack.lease_ms, MIN_LEASE_MS) / 3000
                timeout = max(interval, MIN_ACK_TIMEOUT)
                await self._sleep(min(interval, SECOND_BEAT_AFTER) if again_soon else interval)
        finally:
            self.connected.clear()
            call.cancel()

    def _stream_ended(self, _: Any) -> None:
        self._wake.set()

    async def _exchange(self, call: WorkerStreamCall, timeout: float) -> pb.WorkerBeatAck | None:
        """Beat and wait for the answer; None if the server has ended the stream."""

        async def exchange() -> pb.WorkerBeatAck | None:
            beat = pb.WorkerBeat(worker_id=self._worker_id, task_ids=sorted(self.held), draining=self.draining)
            with contextlib.suppress(asyncio.InvalidStateError):  # the stream is over: reading says why
                await call.write(beat)
            ack = await call.read()
            return ack if isinstance(ack, pb.WorkerBeatAck) else None

        exchanging = asyncio.ensure_future(exchange())
        try:
            # In two parts: if this event loop itself was held up in one, the answer can still be read in the other.
            # Not wait_for: in Python 3.11 and before, it can lose a cancellation.
            for _ in range(2):
                await asyncio.wait({exchanging}, timeout=timeout / 2)
            if not exchanging.done():
                raise ServerError(
                    f"the server on {self._client.address} did not answer a sign of life within {timeout:g} s"
                )
            if exchanging.cancelled():
                raise ServerUnavailable(f"the connection to {self._client.address} was closed")
            return exchanging.result()
        finally:
            exchanging.cancel()

    async def _sleep(self, seconds: float) -> None:
        """Until the next beat is due or wanted."""
        timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    def _tell(self, lost: NexumError) -> None:
        now = asyncio.get_running_loop().time()
        if self._told is None or self._told[0] is not type(lost) or now - self._told[1] >= TELL_AGAIN_AFTER:
            self._told = type(lost), now
            self._on_lost(lost)
