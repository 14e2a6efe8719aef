"""The beats of a worker or owner: one stream to the server, on which each beat names the tasks that it holds."""

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

FIRST_ACK_TIMEOUT = 3.0  # seconds until a stream without a first answer is reopened
MIN_ACK_TIMEOUT = 1.0  # seconds for each later answer, or a third of the lease if that is more
MIN_LEASE_MS = 100  # a server's shorter lease counts as this one
SECOND_BEAT_AFTER = 0.5  # seconds; less than the grace in which a disconnected worker keeps its tasks
TELL_AGAIN_AFTER = 10.0  # seconds until the same kind of loss is reported again


def new_worker_id() -> str:
    """Return a unique worker id that names the host and the process."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


async def _nothing() -> None:
    """Do nothing before a connection: the default of `prepare`."""


class Heartbeat:
    """A WorkerStream that is reopened when it breaks or the server stops answering.

    `prepare` is awaited before each attempt to connect. `on_connected` is called at the first answer on a stream.
    `on_lost` is called with the error when the stream is lost or can't be opened: ServerUnavailable if no server
    answers, else the server's own error. It is called at once, whenever the kind of error changes, and every 10 s.
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
        """The ids of the tasks that the worker holds. A change needs no call of `beat`."""
        self.draining = False
        """Whether the worker takes no more tasks."""
        self.connected = asyncio.Event()
        """Set while a stream is open that the server has answered."""
        self.connected_once = False
        """Whether the server has ever answered a stream."""
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
        """Whether the worker certainly still holds its tasks: its last answered beat is younger than half a lease.

        If False, only the server knows whether the worker still holds them.
        """
        return self.connected.is_set() and time.monotonic() < self._held_until

    def beat(self) -> None:
        """Beat now, and once more soon: from two beats in a row the server learns which tasks never arrived."""
        self._is_urgent = True
        self._wake.set()

    async def run(self) -> None:
        """Beat until cancelled. Returns if the server has no WorkerStream.

        Reconnects as long as the server doesn't answer or has an internal error. Raises InvalidRequest for a worker id
        that the server refuses, NotANexumServer, and other errors of `prepare`.
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
        """Beat on one stream until the server ends it.

        Raises grpc.RpcError if the stream breaks, ServerError if the server doesn't answer.
        """
        call = self._client.worker_stream()
        call.add_done_callback(self._stream_ended)
        timeout = FIRST_ACK_TIMEOUT
        # A task that was handed out during the reconnection has the short lease of a disconnected worker, and may have
        # arrived too late for the first beat: send the second one soon.
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
        """Send a beat and return its answer; None if the server has ended the stream."""

        async def exchange() -> pb.WorkerBeatAck | None:
            beat = pb.WorkerBeat(worker_id=self._worker_id, task_ids=sorted(self.held), draining=self.draining)
            with contextlib.suppress(asyncio.InvalidStateError):  # the stream is over: `read` raises the reason
                await call.write(beat)
            ack = await call.read()
            return ack if isinstance(ack, pb.WorkerBeatAck) else None

        exchanging = asyncio.ensure_future(exchange())
        try:
            # Wait twice: if a handler blocks this event loop during one wait, the other can still read the answer.
            # Not wait_for: in Python 3.11 and before, it can lose a cancellation.
            for _ in range(2):
                await asyncio.wait({exchanging}, timeout=timeout / 2)
            if not exchanging.done():
                raise ServerError(f"the server on {self._client.address} did not answer a beat within {timeout:g} s")
            if exchanging.cancelled():
                raise ServerUnavailable(f"the connection to {self._client.address} was closed")
            return exchanging.result()
        finally:
            exchanging.cancel()

    async def _sleep(self, seconds: float) -> None:
        """Sleep until the next beat is due or requested."""
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
