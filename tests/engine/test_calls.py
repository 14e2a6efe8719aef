"""Calls that share one stream."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine_server import EngineServer, engine_server, hangs, raises
from faulty_proxy import FaultyProxy
from harness import ROOT, cancelled_at_each_await
from processes import wait_until
from proxy import TO_SERVER
from server_thread import server_thread

from nexum_engine import channel
from nexum_engine.client import NexumClient
from nexum_engine.errors import ServerUnavailable
from nexum_engine.server import bounds, calls, run
from nexum_engine.store import listing
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.frames import CALLS
from nexum_engine.wire.multiplexed import MultiplexedChannel
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

SOON = 10.0  # seconds
LONG_MS = 25_000
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0))
PING_TIMES = (
    "grpc.keepalive_time_ms",
    "grpc.http2.ping_timeout_ms",
    "grpc.http2.min_ping_interval_without_data_ms",
)
MIB = 1024 * 1024
WORKFLOW = pb.WorkflowIR(workflow_id="w", version_hash="v1", ir_json='{"nodes":{"a":{"type":"EFFECT"}}}')


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EngineServer]:
    async with engine_server(tmp_path) as running:
        yield running


class Counting(FaultyProxy):
    """A proxy that counts the connections of clients, and what it passes on to the server."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.opened: set[asyncio.StreamWriter] = set()
        self.passed_on = 0

    async def before_sending(self, writer: asyncio.StreamWriter, direction: str, chunk: bytes) -> None:
        if direction == TO_SERVER:
            self.opened.add(writer)
            self.passed_on += 1
        await super().before_sending(writer, direction, chunk)


@pytest.fixture
def pinged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Counting]:
    """A proxy before a server. Clients ping the server twenty times as often as usual."""
    for module in (channel, run):
        options = [(name, value // 20 if name in PING_TIMES else value) for name, value in module._OPTIONS]
        monkeypatch.setattr(module, "_OPTIONS", options)
    with server_thread(tmp_path) as server, Counting(server.address) as proxy:
        yield proxy
        proxy.release()


async def test_dead_connection_is_replaced(pinged: Counting) -> None:
    async with NexumClient(pinged.address) as client:
        await client.list_executions(limit=1)
        pinged.forget_connections()
        await client.list_executions(limit=1, patience=SOON)
    assert pinged.hits
    assert len(pinged.opened) > 1


async def test_server_allows_the_pings_of_an_idle_connection(pinged: Counting) -> None:
    async with NexumClient(pinged.address) as client:
        await client.list_executions(limit=1)
        before = pinged.passed_on
        await asyncio.to_thread(wait_until, lambda: pinged.passed_on >= before + 6, "the client pings")
        await client.list_executions(limit=1)
    assert len(pinged.opened) == 1


class Counted:
    """A channel that counts the RPCs and streams that are opened on it."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self.opened: list[str] = []

    def unary_unary(self, path: str, **options: Any) -> Any:
        return self._counted(path, self._channel.unary_unary(path, **options))

    def stream_stream(self, path: str, **options: Any) -> Any:
        return self._counted(path, self._channel.stream_stream(path, **options))

    def _counted(self, path: str, method: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.opened.append(path.rpartition("/")[2])
            return method(*args, **options)

        return call

    async def close(self) -> None:
        await self._channel.close()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[Any, Counted]]:
    counted = Counted(grpc.aio.insecure_channel(address, options=UNLIMITED))
    channel = MultiplexedChannel(counted)
    try:
        yield NexumServiceStub(channel), counted  # type: ignore[arg-type]
    finally:
        await channel.close()


@pytest.fixture
async def stub(server: EngineServer) -> AsyncIterator[Any]:
    async with connected(server.address) as (stub, _):
        await stub.RegisterWorkflow(WORKFLOW)
        yield stub


async def started(stub: Any, size: int = 0) -> str:
    request = pb.StartRequest(workflow_id="w", version_hash="v1", input_json=json.dumps("x" * size))
    return str((await stub.StartExecution(request, timeout=SOON)).execution_id)


class RawStream:
    """A stream whose frames a test writes and reads one by one."""

    def __init__(self, address: str, options: Sequence[tuple[str, int]] = ()) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=[*UNLIMITED, *options])
        self.stream: Any = self.channel.stream_stream(
            CALLS,
            request_serializer=pb.CallFrames.SerializeToString,
            response_deserializer=pb.CallFrames.FromString,
        )()

    async def __aenter__(self) -> RawStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stream.cancel()
        await self.channel.close()

    async def send(self, *frames: pb.CallFrame) -> None:
        await self.stream.write(pb.CallFrames(frames=frames))

    async def read(self) -> list[pb.CallFrame]:
        return list((await asyncio.wait_for(self.stream.read(), SOON)).frames)


def request_frame(call: int, method: str, request: Any) -> pb.CallFrame:
    return pb.CallFrame(call=call, method=method, message=request.SerializeToString())


# ---- Calls -----------------------------------------------------------------------------------------------------------


async def test_calls_share_one_stream(server: EngineServer) -> None:
    async with connected(server.address) as (stub, counted):
        answers = await asyncio.gather(*(stub.GetServerInfo(pb.EmptyRequest()) for _ in range(50)))
        assert {one.database for one in answers} == {server.store.opened_as}
        assert counted.opened == ["Calls"]


async def test_a_client_that_is_cancelled_again_and_again_closes_its_stream(server: EngineServer) -> None:
    others = asyncio.all_tasks()
    waiting = asyncio.Event()

    async def program() -> None:
        async with NexumClient(server.address) as client:
            await client.ping()
            waiting.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(program())
    await waiting.wait()
    assert {task.get_name() for task in asyncio.all_tasks()} >= {"read answers of calls"}
    assert await cancelled_at_each_await(running) > 1
    assert not {task.get_name() for task in asyncio.all_tasks() - others} & {"write calls", "read answers of calls"}


async def test_a_large_request_is_an_rpc_of_its_own(server: EngineServer, stub: Any) -> None:
    async with connected(server.address) as (own, counted):
        execution_id = await started(own, 2 * MIB)
        assert counted.opened == ["StartExecution"]
        execution = await own.GetExecution(pb.GetExecutionRequest(execution_id=execution_id))
        assert counted.opened == ["StartExecution", "Calls"]
    assert execution.input_json == json.dumps("x" * 2 * MIB)


async def test_a_small_answer_does_not_wait_for_a_large_one(server: EngineServer, stub: Any) -> None:
    execution_id = await started(stub, 3 * MIB)
    async with RawStream(server.address) as raw:
        await raw.send(request_frame(1, "GetExecution", pb.GetExecutionRequest(execution_id=execution_id)))
        frames = await raw.read()
        await raw.send(request_frame(2, "GetServerInfo", pb.EmptyRequest()))
        while not any(frame.call == 1 and not frame.more for frame in frames):
            frames += await raw.read()
    assert [frame.call for frame in frames].index(2) < len(frames) - 1


async def test_an_error_is_answered_as_by_an_rpc(
    server: EngineServer, stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    request = pb.GetExecutionRequest(execution_id="exec-nowhere")
    async with grpc.aio.insecure_channel(server.address) as channel:
        alone: Any = NexumServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as of_rpc:
            await alone.GetExecution(request)
    with pytest.raises(grpc.aio.AioRpcError) as of_call:
        await stub.GetExecution(request)
    for error in (of_rpc.value, of_call.value):
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert ("nexum-error", "ExecutionNotFound") in tuple(error.trailing_metadata())
    assert of_call.value.details() == of_rpc.value.details()
    assert "fault" not in caplog.text


async def test_a_fault_is_an_internal_error_and_the_stream_continues(server: EngineServer, stub: Any) -> None:
    server.watch(listing.list_executions, raises)
    with pytest.raises(grpc.aio.AioRpcError, match="the server had an internal error; see its log under"):
        await stub.ListExecutions(pb.ListRequest())
    assert not (await stub.ListExecutions(pb.ListRequest())).executions


@pytest.mark.parametrize("where", ["nexum_engine.server.servicer.refusal", "nexum_engine.server.bounds._decoded"])
async def test_a_fault_outside_the_handler_shows_no_internals(
    where: str, server: EngineServer, stub: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("SELECT secret")

    async with grpc.aio.insecure_channel(server.address) as channel:
        alone: Any = NexumServiceStub(channel)
        await stub.GetServerInfo(pb.EmptyRequest())
        monkeypatch.setattr(where, broken)
        for client in (alone, stub) if where.endswith("refusal") else (alone,):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.GetServerInfo(pb.EmptyRequest())
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            details = str(caught.value.details())
            assert re.fullmatch(r"the server had an internal error; see its log under [0-9a-f]{8}", details)
            assert f"fault {details[-8:]}" in caplog.text
    assert "SELECT secret" in caplog.text


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (pb.CallFrame(call=1, method="Frob"), grpc.StatusCode.UNIMPLEMENTED),
        (pb.CallFrame(call=1, method="WorkerStream"), grpc.StatusCode.UNIMPLEMENTED),
        (pb.CallFrame(call=1, method="GetStatus", message=b"\xff"), grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["unknown", "stream", "malformed"],
)
async def test_a_wrong_request_is_refused(server: EngineServer, frame: pb.CallFrame, code: grpc.StatusCode) -> None:
    async with RawStream(server.address) as raw:
        await raw.send(frame)
        (answer,) = await raw.read()
        assert (answer.call, answer.status) == (1, code.value[0])


async def test_a_number_that_is_in_use_ends_the_stream(server: EngineServer) -> None:
    async with RawStream(server.address) as raw:
        poll = pb.PollRequest(worker_id="w", version_hash="v1", wait_ms=LONG_MS)
        await raw.send(request_frame(1, "PollTask", poll), request_frame(1, "PollTask", poll))
        with pytest.raises(grpc.aio.AioRpcError, match="the stream already has a call with the number 1"):
            await raw.read()


async def test_call_that_is_cancelled_in_the_same_message_is_not_made(server: EngineServer) -> None:
    async with RawStream(server.address) as raw:
        cancelled = request_frame(1, "RegisterWorkflow", WORKFLOW)
        await raw.send(cancelled, pb.CallFrame(call=1, cancel=True))
        await raw.send(request_frame(2, "ListWorkflowVersions", pb.ListVersionsRequest(workflow_id="w")))
        (answer,) = await raw.read()
        assert (answer.call, answer.status) == (2, 0)
        assert not pb.ListVersionsResponse.FromString(answer.message).versions


async def test_too_many_calls_of_a_stream_are_refused(server: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_STREAM_CALLS", 3)
    poll = pb.PollRequest(worker_id="w", version_hash="v1", wait_ms=LONG_MS)
    async with RawStream(server.address) as raw:
        await raw.send(*(request_frame(number, "PollTask", poll) for number in range(1, 5)))
        (answer,) = await raw.read()
        assert (answer.call, answer.error) == (4, "Overloaded")


# ---- Callers and streams that end ------------------------------------------------------------------------------------


async def poll_that_waits(stub: Any) -> asyncio.Task[Any]:
    """Begin a poll; return when the server has received it."""
    poll = pb.PollRequest(worker_id="w", version_hash="v1", wait_ms=LONG_MS)
    polling: asyncio.Task[Any] = asyncio.ensure_future(stub.PollTask(poll))
    await asyncio.sleep(0)  # so that the poll is sent before the next call
    await stub.GetServerInfo(pb.EmptyRequest())
    return polling


async def until_no_poll_waits(server: EngineServer) -> None:
    while server.polls._polls_of_worker:  # noqa: ASYNC110 - no event is set when a poll ends
        await asyncio.sleep(0)


async def test_a_task_goes_to_the_next_poll_after_a_caller_is_cancelled(server: EngineServer, stub: Any) -> None:
    async with connected(server.address) as (other, _):
        cancelled = await poll_that_waits(stub)
        living = await poll_that_waits(other)
        cancelled.cancel()
        await asyncio.sleep(0)  # so that the cancellation is sent before the start
        execution_id = await started(stub)
        assert (await asyncio.wait_for(living, SOON)).execution_id == execution_id


async def test_a_task_goes_to_the_next_poll_after_a_stream_breaks(server: EngineServer, stub: Any) -> None:
    async with connected(server.address) as (other, _):
        broken = await poll_that_waits(other)
    with pytest.raises(grpc.aio.AioRpcError, match="the connection was closed"):
        await broken
    await asyncio.wait_for(until_no_poll_waits(server), SOON)
    execution_id = await started(stub)
    task = await stub.PollTask(pb.PollRequest(worker_id="w2", version_hash="v1", wait_ms=LONG_MS), timeout=SOON)
    assert task.execution_id == execution_id


def report_frame(call: int, task: pb.PollResponse) -> pb.CallFrame:
    return request_frame(call, "CompleteTask", pb.CompleteRequest(task_id=task.task_id, output_json="1"))


POLL = pb.PollRequest(worker_id="w", version_hash="v1", wait_ms=LONG_MS)


@asynccontextmanager
async def holding_a_task(server: EngineServer, stub: Any, *more: pb.CallFrame) -> AsyncIterator[tuple[RawStream, Any]]:
    """Yield a stream, and the task that call 1 on it has got. The frames `more` are sent with call 1."""
    await started(stub)
    async with RawStream(server.address) as raw:
        await raw.send(request_frame(1, "PollTask", POLL), *more)
        (handed_out,) = await raw.read()
        yield raw, pb.PollResponse.FromString(handed_out.message)


@pytest.fixture
def _long_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an answer that may wait for another one wait longer than a test."""
    monkeypatch.setattr(calls, "ACK_DELAY", 2 * SOON)


@pytest.mark.usefixtures("_long_delay")
async def test_the_answer_to_a_report_shares_a_message_with_the_next_task(server: EngineServer, stub: Any) -> None:
    async with holding_a_task(server, stub) as (raw, task):
        await raw.send(report_frame(2, task), request_frame(3, "PollTask", POLL))
        execution = await stub.GetExecution(
            pb.GetExecutionRequest(execution_id=task.execution_id, wait_ms=LONG_MS), timeout=SOON
        )
        assert execution.status == "COMPLETED"
        next_id = await started(stub)
        answer, next_task = await raw.read()
        assert pb.AckResponse.FromString(answer.message).ok
        assert pb.PollResponse.FromString(next_task.message).execution_id == next_id
        assert (answer.call, next_task.call) == (2, 3)


async def test_the_answer_to_a_report_is_sent_without_a_next_task(server: EngineServer, stub: Any) -> None:
    async with holding_a_task(server, stub) as (raw, task):
        await raw.send(report_frame(2, task), request_frame(3, "PollTask", POLL))
        assert [frame.call for frame in await raw.read()] == [2]


@pytest.mark.usefixtures("_long_delay")
async def test_the_answer_to_a_report_does_not_wait_for_another_workers_poll(server: EngineServer, stub: Any) -> None:
    async with holding_a_task(server, stub, request_frame(2, "PollTask", POLL)) as (raw, task):
        await raw.send(report_frame(3, task))
        assert [frame.call for frame in await raw.read()] == [3]


@pytest.mark.usefixtures("_long_delay")
async def test_the_answer_to_a_report_without_a_waiting_poll_does_not_wait(server: EngineServer, stub: Any) -> None:
    async with holding_a_task(server, stub) as (raw, task):
        await raw.send(report_frame(2, task))
        assert [frame.call for frame in await raw.read()] == [2]


async def test_a_late_answer_is_a_deadline_error_and_the_stream_continues(server: EngineServer, stub: Any) -> None:
    server.watch(listing.list_executions, hangs)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListExecutions(pb.ListRequest(), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not (await stub.ListExecutions(pb.ListRequest(), timeout=SOON)).executions


async def test_calls_open_a_new_stream_after_the_server_has_restarted(tmp_path: Path) -> None:
    async with engine_server(tmp_path) as first:
        client = NexumClient(first.address)
        await client.list_executions()
    async with client:
        with pytest.raises(ServerUnavailable):
            await client.list_executions()
        async with engine_server(tmp_path, port=int(first.address.rpartition(":")[2])):
            await client.ping(patience=SOON)


async def test_a_large_answer_counts_until_its_client_has_read_it() -> None:
    """If an unread answer didn't count, a thousand clients that don't read would fill the server's memory."""
    ended = asyncio.Event()

    async def large(_: object, context: calls.CallContext) -> pb.ServerInfo:
        context.add_done_callback(lambda _: ended.set())
        return pb.ServerInfo(database="x" * MIB)

    async def requests() -> AsyncIterator[pb.CallFrames]:
        yield pb.CallFrames(frames=[pb.CallFrame(call=1, method="GetServerInfo")])

    answers = calls.CallStreams({"GetServerInfo": large}, 1).serve(requests(), ())
    await anext(answers)
    for _ in range(50):
        await asyncio.sleep(0)
    assert not ended.is_set()
    parts = [frame async for frames in answers for frame in frames.frames]
    assert ended.is_set()
    assert [frame.more for frame in parts] == [True] * (len(parts) - 1) + [False]


async def test_server_reads_no_further_calls_while_nobody_reads_its_refusals() -> None:
    """If the server read on, its unread refusals could fill its memory."""
    count, sent = 3000, 0
    may_end = asyncio.Event()

    async def waits(_: object, context: calls.CallContext) -> pb.ServerInfo:
        await may_end.wait()
        return pb.ServerInfo()

    async def requests() -> AsyncIterator[pb.CallFrames]:
        nonlocal sent
        for sent in range(1, count + 1):
            method = "GetServerInfo" if sent == 1 else "x" * 200
            yield pb.CallFrames(frames=[pb.CallFrame(call=sent, method=method)])

    # The server handles `places` calls at a time, and the first call waits until the test's end. All other calls name a
    # method that doesn't exist. With two places, the server refuses them because of the method. With one place, it
    # refuses them as too many.
    for places in (2, 1):
        may_end.clear()
        answers = calls.CallStreams({"GetServerInfo": waits}, places).serve(requests(), ())
        frames = list((await anext(answers)).frames)
        for _ in range(2 * count):
            await asyncio.sleep(0)
        assert 1 < sent < count / 2
        may_end.set()
        frames += [frame async for more in answers for frame in more.frames]
        assert sorted(frame.call for frame in frames) == list(range(1, count + 1))
        assert [frame.call for frame in frames if not frame.status] == [1]
        assert max(len(frame.details) for frame in frames) < 200


async def test_an_answer_that_nobody_reads_is_dropped_and_its_client_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "ANSWER_BUDGET", 8 * MIB)
    monkeypatch.setattr(bounds, "ANSWER_TIMEOUT", 2.0)
    async with engine_server(tmp_path) as server, connected(server.address) as (stub, _):
        await stub.RegisterWorkflow(WORKFLOW)
        request = pb.GetExecutionRequest(execution_id=await started(stub, 3 * MIB))
        # By default, grpcio accepts a few MiB before the program reads them.
        async with RawStream(server.address, SMALL_WINDOW) as unread:
            await unread.send(request_frame(1, "GetExecution", request))
            assert (await unread.read())[0].more  # the answer is on its way; the rest of it stays unread
            begun = time.monotonic()
            # The budget has room for one such answer. So this call succeeds only after the unread answer is dropped.
            assert len((await stub.GetExecution(request, timeout=20)).input_json) > 3 * MIB
            assert time.monotonic() - begun > 1
            while (frame := (await unread.read())[-1]).more:
                pass
            assert (frame.call, frame.status, frame.error) == (
                1,
                grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
                "Overloaded",
            )
            assert frame.retry_after_ms


UNCLOSED = """
import asyncio, sys
from nexum_engine.client import NexumClient
client = NexumClient(sys.argv[1])
for _ in range(10):
    asyncio.run(client.ping())
"""
CLOSED = """
import asyncio, sys
from nexum_engine.client import NexumClient
async def ping():
    async with NexumClient(sys.argv[1]) as client:
        await client.list_executions()
for _ in range(400):
    asyncio.run(ping())
"""


READ_TOO_LATE = """
import asyncio, gc, sys
from nexum_engine.client import NexumClient
async def main():
    loop = asyncio.get_running_loop()
    async with NexumClient(sys.argv[1]) as client:
        await client.list_executions()
        [reader] = [key.data[0] for key in loop._selector.get_map().values() if "_handle_events" in repr(key.data[0])]
        read, arguments = reader._callback, reader._args
    gc.collect()  # frees the channel
    try:
        read(*arguments)
    except OSError as error:
        assert "Bad file descriptor" in str(error)
        loop.call_soon(read, *arguments)  # as if the event loop of another thread had just begun to read
        await asyncio.sleep(0)
    else:
        print("no error")  # in a newer grpcio
asyncio.run(main())
"""


@pytest.mark.parametrize(
    "program",
    [UNCLOSED, CLOSED, pytest.param(READ_TOO_LATE, marks=pytest.mark.skipif(sys.platform == "win32", reason="POSIX"))],
    ids=["unclosed", "closed", "read-too-late"],
)
async def test_a_client_prints_nothing_when_its_event_loops_end(server: EngineServer, program: str) -> None:
    """Without the client's precautions, grpcio reports to a closed loop, and the next loop prints a traceback."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, server.address),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 3 * SOON)
    assert (process.returncode, errors) == (0, b"")
    if output:
        pytest.skip("this grpcio reads a closed socket without an error")
