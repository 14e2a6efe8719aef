"""When a server has reached its limit of waiting tasks or of calls, it refuses more, and says when to retry."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from nexum_wire import complete, connected, poll, register, start
from server_thread import folders_of_one_database, server_thread

from nexum_engine import connection
from nexum_engine.client import NexumClient
from nexum_engine.connection import MAX_PAUSE, RECONNECT_DELAY, pause_after
from nexum_engine.errors import ServerNotReady, ServerUnavailable
from nexum_engine.owner import Owner
from nexum_engine.server import Limits
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.status import CUT_OFF, TOO_MANY_RPCS, error_of, rpc_error
from nexum_engine.workflow import workflow

ONE = workflow("one").effect("a").build()


def full(call: Any) -> tuple[str, dict[str, Any]]:
    """Return the details and the trailing metadata of a call that a full server must refuse."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return error.details(), dict(error.trailing_metadata())


def test_full_queue_refuses_new_executions_only(tmp_path: Path) -> None:
    with server_thread(tmp_path, limits=Limits(queue=3)) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        first = start(stub, idempotency_key="k0")
        for number in (1, 2):
            start(stub, idempotency_key=f"k{number}")
        details, trailing = full(lambda: start(stub, idempotency_key="k3"))
        assert details.startswith("at least 3 tasks wait for workers, which is the limit of this server (--max-queue)")
        assert (trailing["nexum-error"], trailing["grpc-retry-pushback-ms"]) == ("Overloaded", "1000")
        # The full server still finds an existing execution, and still starts an execution that needs no worker.
        assert start(stub, idempotency_key="k0") == first
        request = pb.StartRequest(workflow_id="w", version_hash="v1", input_json="1", owner="me", idempotency_key="own")
        assert stub.StartExecution(request, timeout=20).task.has_task


async def test_client_waits_with_jitter_and_starts_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    has_paused_twice = asyncio.Event()

    def note(error: Exception, refusals: int) -> float:
        pauses.append(pause_after(error, refusals))
        if len(pauses) == 2:
            has_paused_twice.set()
        return 0.05

    monkeypatch.setattr(connection, "pause_after", note)
    with server_thread(tmp_path, limits=Limits(queue=1)) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        async with NexumClient(server.address) as client:
            await client.register_workflow(ONE)
            await client.start_execution(ONE, {}, idempotency_key="first")
            with pytest.raises(ServerNotReady, match="can't do this now: at least 1 tasks wait") as caught:
                await client.start_execution(ONE, {}, idempotency_key="second")
            assert caught.value.retry_after == 1.0
            waiting = asyncio.create_task(client.start_execution(ONE, {}, idempotency_key="second", patience=60))
            await asyncio.wait_for(has_paused_twice.wait(), 20)
            assert not waiting.done()
            task = await asyncio.to_thread(poll, stub, "worker", ONE.version_hash)
            await asyncio.to_thread(complete, stub, task)
            assert not (await asyncio.wait_for(waiting, 20)).existing
            async with Owner(client) as owner:  # the full server still answers heartbeats
                assert owner._heartbeat.is_holding
    assert all(0.5 <= pause <= 1.5 * 2**number for number, pause in enumerate(pauses))


async def test_client_does_not_search_while_its_server_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[Any] = []
    monkeypatch.setattr(connection, "server_info_of", searches.append)
    monkeypatch.setattr(connection, "pause_after", lambda *_: 0.01)
    with server_thread(tmp_path, limits=Limits(queue=1)) as server:
        async with NexumClient(f"{server.address},127.0.0.1:1") as client:
            await client.register_workflow(ONE)
            await client.start_execution(ONE, {}, idempotency_key="first")
            with pytest.raises(ServerNotReady):
                await client.start_execution(ONE, {}, idempotency_key="second", patience=0.3)
    assert len(searches) == 1  # only at the start: the refusal caused no other search


def test_pauses_grow_differ_and_end_soon_enough() -> None:
    refusal = ServerNotReady("full", 1.0)
    assert pause_after(ServerUnavailable("gone"), 9) == pause_after(ServerNotReady("restarting"), 9) == RECONNECT_DELAY
    for refusals in (0, 1, 4, 50):
        pauses = {pause_after(refusal, refusals) for _ in range(100)}
        expected = min(2.0**refusals, MAX_PAUSE)
        assert len(pauses) > 50
        assert 0.5 * expected <= min(pauses) < max(pauses) <= 1.5 * expected


async def test_calls_of_all_streams_have_a_limit(tmp_path: Path) -> None:
    with server_thread(tmp_path, limits=Limits(calls=4)) as server:
        async with NexumClient(server.address) as one, NexumClient(server.address) as other:
            clients = (one, other, one, other, one)
            waits = [
                asyncio.create_task(client.poll_task(f"w{n}", ["v1"], wait=20)) for n, client in enumerate(clients)
            ]
            done, waiting = await asyncio.wait(waits, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            (refusal,) = [wait.exception() for wait in done]
            assert isinstance(refusal, ServerNotReady)
            assert "has reached its limit of calls: retry" in str(refusal)
            assert refusal.retry_after == 1.0
            for wait in waiting:
                wait.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await other.ping(patience=20)


def test_refusal_by_grpc_itself_is_retried() -> None:
    """The server's code never sees an RPC above gRPC's limit. So the client must know the refusal by gRPC's words."""
    error = error_of(rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MANY_RPCS), "here")
    assert isinstance(error, ServerNotReady)
    assert error.retry_after == 1.0


def test_stream_that_broke_while_a_request_was_sent_is_a_lost_connection() -> None:
    """grpcio reports it as `Internal error from Core`, although the server had no error."""
    for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE):
        error = error_of(rpc_error(code, CUT_OFF), "here")
        assert type(error) is ServerUnavailable
        assert str(error) == "the connection to the Nexum server on here broke"


def test_error_of_a_lost_connection_is_one_line() -> None:
    """The messages of Windows that gRPC passes on end with a line break."""
    refused = "Failed to connect (No connection could be made.\r\n -- 10061)"
    error = error_of(rpc_error(grpc.StatusCode.UNAVAILABLE, refused), "here")
    assert str(error).endswith("(Failed to connect (No connection could be made. -- 10061))")


async def test_server_with_too_many_rpcs_answers_in_these_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexum_engine.server.run.MAX_RPCS", 1)
    with server_thread(tmp_path) as server:
        async with NexumClient(server.address) as client, NexumClient(server.address) as other:
            await client.ping()  # opens a stream, which is an RPC
            with pytest.raises(ServerNotReady, match="Concurrent RPC limit exceeded"):
                await other.ping()


@pytest.mark.skipif(
    tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 84),
    reason="before 1.84, grpcio counts the RPCs of a closed connection until the next RPC comes",
)
async def test_client_leaves_a_server_with_too_many_rpcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.shuffle", lambda _: None)
    first_folder, second_folder = folders_of_one_database(tmp_path)
    with server_thread(second_folder) as two:
        monkeypatch.setattr("nexum_engine.server.run.MAX_RPCS", 1)
        with server_thread(first_folder) as one:
            async with NexumClient(f"{one.address},{two.address}") as client, NexumClient(one.address) as other:
                await client.ping()
                assert client.address == one.address
                await client.close()  # so that its next call opens a new stream, which `one` refuses
                await other.ping(patience=20)
                await client.ping(patience=20)
                assert client.address == two.address
