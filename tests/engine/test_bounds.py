"""The server's limits: it refuses large requests early, and limits the memory that all calls together may use."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine_server import EngineServer, engine_server
from harness import Server
from nexum_wire import UNLIMITED, complete, connected, output, poll, record, refused, register, say_large, start
from processes import wait_until

from nexum_engine import jsontext
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest, Overloaded, ServerNotReady, TooLarge
from nexum_engine.server import bounds
from nexum_engine.server.bounds import Budget
from nexum_engine.store import executions, listing, tasks
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub
from nexum_engine.workflow import parse_ir

SIXTEEN_MIB = 16 * 1024 * 1024
LARGE = json.dumps("x" * (SIXTEEN_MIB - 2))
MEMORY_LIMIT = 1_000_000  # kB


@pytest.fixture
def server(server_process: Server) -> Server:
    return server_process


@pytest.fixture
def stub(server: Server) -> Iterator[NexumServiceStub]:
    with connected(server.address, UNLIMITED) as stub:
        yield stub


# ---- Numbers and sizes -----------------------------------------------------------------------------------------------


def test_poll_for_too_many_versions_is_refused(stub: NexumServiceStub) -> None:
    assert not poll(stub, more_version_hashes=[f"v{n}" for n in range(99)]).has_task
    for count in (100, 4000):
        code, details = refused(lambda: poll(stub, more_version_hashes=[f"{n}" for n in range(count)]))  # noqa: B023
        assert (code, details) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the poll names {count + 1:,} versions; the limit is 100",
        )


def test_heartbeat_with_too_many_tasks_is_refused(stub: NexumServiceStub) -> None:
    beat = pb.WorkerBeat(worker_id="w", task_ids=["t"] * 4000)
    assert next(stub.WorkerStream(iter([beat]))).lease_ms
    beat.task_ids.append("t")
    code, details = refused(lambda: next(stub.WorkerStream(iter([beat]))))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "the heartbeat names 4,001 tasks; the limit is 4,000")


def call_raw(server: Server, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    with grpc.insecure_channel(server.address) as channel:
        if method == "WorkerStream":
            stream: Any = channel.stream_stream(f"/nexum.NexumService/{method}")
            return refused(lambda: next(stream(iter([data]))))
        call: Any = channel.unary_unary(f"/nexum.NexumService/{method}")
        return refused(lambda: call(data, timeout=20))


@pytest.mark.parametrize("method", ["PollTask", "GetStatus", "ListExecutions", "WorkerStream"])
def test_large_message_of_a_call_without_payload_is_refused(server: Server, method: str) -> None:
    code, details = call_raw(server, method, bytes(300_000))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == "the request is 300,000 bytes; the limit is 262,144 bytes"


@pytest.mark.parametrize(
    "text",
    [
        "[" + ",".join(["[]"] * 200_001) + "]",
        "[" + ",".join(['{"a":1}'] * 200_001) + "]",
        "[" + ",".join(['""'] * 200_001) + "]",
        json.dumps({f"k{n}": "v" for n in range(200_001)}),
        "[" * 1_000_000,
        '["' + '\\"' * 300_000 + '",' + ",".join(["1"] * 200_001) + "]",
    ],
    ids=["lists", "objects", "strings", "names", "open brackets", "after escapes"],
)
def test_json_with_too_many_values_is_refused(text: str) -> None:
    with pytest.raises(TooLarge, match="more than 200,000 values"):
        jsontext.parse(text, "input_json")


@pytest.mark.parametrize(
    "value", ["1,2,3\n" * 200_000, '"[{' * 200_000, "\\" * 300_000, list(range(190_000))], ids=lambda one: str(one)[:3]
)
def test_json_with_many_commas_in_strings_is_accepted(value: object) -> None:
    assert jsontext.parse(json.dumps(value), "input_json") == value


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a": [1, {"b": null}], "c": 2}', '{"c":2,"a":[1,{"b":null}]}', True),
        ("1", "1.0", False),
        ("1", "true", False),
        ("[1, 2]", "[2, 1]", False),
        ("[1]", "[1, 1]", False),
        ('{"a": 1}', '{"a": 1, "b": 1}', False),
        ('{"a": 1}', '{"b": 1}', False),
    ],
)
def test_json_texts_are_compared_by_value(one: str, other: str, same: bool) -> None:
    assert jsontext.same(one, other) is same


def test_outputs_of_one_execution_have_a_limit_in_total(stub: NexumServiceStub, server: Server, tmp_path: Path) -> None:
    register(stub, {f"n{n}": [] for n in range(5)})
    start(stub)
    for _ in range(3):
        complete(stub, poll(stub), LARGE)
    task = poll(stub)
    code, details = refused(lambda: complete(stub, task, LARGE))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "over the limit of 67,108,864 bytes" in details
    complete(stub, task, '"short"')


def test_workflow_with_too_many_dependencies_is_refused() -> None:
    nodes = {f"n{n}": {"type": "EFFECT", "dependencies": [f"n{m}" for m in range(n)][:100]} for n in range(200)}
    with pytest.raises(InvalidRequest, match="the limit is 10,000"):
        parse_ir(json.dumps({"nodes": nodes}))


# ---- Shared memory ---------------------------------------------------------------------------------------------------


async def test_budget_serves_calls_in_order() -> None:
    budget = Budget(10)
    assert await budget.take(8) == 8
    large, small = (asyncio.ensure_future(budget.take(units)) for units in (5, 1))
    await asyncio.sleep(0)
    assert not large.done()
    assert not small.done()
    budget.give(8)
    assert (await large, await small) == (5, 1)


async def test_budget_gives_all_to_a_call_that_wants_more() -> None:
    budget = Budget(10)
    assert await budget.take(1000) == 10


@pytest.mark.parametrize("served", [False, True])
async def test_cancelled_wait_takes_nothing_from_the_budget(served: bool) -> None:
    budget = Budget(10)
    await budget.take(10)
    first, second = (asyncio.ensure_future(budget.take(10)) for _ in range(2))
    await asyncio.sleep(0)
    if served:
        budget.give(10)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    if not served:
        budget.give(10)
    assert await asyncio.wait_for(second, 10) == 10


async def test_full_budget_raises_overloaded() -> None:
    budget = Budget(10, max_waiting=10)
    await budget.take(10)
    with pytest.raises(Overloaded, match="retry"):
        await budget.take(1, patience=0.01)
    waiting = asyncio.ensure_future(budget.take(10))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="retry"):
        await budget.take(1)
    waiting.cancel()


async def test_client_retries_a_call_that_the_server_has_no_room_for(tmp_path: Path) -> None:
    async def has_no_room() -> None:
        raise Overloaded("too much: retry")

    async with engine_server(tmp_path) as server, NexumClient(server.address) as client:
        server.watch(listing.list_executions, has_no_room, has_no_room)
        with pytest.raises(ServerNotReady, match="too much: retry"):
            await client.list_executions()
        assert await client.list_executions(patience=20) == []
        assert server.calls[listing.list_executions] == 3


def peak_memory(server: Server) -> int:
    status = Path(f"/proc/{server.process.popen.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads the server's memory from /proc")


@needs_proc
def test_many_large_requests_at_once_take_bounded_memory(server: Server, stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    say_large(stub)

    def send(_: int) -> str:
        try:
            return start(stub, LARGE)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(send, range(40)))
    started = [one for one in answers if one.startswith("exec-")]
    assert {one for one in answers if one not in started} <= {f"RESOURCE_EXHAUSTED: {bounds._OVERLOADED}"}
    assert peak_memory(server) < MEMORY_LIMIT
    assert output(stub, started[-1], "") == LARGE


@needs_proc
def test_clients_that_do_not_read_take_bounded_memory(server: Server, stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    say_large(stub)
    start(stub, LARGE)
    request = pb.ListRequest(with_nodes=True)
    with ExitStack() as stack:
        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        calls = []
        for _ in range(40):
            channel = stack.enter_context(grpc.insecure_channel(server.address, options=options))
            # Call the method as if its answer were a stream: gRPC doesn't read a stream until the program asks for it.
            method: Any = channel.unary_stream(
                "/nexum.NexumService/ListExecutions", request_serializer=pb.ListRequest.SerializeToString
            )
            calls.append(method(request))
        # The server sends a few answers, which nobody reads, and refuses the other calls.
        wait_until(lambda: sum(not call.is_active() for call in calls) >= 30, "the server refuses", timeout=60)
        assert start(stub)  # small calls are still answered
        assert peak_memory(server) < MEMORY_LIMIT


async def large_execution(server: EngineServer, channel: grpc.aio.Channel) -> tuple[Any, str]:
    stub: Any = NexumServiceStub(channel)
    nodes = json.dumps({"nodes": {"a": {"type": "EFFECT"}}})
    await stub.RegisterWorkflow(pb.WorkflowIR(workflow_id="w", version_hash="v1", ir_json=nodes))
    request = pb.StartRequest(workflow_id="w", version_hash="v1", input_json=json.dumps("x" * 1_000_000))
    return stub, (await stub.StartExecution(request)).execution_id


async def test_unread_answer_is_dropped_and_its_share_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "ANSWER_BUDGET", 1_000_000)
    monkeypatch.setattr(bounds, "ANSWER_TIMEOUT", 0.5)
    async with engine_server(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub, execution_id = await large_execution(server, channel)
        request = pb.GetExecutionRequest(execution_id=execution_id)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(server.address, options=options) as other:
            unread: Any = other.unary_stream(
                "/nexum.NexumService/GetExecution", request_serializer=pb.GetExecutionRequest.SerializeToString
            )(request)
            await unread.initial_metadata()
            assert not unread.done()
            assert len((await stub.GetExecution(request, timeout=20)).input_json) > 1_000_000
            unread.cancel()


async def test_requests_whose_callers_gave_up_count_until_the_store_has_run_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "REQUEST_BUDGET", 2 * bounds.REQUEST_COPIES * 1_010_000)
    async with engine_server(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub, _ = await large_execution(server, channel)
        goes_on = threading.Event()
        blocking = server.store.run(lambda _: goes_on.wait())
        server.watch(executions.start_execution)
        try:
            for _ in range(5):
                request = pb.StartRequest(workflow_id="w", version_hash="v1", input_json=json.dumps("x" * 1_000_000))
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.StartExecution(request, timeout=0.5)
                assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert server.calls[executions.start_execution] == 2
        finally:
            goes_on.set()
        await blocking
        await stub.StartExecution(request, timeout=20)


async def test_calls_that_send_no_request_do_not_keep_others_out(tmp_path: Path) -> None:
    async with engine_server(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        silent: list[Any] = [channel.stream_unary("/nexum.NexumService/GetServerInfo")() for _ in range(40)]
        await asyncio.gather(*(call.wait_for_connection() for call in silent))
        stub: Any = NexumServiceStub(channel)
        for _ in range(3):
            await stub.GetServerInfo(pb.EmptyRequest(), timeout=20)
        for call in silent:
            call.cancel()


# ---- Large payloads --------------------------------------------------------------------------------------------------


def test_large_task_reaches_worker_and_caller_whole(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    say_large(stub)
    with ThreadPoolExecutor(2) as pool:
        polling = pool.submit(poll, stub, wait_ms=20_000, max_task_bytes=2**40)
        execution_id = start(stub, LARGE)
        task = polling.result()
        assert json.loads(task.input_json) == {"input": json.loads(LARGE), "deps": {}}
        waiting = pool.submit(record, stub, execution_id, wait_ms=20_000)
        complete(stub, task, LARGE)
        ended = waiting.result()
    assert (ended.status, ended.input_json, ended.nodes[0].output_json) == ("COMPLETED", "", "")
    assert ended.input_bytes == ended.nodes[0].output_bytes == len(LARGE)
    assert output(stub, execution_id, "") == output(stub, execution_id, "a") == LARGE


async def test_task_of_a_poll_that_ends_before_its_input_is_read_goes_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_server(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        reading = asyncio.Event()

        async def reads_for_ever() -> None:
            reading.set()
            await asyncio.Event().wait()

        server.watch(tasks.with_payload, reads_for_ever)
        stub, _ = await large_execution(server, channel)
        request = pb.PollRequest(worker_id="w", version_hash="v1", max_task_bytes=2**40)
        holding = stub.PollTask(request)
        await reading.wait()
        holding.cancel()
        task = await stub.PollTask(pb.PollRequest(worker_id="w", version_hash="v1", max_task_bytes=2**40, wait_ms=9000))
        assert (task.attempt, len(task.input_json) > 1_000_000) == (2, True)
