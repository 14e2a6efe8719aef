"""Heartbeat: the stream of a worker or owner is reopened when it breaks, is refused or gets no answers."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from engine_server import EngineServer, engine_server, hangs, is_full, raises
from faulty_proxy import FaultyProxy
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived
from h2.exceptions import ProtocolError

from nexum_engine import heartbeat
from nexum_engine.client import NexumClient
from nexum_engine.errors import (
    InvalidRequest,
    NexumError,
    ServerError,
    ServerFault,
    ServerNotReady,
    ServerUnavailable,
)
from nexum_engine.heartbeat import SECOND_BEAT_AFTER, Heartbeat
from nexum_engine.owner import Owner
from nexum_engine.records import ExecutionStatus, Outcome
from nexum_engine.store import leases, listing
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow

SOON = 15.0  # seconds; less than half a lease
ONE = workflow("one").effect("a").build()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EngineServer]:
    async with engine_server(tmp_path) as running:
        yield running


class Beating:
    """A running heartbeat, with the errors that it reported."""

    def __init__(self, client: NexumClient, worker_id: str = "w1") -> None:
        self.lost: list[NexumError] = []
        self.heart = Heartbeat(client.connection, worker_id, on_lost=self.lost.append)
        self.run = asyncio.create_task(self.heart.run())

    async def connected(self) -> None:
        await asyncio.wait_for(self.heart.connected.wait(), SOON)


@asynccontextmanager
async def beating(address: str, worker_id: str = "w1") -> AsyncIterator[Beating]:
    async with NexumClient(address) as client:
        running = Beating(client, worker_id)
        try:
            yield running
        finally:
            running.run.cancel()
            await asyncio.gather(running.run, return_exceptions=True)


async def until(happened: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + SOON
    while not happened():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


async def test_heartbeat_reports_server_fault_and_reconnects(server: EngineServer) -> None:
    server.watch(leases.renew, raises, raises)
    async with beating(server.address) as beats:
        await beats.connected()
        assert server.calls[leases.renew] > 2
        # Two equal errors in a row are reported once.
        assert [type(error) for error in beats.lost] == [ServerFault]
        assert "see its log under" in str(beats.lost[0])


async def test_heartbeat_reports_failing_database_as_server_not_ready(
    server: EngineServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.watch(leases.renew, is_full)
    stop = asyncio.Event()

    async def handler(task: TaskContext) -> str:
        return "done"

    async with NexumClient(server.address) as client:
        worker = asyncio.create_task(Worker(client, [Binding(ONE, {"a": handler})]).run(stop))
        await client.register_workflow(ONE)
        assert (await client.start_execution(ONE, {}, wait=SOON)).ended is not None
        stop.set()
        await asyncio.wait_for(worker, SOON)
        server.watch(listing.list_executions, is_full, is_full)
        with pytest.raises(ServerNotReady, match="can't do this now: the database could not confirm"):
            await client.list_executions()
        assert (await client.list_executions(patience=SOON))[0].workflow_id == "one"
        assert server.calls[listing.list_executions] == 3
    (line,) = [one.getMessage() for one in caplog.records if one.name == "nexum_engine.worker"]
    assert line.startswith(f"not connected to {server.address}, retrying: the Nexum server on {server.address} can't")


async def test_refused_worker_id_ends_heartbeat_with_the_servers_reason(server: EngineServer) -> None:
    async with beating(server.address, "x" * 300) as beats:
        with pytest.raises(InvalidRequest, match="worker_id has 300 characters; the limit is 200"):
            await asyncio.wait_for(beats.run, SOON)


async def test_stream_without_first_answer_is_reopened(server: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "FIRST_ACK_TIMEOUT", 0.2)
    server.watch(leases.renew, hangs)
    async with beating(server.address) as beats:
        await beats.connected()
        assert server.calls[leases.renew] >= 2
        assert [str(error) for error in beats.lost] == [
            f"the server on {server.address} did not answer a heartbeat within 0.2 s"
        ]


async def test_silent_stream_is_reopened_before_the_lease_runs_out(tmp_path: Path) -> None:
    async with engine_server(tmp_path, lease=4.5) as server, beating(server.address) as beats:
        await beats.connected()
        server.watch(leases.renew, hangs)
        beats.heart.beat()
        await until(lambda: server.calls[leases.renew] >= 2)
        await beats.connected()
        assert [type(error) for error in beats.lost] == [ServerError]
        assert "within 1.5 s" in str(beats.lost[0])


async def test_heartbeats_keep_a_lease_shorter_than_second_heartbeat_delay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The lease must be shorter than the delay. Lengthen the delay, because a busy machine would lose a shorter lease.
    monkeypatch.setattr("nexum_engine.heartbeat.SECOND_BEAT_AFTER", 4.0)
    async with engine_server(tmp_path, lease=2.5) as server, NexumClient(server.address) as client:
        await client.register_workflow(ONE)
        started = await client.start_execution(ONE, {})
        async with beating(server.address) as beats:
            await beats.connected()
            task = await client.poll_task("w1", [ONE.version_hash], wait=1)
            assert task is not None
            beats.heart.hold(task.task_id)
            server.watch(leases.renew)
            await until(lambda: server.calls[leases.renew] >= 5)
            execution = (await client.get_execution(started.execution_id, with_attempts=True)).execution
            assert [one.outcome for one in execution.nodes[0].attempts] == [Outcome.RUNNING]


async def test_owner_keeps_its_task_beyond_its_lease(tmp_path: Path) -> None:
    async with (
        engine_server(tmp_path, lease=2.5) as server,  # a busy machine would lose a shorter lease
        NexumClient(server.address) as client,
        Owner(client) as owner,
    ):
        owned = await owner.start(ONE, {}, idempotency_key="k")
        assert owned.task is not None
        server.watch(leases.renew)
        await until(lambda: server.calls[leases.renew] >= 5)
        execution = (await client.get_execution(owned.execution_id, with_attempts=True)).execution
        assert [one.outcome for one in execution.nodes[0].attempts] == [Outcome.RUNNING]
        await owner.complete(owned.task, {"done": True})
        assert (await client.get_execution(owned.execution_id)).execution.status is ExecutionStatus.COMPLETED


async def test_second_heartbeat_follows_soon_after_connecting(
    server: EngineServer,
) -> None:
    server.watch(leases.renew)
    async with beating(server.address) as beats:
        await beats.connected()
        await asyncio.wait_for(until(lambda: server.calls[leases.renew] >= 2), 5)


async def test_requested_heartbeat_is_followed_by_another_one_soon(server: EngineServer) -> None:
    async with beating(server.address) as beats:
        await beats.connected()
        server.watch(leases.renew)
        await asyncio.wait_for(until(lambda: server.calls[leases.renew] >= 1), 5)
        await asyncio.sleep(2 * SECOND_BEAT_AFTER)
        assert server.calls[leases.renew] == 1
        beats.heart.beat()
        await asyncio.wait_for(until(lambda: server.calls[leases.renew] >= 3), 5)


async def test_heartbeat_reports_missing_server_and_finds_later_one(tmp_path: Path) -> None:
    async with engine_server(tmp_path) as server:
        address = server.address
    async with beating(address) as beats:
        await until(lambda: bool(beats.lost))
        assert [type(error) for error in beats.lost] == [ServerUnavailable]
        assert not beats.heart.connected.is_set()


async def test_heartbeats_of_a_process_share_a_connection(server: EngineServer) -> None:
    with FaultyProxy(server.address) as proxy:
        async with AsyncExitStack() as stack:
            several = [await stack.enter_async_context(beating(proxy.address, f"w{number}")) for number in range(5)]
            for beats in several:
                await beats.connected()
            assert proxy.connections == 1
            several[0].run.cancel()
            await asyncio.gather(several[0].run, return_exceptions=True)
            proxy.break_connections()
            await until(lambda: all(beats.lost for beats in several[1:]))
            for beats in several[1:]:
                await beats.connected()
            assert proxy.connections == 1
        await until(lambda: proxy.connections == 0)


def cut_off(http: H2Connection, stream: int) -> None:
    http.send_headers(stream, GRPC_HEADERS)
    http.send_data(stream, b"\0\0\0\0\tab", end_stream=True)


def compressed(http: H2Connection, stream: int) -> None:
    http.send_headers(stream, GRPC_HEADERS)
    http.send_data(stream, b"\1\0\0\0\2ab")


def not_in_ascii(http: H2Connection, stream: int) -> None:
    http.send_headers(stream, [*GRPC_HEADERS, (b"grpc-status", b"2"), (b"x-y", b"\xff")], end_stream=True)


GRPC_HEADERS = [(b":status", b"200"), (b"content-type", b"application/grpc")]
UNKNOWN_FRAME = b"\0\0\4\xfa\0\0\0\0\0news"


@asynccontextmanager
async def another_server(answer: Callable[[H2Connection, int], None] | None) -> AsyncIterator[str]:
    """Run an HTTP/2 server that isn't Nexum's, and yield its address. Without `answer`, it resets connections."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is None:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            return
        http = H2Connection(H2Configuration(client_side=False, header_encoding=None, validate_outbound_headers=False))
        http.initiate_connection()
        writer.write(http.data_to_send() + UNKNOWN_FRAME)
        # The client also tries TLS. asyncio would log an error of this task, and its cancellation.
        with suppress(asyncio.CancelledError, ProtocolError):
            while data := await reader.read(65536):
                for event in http.receive_data(data):
                    if isinstance(event, RequestReceived):
                        answer(http, event.stream_id)
                writer.write(http.data_to_send())
        writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()


@pytest.mark.every_python
@pytest.mark.parametrize("answer", [None, cut_off, compressed, not_in_ascii])
async def test_heartbeat_continues_after_any_answer_of_another_program(
    answer: Callable[[H2Connection, int], None] | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(heartbeat, "REPORT_AGAIN_AFTER", 0.0)
    async with another_server(answer) as address, beating(address) as beats:
        await until(lambda: len(beats.lost) >= 12)
        assert {type(error) for error in beats.lost} == {ServerUnavailable}
    assert not caplog.records


async def test_heartbeat_ignores_frames_of_unknown_types(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heartbeat, "FIRST_ACK_TIMEOUT", 0.5)
    async with another_server(lambda *_: None) as address, beating(address) as beats:
        await until(lambda: bool(beats.lost))
        assert "did not answer a heartbeat within 0.5 s" in str(beats.lost[0])
    assert not caplog.records


async def test_worker_and_owner_work_after_unanswered_first_streams(
    server: EngineServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(heartbeat, "FIRST_ACK_TIMEOUT", 0.2)
    server.watch(leases.renew, hangs, hangs)

    async def handler(task: TaskContext) -> str:
        return "done"

    async with NexumClient(server.address) as client, Owner(client) as owner:
        assert server.calls[leases.renew] > 2
        owned = await owner.start(workflow("owned").effect("a").build(), {}, idempotency_key="k")
        assert owned.task is not None
        server.watch(leases.renew, hangs)
        stop = asyncio.Event()
        worker = asyncio.create_task(Worker(client, [Binding(ONE, {"a": handler})], worker_id="w1").run(stop))
        await client.register_workflow(ONE)
        started = await client.start_execution(ONE, {}, wait=SOON)
        assert started.ended is not None
        assert started.ended.outputs() == {"a": '"done"'}
        stop.set()
        await asyncio.wait_for(worker, SOON)
    assert "did not answer a heartbeat" in caplog.text


async def test_sweep_continues_after_a_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with engine_server(tmp_path, lease=0.2) as server, NexumClient(server.address) as client:
        await client.register_workflow(ONE)
        await client.start_execution(ONE, {})
        server.watch(leases.sweep, raises)
        assert await client.poll_task("dies", [ONE.version_hash], wait=1) is not None
        task = await client.poll_task("w1", [ONE.version_hash], wait=SOON)
        assert server.calls[leases.sweep] > 1
    assert task is not None
    assert task.attempt == 2
    assert "could not end the attempts whose lease has run out" in caplog.text
    assert "RuntimeError: a bug" in caplog.text


async def test_worker_keeps_its_task_over_an_outage_of_the_store_that_is_longer_than_its_lease(tmp_path: Path) -> None:
    async with engine_server(tmp_path, lease=0.5) as server, NexumClient(server.address) as client:
        await client.register_workflow(ONE)
        await client.start_execution(ONE, {})
        task = await client.poll_task("w1", [ONE.version_hash], wait=SOON)
        assert task is not None
        waiting = asyncio.create_task(client.poll_task("w2", [ONE.version_hash], wait=SOON))
        server.watch(leases.sweep, is_full, is_full)
        while server.calls[leases.sweep] < 3:  # noqa: ASYNC110 - the third one is the first after the outage
            await asyncio.sleep(0.01)
        async with beating(server.address) as worker:
            worker.heart.hold(task.task_id)
            while server.calls[leases.sweep] < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert not waiting.done()
            await client.complete_task(task.task_id, "1")
        waiting.cancel()


@asynccontextmanager
async def slow_line(port: int, delay: float) -> AsyncIterator[str]:
    """Yield an address through which the server's data arrive `delay` seconds late."""
    pumps: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait: float) -> None:
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(wait)
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def both() -> None:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pump(reader, back, 0), pump(there, writer, delay))

        pumps.add(asyncio.create_task(both()))

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        for one in pumps:
            one.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def test_client_reaches_server_that_accepts_connections_slowly(server: EngineServer) -> None:
    """Receive all data of the server a second late, as from a busy machine or through a tunnel."""
    async with slow_line(int(server.address.rpartition(":")[2]), 1.0) as address, NexumClient(address) as client:
        await client.ping(patience=SOON)


async def test_is_holding_lasts_half_a_lease_after_an_answered_heartbeat(
    server: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with beating(server.address) as beats:
        holding = [beats.heart.is_holding]
        await beats.connected()
        holding.append(beats.heart.is_holding)
        now = time.monotonic()
        for later in (14.0, 15.1):
            # Move the time, as if the process had been stopped and had not sent its next heartbeat yet.
            monkeypatch.setattr("nexum_engine.heartbeat.time.monotonic", lambda later=later: now + later)
            holding.append(beats.heart.is_holding)
        monkeypatch.undo()
        holding.append(beats.heart.is_holding)
    assert [*holding, beats.heart.is_holding] == [False, True, True, False, True, False]
