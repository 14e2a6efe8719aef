"""The heartbeats of a worker or owner, sent on one stream. Each heartbeat names the tasks that the sender holds.

A thread with its own event loop sends the heartbeats of the whole process, over their own connection. So code that
blocks the program's event loop doesn't stop them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import asdict
from itertools import count, islice
from typing import TYPE_CHECKING

import grpc

from nexum_engine.channel import Channel
from nexum_engine.clock import wait_until_set
from nexum_engine.connection import RECONNECT_DELAY, Connection, Route, explained
from nexum_engine.errors import (
    AccessDenied,
    InvalidRequest,
    NexumError,
    NotANexumServer,
    ServerError,
    ServerUnavailable,
)
from nexum_engine.event_loop import LoopThread, call_in
from nexum_engine.forks import in_forked_process
from nexum_engine.location import process_name
from nexum_engine.records import DeclaredTool
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.request import request_of
from nexum_engine.wire.status import CUT_OFF

if TYPE_CHECKING:
    from typing import TypeAlias

    StreamCall: TypeAlias = grpc.aio.StreamStreamCall[pb.WorkerBeat, pb.WorkerBeatAck]

FIRST_ACK_TIMEOUT = 3.0  # seconds to wait for the first answer on a stream before reopening the stream
MIN_ACK_TIMEOUT = 1.0  # seconds to wait for each answer after the first; a third of the lease, if that is longer
MIN_LEASE_MS = 100  # heartbeats are sent as if the lease were at least this long, so that they stay few
# At most this many seconds pass between the first two heartbeats of a stream, and between a heartbeat that `beat` sends
# and the next one. The server waits longer than this before it reassigns the tasks of a disconnected worker.
SECOND_BEAT_AFTER = 0.5
TELL_AGAIN_AFTER = 10.0  # seconds until an error of the same class is reported again
BLOCKED_AFTER = 1.0  # an event loop that has been blocked for this many seconds is reported
MAX_PROGRESS_AT_ONCE = 32  # one heartbeat has the progress of at most this many tasks
MAX_TOOLS_AT_ONCE = 32  # one heartbeat declares at most this many tools
END_TIMEOUT = 1.0  # seconds to wait for the end of the stream
_numbers = count(1)


def new_worker_id() -> str:
    """Return a unique worker id that names the host and the process."""
    return f"{process_name()}{next(_numbers)}"


class _NoWorkerStream(NexumError):
    """The server has no WorkerStream."""


async def _nothing() -> None:
    """Do nothing. This is the default of `prepare`."""


class Heartbeat:
    """A WorkerStream that is reopened when it breaks or the server stops answering.

    After each connection, `prepare` is awaited, `on_connected` is called, and `connected` is set. `on_lost` is called
    with the error when the stream is lost or can't be opened: ServerUnavailable if no server answers, else the server's
    error. `on_lost` is called at the first error, when the error's class changes, and every 10 s.

    `on_tasks_lost` is called with the ids of held tasks that the server has taken away, after each heartbeat that names
    them. `on_blocked` is called, in the heartbeat's thread, when the program's event loop has been blocked for at least
    BLOCKED_AFTER seconds. Its argument is the number of seconds since the block began. Each block is reported once.
    """

    def __init__(
        self,
        connection: Connection,
        worker_id: str,
        *,
        prepare: Callable[[], Awaitable[None]] = _nothing,
        on_connected: Callable[[], None] = lambda: None,
        on_lost: Callable[[NexumError], None] = lambda _: None,
        on_tasks_lost: Callable[[frozenset[str]], None] = lambda _: None,
        on_blocked: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.draining = False
        """Whether the worker is stopping and takes no more tasks."""
        self.connected = asyncio.Event()
        """Set while a stream is open and the server has answered on it."""
        self.connected_once = False
        """Whether the server has ever answered a stream."""
        self._connection = connection
        self._worker_id = worker_id
        self._prepare = prepare
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_tasks_lost = on_tasks_lost
        self._on_blocked = on_blocked
        self._told: tuple[type[NexumError], float] | None = None

        # The program's event loop and the heartbeat loop both use the attributes below. The lock guards `_held`,
        # `_progress` and `_questions`.
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._progress: dict[str, str] = {}
        """By task id, the progress that the server has not acknowledged yet, as JSON text."""
        self._questions: list[tuple[str, asyncio.Future[bool]]] = []
        self._tools: list[pb.DeclaredTool] = []
        """Every tool that was declared. New tools come last, so the number of sent tools says which is the next."""
        self._wake = asyncio.Event()
        """Set in the heartbeat loop when the next heartbeat is due, or when the stream is over."""
        self._is_urgent = False
        self._held_until = 0.0
        self._last_sent = 0.0
        self._sent = self._turned = 0
        """`_sent` is the newest heartbeat's number. `_turned` is the number of the newest heartbeat after which the
        program's event loop has run."""
        self._turn_due = 0.0
        self._is_blocked = False
        self._doubtful_until = 0.0
        """The server may have reassigned tasks that were requested before this time."""

    # ---- For the event loop ------------------------------------------------------------------------------------------

    @property
    def is_holding(self) -> bool:
        """Whether it is certain that the worker still holds its tasks. If False, only the server knows.

        Each answered heartbeat makes it certain for half a lease, counted from the sending of the heartbeat.
        """
        return time.monotonic() < self._held_until

    def hold(self, task_id: str) -> None:
        """Name the task in the next heartbeat and in all later ones."""
        with self._lock:
            self._held.add(task_id)

    def release(self, task_id: str) -> None:
        """Name the task in no further heartbeat."""
        with self._lock:
            self._held.discard(task_id)
            self._progress.pop(task_id, None)

    def send_progress(self, task_id: str, progress_json: str) -> None:
        """Send a heartbeat with a held task's progress now. A newer progress of the task replaces an unsent one."""
        with self._lock:
            if task_id in self._held:
                self._progress[task_id] = progress_json
        _heartbeat_loop().call_soon_threadsafe(self._wake.set)

    def declare(self, tools: Iterable[DeclaredTool]) -> None:
        """Tell the server about tools, now and on each new stream.

        Raises InvalidRequest if a text of a tool has a lone surrogate.
        """
        self._tools += [request_of(pb.DeclaredTool, **asdict(one)) for one in tools]
        if self.connected_once:
            _heartbeat_loop().call_soon_threadsafe(self._wake.set)

    def beat(self) -> None:
        """Send a heartbeat now, and another one soon.

        The two heartbeats show the server which tasks have reached this worker. The server hands out again each task
        of this worker that neither heartbeat names.
        """
        self._is_urgent = True
        _heartbeat_loop().call_soon_threadsafe(self._wake.set)

    async def may_begin(self, task_id: str, requested: float, *, ask: bool) -> bool:
        """Return whether this worker still holds the task, which it polled for at the monotonic time `requested`.

        If the event loop was blocked, or the process was suspended, the process reads the answer to a poll late.
        Meanwhile, the server may have given the task to another worker. The network may delay the answer, too, and only
        the server can tell: with `ask`, always ask the server.
        """
        if not ask and self.is_holding and requested > self._doubtful_until and self._sent - self._turned < 2:
            return True
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._questions.append((task_id, answer))
        self.beat()
        return await answer

    async def run(self) -> None:
        """Send heartbeats until cancelled. Return if the server has no WorkerStream.

        Reconnect whenever the server doesn't answer or has an internal error. Raises NotANexumServer, AccessDenied, the
        errors of `prepare`, and InvalidRequest if the server refuses the worker id.
        """
        await self._retry(self._connection.reach)
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[NexumError | None] = asyncio.Queue()
        ended = asyncio.Event()
        sending = asyncio.run_coroutine_threadsafe(self._send_until_cancelled(loop, news, ended), _heartbeat_loop())
        try:
            while True:
                lost = await news.get()
                if lost is None:
                    await self._retry(self._prepare)
                    self._told = None
                    self._on_connected()
                    self.connected_once = True
                    self.connected.set()
                elif isinstance(lost, _NoWorkerStream):
                    await self._retry(self._prepare)
                    return
                elif isinstance(
                    lost, InvalidRequest if self._connection.has_choice else (InvalidRequest, AccessDenied)
                ):
                    raise lost
                else:
                    self.connected.clear()
                    self._tell(lost)
                    await self._retry(self._connection.reach)
        finally:
            self.connected.clear()
            sending.cancel()
            await wait_until_set(ended, END_TIMEOUT)

    async def _retry(self, action: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await action()
            except (NotANexumServer, AccessDenied):
                raise
            except ServerError as error:
                self._tell(error)
                await asyncio.sleep(RECONNECT_DELAY)
            else:
                return

    def _tell(self, lost: NexumError) -> None:
        now = time.monotonic()
        if self._told is None or self._told[0] is not type(lost) or now - self._told[1] >= TELL_AGAIN_AFTER:
            self._told = type(lost), now
            self._on_lost(lost)

    # ---- In the heartbeat loop ---------------------------------------------------------------------------------------

    async def _send_until_cancelled(
        self, loop: asyncio.AbstractEventLoop, news: asyncio.Queue[NexumError | None], ended: asyncio.Event
    ) -> None:
        """Send heartbeats. Put None into `news` when connected, the error when disconnected. Finally set `ended`."""

        def tell(lost: NexumError | None) -> None:
            call_in(loop, news.put_nowait, lost)

        try:
            while True:
                try:
                    route = self._connection.route()
                    async with _channel_of(route) as channel:
                        await self._keep_a_stream(channel.stub.WorkerStream(), loop, tell)
                    lost: NexumError = ServerUnavailable(
                        f"the Nexum server on {self._connection.address} ended the connection"
                    )
                except grpc.RpcError as rpc_error:
                    if rpc_error.details() == CUT_OFF and not self.connected.is_set():
                        # The server refused the stream, and grpcio lost the reason. Another stream may get the reason.
                        await asyncio.sleep(RECONNECT_DELAY)
                        continue
                    is_missing = rpc_error.code() is grpc.StatusCode.UNIMPLEMENTED
                    lost = _NoWorkerStream() if is_missing else await explained(rpc_error, route.target, route.security)
                except NexumError as error:
                    lost = error
                self._held_until = 0.0
                tell(lost)
                if isinstance(lost, (_NoWorkerStream, InvalidRequest)):
                    return
                await asyncio.sleep(RECONNECT_DELAY)
        finally:
            self._held_until = 0.0
            call_in(loop, ended.set)

    async def _keep_a_stream(
        self, call: StreamCall, loop: asyncio.AbstractEventLoop, tell: Callable[[NexumError | None], None]
    ) -> None:
        """Send heartbeats on one stream until the server ends the stream.

        Raises grpc.RpcError if the stream breaks, ServerError if the server doesn't answer.
        """
        call.add_done_callback(lambda _: self._wake.set())
        is_connected, timeout, told = False, FIRST_ACK_TIMEOUT, 0
        lease = float("inf")
        self._doubtful_until = time.monotonic()
        # Send the second heartbeat soon. The server may have handed out a task during the reconnection, with the short
        # lease of a disconnected worker. The first heartbeat may have been too early to name that task.
        self._is_urgent = True
        try:
            while True:
                self._wake.clear()
                again_soon, self._is_urgent = self._is_urgent, False
                sent = time.monotonic()
                if sent - self._last_sent > lease / 2:
                    self._doubtful_until = sent  # this process was suspended before this heartbeat
                self._last_sent = sent
                self._watch(loop, sent)
                with self._lock:
                    questions = len(self._questions)
                    held = sorted(self._held)
                    progress = dict(islice(self._progress.items(), MAX_PROGRESS_AT_ONCE))
                tools = self._tools[told : told + MAX_TOOLS_AT_ONCE]
                beat = pb.WorkerBeat(
                    worker_id=self._worker_id,
                    task_ids=held,
                    draining=self.draining,
                    progress=[pb.TaskProgress(task_id=one, progress_json=text) for one, text in progress.items()],
                    tools=tools,
                )
                ack = await self._exchange(call, beat, timeout)
                if ack is None:
                    return
                lease = max(ack.lease_ms, MIN_LEASE_MS) / 1000
                self._held_until = sent + ack.lease_ms / 2000
                self._answer(loop, questions, frozenset(ack.lost_task_ids))
                told += len(tools)
                if told < len(self._tools):
                    self._wake.set()
                with self._lock:
                    for task_id, text in progress.items():
                        if self._progress.get(task_id) == text:
                            del self._progress[task_id]
                    if self._progress:
                        self._wake.set()
                if not is_connected:
                    is_connected = True
                    tell(None)
                timeout = max(lease / 3, MIN_ACK_TIMEOUT)
                # Sleep until the next heartbeat is due or requested.
                await wait_until_set(self._wake, min(lease / 3, SECOND_BEAT_AFTER) if again_soon else lease / 3)
        finally:
            call.cancel()

    async def _exchange(self, call: StreamCall, beat: pb.WorkerBeat, timeout: float) -> pb.WorkerBeatAck | None:
        """Send a heartbeat and return its answer; None if the server has ended the stream."""

        async def exchange() -> pb.WorkerBeatAck | None:
            with contextlib.suppress(asyncio.InvalidStateError):  # the stream is over: let `read` raise the reason
                await call.write(beat)
            ack = await call.read()
            return ack if isinstance(ack, pb.WorkerBeatAck) else None

        exchanging = asyncio.ensure_future(exchange())
        try:
            # Wait twice, for half of the timeout each. If this process is suspended during the first wait, that wait
            # times out when the process resumes, even if the answer has come. The second wait then reads the answer.
            for _ in range(2):
                await asyncio.wait({exchanging}, timeout=timeout / 2)
            if not exchanging.done():
                raise ServerError(
                    f"the server on {self._connection.address} did not answer a heartbeat within {timeout:g} s"
                )
            if exchanging.cancelled():
                raise ServerUnavailable(f"the connection to {self._connection.address} was closed")
            return exchanging.result()
        finally:
            exchanging.cancel()

    def _watch(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        """Schedule `_note_turn` on the program's event loop. Report the loop if it is blocked."""
        if self._turned == self._sent:
            self._turn_due, self._is_blocked = now, False
        elif now - self._turn_due >= BLOCKED_AFTER and not self._is_blocked:
            self._is_blocked = True
            self._on_blocked(now - self._turn_due)
        self._sent += 1
        call_in(loop, self._note_turn, self._sent)

    def _note_turn(self, number: int) -> None:
        if self._sent > number:
            self._doubtful_until = time.monotonic()  # the loop was blocked: a newer heartbeat has been sent
        self._turned = number

    def _answer(self, loop: asyncio.AbstractEventLoop, count: int, lost: frozenset[str]) -> None:
        with self._lock:
            questions, self._questions = self._questions[:count], self._questions[count:]

        def answer() -> None:
            for task_id, future in questions:
                if not future.done():
                    future.set_result(task_id not in lost)
            if lost:
                self._on_tasks_lost(lost)

        if questions or lost:
            call_in(loop, answer)


# ---- The heartbeat loop ----------------------------------------------------------------------------------------------

_shared: LoopThread | None = None
_shared_lock = threading.Lock()
_channels: dict[Route, tuple[Channel, set[object]]] = {}
"""For each route, the channel of all heartbeats that use it now, and one object for each of them."""


@contextlib.asynccontextmanager
async def _channel_of(route: Route) -> AsyncIterator[Channel]:
    """Yield the channel of all heartbeats with this route. A channel for each heartbeat would take a socket for each.

    The client has a channel of its own: its large messages would delay the heartbeats.
    """
    channel, users = _channels.get(route) or (Channel(*route, purpose="heartbeat"), set())
    _channels[route] = channel, users
    user = object()
    users.add(user)
    try:
        yield channel
    finally:
        users.remove(user)
        if not users:
            del _channels[route]
            await channel.close()


def _heartbeat_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of this process's heartbeats. Its thread is started at the first call."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = LoopThread("heartbeats")
        return _shared.loop


@in_forked_process
def _forget_loop() -> None:
    """Forget the heartbeat loop: a forked process doesn't have the thread that runs the loop."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()
    _channels.clear()
