"""The heartbeats of a worker or owner, sent on one stream. Each beat names the tasks that the sender holds."""

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

from nexum_engine.client import NexumClient
from nexum_engine.connection import RECONNECT_DELAY
from nexum_engine.errors import NexumError, NotANexumServer, ServerError, ServerUnavailable
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.status import error_of

if TYPE_CHECKING:
    from nexum_engine.client import WorkerStreamCall

FIRST_ACK_TIMEOUT = 3.0  # seconds to wait for the first answer on a stream before reopening the stream
MIN_ACK_TIMEOUT = 1.0  # seconds to wait for each later answer; a third of the lease if that is longer
MIN_LEASE_MS = 100  # the shortest lease that is used to space the beats
# Seconds, at most, from a stream's first beat, or from a beat that `beat()` requests, to the next beat. Less than the
# grace in which a disconnected worker keeps its tasks.
SECOND_BEAT_AFTER = 0.5
TELL_AGAIN_AFTER = 10.0  # seconds until an error of the same class is reported again


def new_worker_id() -> str:
    """Return a unique worker id that names the host and the process."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


async def _nothing() -> None:
    """Do nothing. This is the default of `prepare`."""


class Heartbeat:
    """A WorkerStream that is reopened when it breaks or the server stops answering.

    `prepare` is awaited before each attempt to connect. `on_connected` is called at the first answer on a stream.
    `on_lost` is called with the error when the stream is lost or can't be opened: ServerUnavailable if no server
    answers, else the server's error. `on_lost` is called at the first error, when the error's class changes, and every
    10 s.
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
        """The ids of the tasks that the worker holds. The next beat names them, without a call of `beat`."""
        self.draining = False
        """Whether the worker is stopping and takes no more tasks."""
        self.connected = asyncio.Event()
        """Set while a stream is open and the server has answered on it."""
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
        """Whether the worker certainly still holds its tasks: it sent an answered beat less than half a lease ago.

        If False, only the server knows whether the worker still holds the tasks.
        """
        return self.connected.is_set() and time.monotonic() < self._held_until

    def beat(self) -> None:
        """Send a beat now, and another one soon. A task that neither beat names has never arrived at the worker."""
        self._is_urgent = True
        self._wake.set()

    async def run(self) -> None:
        """Send beats until cancelled. Return if the server has no WorkerStream.

        Reconnect whenever the server doesn't answer or has an internal error. Raises InvalidRequest if the server
        refuses the worker id, NotANexumServer, and other errors of `prepare`.
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
        """Send beats on one stream until the server ends the stream.

        Raises grpc.RpcError if the stream breaks, ServerError if the server doesn't answer.
        """
        call = self._client.worker_stream()
        call.add_done_callback(self._stream_ended)
        timeout = FIRST_ACK_TIMEOUT
        # Send the second beat soon. The server may have handed out a task during the reconnection, with the short lease
        # of a disconnected worker. The first beat may have been too early to name that task.
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
            with contextlib.suppress(asyncio.InvalidStateError):  # the stream is over: let `read` raise the reason
                await call.write(beat)
            ack = await call.read()
            return ack if isinstance(ack, pb.WorkerBeatAck) else None

        exchanging = asyncio.ensure_future(exchange())
        try:
            # Wait twice. If a handler blocks the event loop during one wait, the other wait can still read the answer.
            # Don't use wait_for: before Python 3.12, it can lose a cancellation.
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
