"""This project's additions to the wire: long polls, calls that wait for the end of an execution, and heartbeats."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import harness
import pytest
from google.protobuf.descriptor import FieldDescriptor
from harness import ROOT, Server, free_port, nexum_server, run_to_end
from nexum_wire import (
    DEADLINE,
    Stream,
    cancelled,
    complete,
    connected,
    poll,
    record,
    refused,
    register,
    start,
    until_polled,
)

from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

LONG_MS = 25_000
AT_ONCE = 2.0  # seconds; much less than LONG_MS


@pytest.fixture
def stub(address: str) -> Iterator[NexumServiceStub]:
    with connected(address) as connection:
        yield connection


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


# ---- Long polls ------------------------------------------------------------------------------------------------------


def test_long_poll_gets_a_task_at_once(stub: NexumServiceStub, pool: ThreadPoolExecutor) -> None:
    register(stub, {"a": []})
    probe = cancelled(stub)
    assert not record(stub, probe).has_poller
    waiting = pool.submit(poll, stub, wait_ms=LONG_MS)
    until_polled(stub, probe)
    began = time.monotonic()
    execution_id = start(stub)
    assert waiting.result(DEADLINE).execution_id == execution_id
    assert time.monotonic() - began < AT_ONCE


def test_long_poll_ends_without_task_after_its_wait(stub: NexumServiceStub) -> None:
    began = time.monotonic()
    assert not poll(stub, wait_ms=300).has_task
    assert 0.25 < time.monotonic() - began < AT_ONCE


def test_one_poll_takes_tasks_of_several_versions(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    register(stub, {"a": []}, version="v2")
    start(stub, version="v2")
    task = poll(stub, version="v1", more_version_hashes=["v2", "v2", "v1"])
    assert task.version_hash == "v2"
    assert not poll(stub, version="v1", more_version_hashes=["v2"]).has_task


def test_cancelled_poll_takes_no_task(stub: NexumServiceStub, pool: ThreadPoolExecutor) -> None:
    register(stub, {"a": []})
    probe = start(stub)
    complete(stub, poll(stub))
    for n in range(10):
        call = stub.PollTask.future(pb.PollRequest(worker_id=f"gone{n}", version_hash="v1", wait_ms=LONG_MS))
        until_polled(stub, probe)
        call.cancel()
    execution_id = start(stub)
    task = poll(stub, wait_ms=LONG_MS)
    assert task.execution_id == execution_id


def test_has_poller_is_true_until_two_seconds_after_last_poll(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    assert not record(stub, execution_id).has_poller
    complete(stub, poll(stub))
    assert record(stub, execution_id).has_poller
    began = time.monotonic()
    while record(stub, execution_id).has_poller:
        time.sleep(0.05)
    assert 1.5 < time.monotonic() - began < 4


# ---- Waiting for an end ----------------------------------------------------------------------------------------------


def test_get_execution_waits_for_the_end(stub: NexumServiceStub, pool: ThreadPoolExecutor) -> None:
    register(stub, {"a": []})
    execution_id = start(stub, idempotency_key="key")
    waiting = [pool.submit(record, stub, execution_id, wait_ms=LONG_MS) for _ in range(3)]
    task = poll(stub, "w1")
    began = time.monotonic()
    complete(stub, task, '"out"')
    for one in waiting:
        answer = one.result(DEADLINE)
        assert (answer.status, answer.nodes[0].output_json, answer.idempotency_key) == ("COMPLETED", '"out"', "key")
        assert [(a.attempt, a.worker_id, a.outcome) for a in answer.nodes[0].attempts] == [(1, "w1", "COMPLETED")]
    assert time.monotonic() - began < AT_ONCE


def test_get_execution_answers_running_after_its_wait(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    began = time.monotonic()
    assert record(stub, execution_id, wait_ms=200).status == "RUNNING"
    assert 0.15 < time.monotonic() - began < AT_ONCE


def test_server_caps_the_wait_of_a_call() -> None:
    from nexum_engine.connection import CALL_DEADLINE, MAX_SERVER_WAIT
    from nexum_engine.server.servicer import MAX_WAIT_MS, _wait_seconds

    assert _wait_seconds(2**31 - 1) == MAX_WAIT_MS / 1000 == 30
    assert MAX_SERVER_WAIT < MAX_WAIT_MS / 1000 < MAX_SERVER_WAIT + CALL_DEADLINE


@pytest.mark.parametrize("end", ["COMPLETED", "FAILED", "CANCELLED"])
def test_start_with_wait_answers_with_ended_execution(
    stub: NexumServiceStub, pool: ThreadPoolExecutor, end: str
) -> None:
    register(stub, {"a": []})
    request = pb.StartRequest(workflow_id="w", version_hash="v1", input_json="{}", wait_ms=LONG_MS)
    starting = pool.submit(stub.StartExecution, request, timeout=DEADLINE + 30)
    task = poll(stub, wait_ms=LONG_MS)
    if end == "COMPLETED":
        complete(stub, task)
    elif end == "FAILED":
        stub.FailTask(pb.FailRequest(task_id=task.task_id, error_message="no", final=True), timeout=DEADLINE)
    else:
        stub.CancelExecution(pb.CancelRequest(execution_id=task.execution_id), timeout=DEADLINE)
    answer = starting.result(DEADLINE)
    assert (answer.execution_id, answer.ended.status) == (task.execution_id, end)
    assert answer.ended.error == ("a: no" if end == "FAILED" else "")


def test_start_answers_with_the_id_after_its_wait(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    request = pb.StartRequest(workflow_id="w", version_hash="v1", input_json="{}", wait_ms=100)
    answer = stub.StartExecution(request, timeout=DEADLINE)
    assert (answer.execution_id != "", answer.status, answer.HasField("ended")) == (True, "RUNNING", False)


# ---- Heartbeats ------------------------------------------------------------------------------------------------------


def outcomes(stub: NexumServiceStub, execution_id: str) -> list[str]:
    return [one.outcome for one in record(stub, execution_id).nodes[0].attempts]


def test_dead_workers_task_goes_to_a_waiting_worker(
    address: str, stub: NexumServiceStub, pool: ThreadPoolExecutor
) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    dying = Stream(address, "dying")
    assert dying.beat().lease_ms == 30_000
    first = poll(dying.stub, "dying")
    waiting = pool.submit(poll, stub, "other", wait_ms=LONG_MS)
    began = time.monotonic()
    dying.dies()
    second = waiting.result(DEADLINE)
    assert time.monotonic() - began < 2
    assert (second.execution_id, second.attempt) == (execution_id, 2)
    assert second.idempotency_key == first.idempotency_key
    assert outcomes(stub, execution_id) == ["LOST", "RUNNING"]
    assert refused(lambda: complete(stub, first))[0] is grpc.StatusCode.FAILED_PRECONDITION
    complete(stub, second)


def test_worker_that_reconnects_in_time_keeps_its_task(address: str, stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    first = Stream(address, "w1")
    first.beat()
    task = poll(first.stub, "w1")
    first.dies()
    again = Stream(address, "w1")
    again.beat(task.task_id)
    assert not poll(stub, "other", wait_ms=2500).has_task  # longer than the time within which a worker must reconnect
    complete(stub, task)
    assert outcomes(stub, execution_id) == ["COMPLETED"]
    again.dies()


def test_connected_silent_worker_loses_task_after_lease(tmp_path: Path) -> None:
    with nexum_server(tmp_path, lease=1.0) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        silent = Stream(server.address, "silent")
        assert silent.beat().lease_ms == 1000
        poll(silent.stub, "silent")
        began = time.monotonic()
        assert poll(stub, "other", wait_ms=LONG_MS).attempt == 2
        assert 0.8 < time.monotonic() - began < 3
        assert outcomes(stub, execution_id) == ["EXPIRED", "RUNNING"]
        silent.dies()


def test_worker_with_heartbeats_keeps_task_beyond_its_lease(tmp_path: Path) -> None:
    with nexum_server(tmp_path, lease=0.5) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        alive = Stream(server.address, "alive")
        alive.beat()
        task = poll(alive.stub, "alive")
        until = time.monotonic() + 2
        while time.monotonic() < until:
            alive.beat(task.task_id)
            assert not poll(stub, "other", wait_ms=100).has_task
        complete(stub, task)
        assert outcomes(stub, execution_id) == ["COMPLETED"]
        alive.dies()


def test_worker_without_stream_has_twice_the_lease(tmp_path: Path) -> None:
    with nexum_server(tmp_path, lease=0.7) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        start(stub)
        poll(stub, "published")
        began = time.monotonic()
        assert poll(stub, "other", wait_ms=LONG_MS).attempt == 2
        assert 1.3 < time.monotonic() - began < 4


def test_draining_worker_gets_its_polls_answered_and_no_tasks(
    address: str, stub: NexumServiceStub, pool: ThreadPoolExecutor
) -> None:
    register(stub, {"a": []})
    held = start(stub)
    leaving = Stream(address, "leaving")
    leaving.beat()
    task = poll(leaving.stub, "leaving")
    waiting = [pool.submit(poll, leaving.stub, "leaving", wait_ms=LONG_MS) for _ in range(3)]
    until_polled(stub, held)
    began = time.monotonic()
    leaving.beat(task.task_id, draining=True)
    assert not any(one.result(DEADLINE).has_task for one in waiting)
    assert time.monotonic() - began < AT_ONCE
    start(stub)
    assert not poll(leaving.stub, "leaving", wait_ms=LONG_MS).has_task
    complete(leaving.stub, task)
    leaving.dies()
    assert outcomes(stub, held) == ["COMPLETED"]


def test_stream_without_worker_id_is_refused(address: str) -> None:
    nameless = Stream(address, "")
    code, words = refused(nameless.beat)
    assert (code, words) == (grpc.StatusCode.INVALID_ARGUMENT, "worker_id is empty")
    nameless.dies()


def test_workers_keep_their_tasks_when_server_is_killed(tmp_path: Path) -> None:
    port = free_port()
    with nexum_server(tmp_path, port=port) as first, connected(first.address) as stub:
        register(stub, {"a": []})
        kept, lost = start(stub), start(stub)
        streams = [Stream(first.address, name) for name in ("back", "gone")]
        for stream in streams:
            stream.beat()
        task = poll(stub, "back")
        poll(stub, "gone")
        first.process.kill()
    with nexum_server(tmp_path, port=port) as second, connected(second.address) as stub:
        back = Stream(second.address, "back")
        back.beat(task.task_id)
        began = time.monotonic()
        again = poll(stub, "other", wait_ms=LONG_MS)
        assert 0.7 < time.monotonic() - began < 5  # `gone` had 1.5 s to reconnect, beginning before `began`
        assert again.execution_id == lost
        assert outcomes(stub, lost) == ["INTERRUPTED", "RUNNING"]
        complete(stub, task)
        assert outcomes(stub, kept) == ["COMPLETED"]
        for stream in (back, *streams):
            stream.dies()


# ---- The process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:0", "[::]:0", "192.168.1.1:0", "example.com:0", "nonsense", "127.0.0.1:x", ":50051"]
)
def test_address_beyond_this_machine_is_refused(tmp_path: Path, listen: str) -> None:
    command = ["-m", "nexum_engine", "--listen", listen, "--database-url", f"sqlite:///{tmp_path / 'n.db'}"]
    run = run_to_end(command, cwd=tmp_path, forked=True)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["interrupt", "terminate"])
def test_server_with_waiting_calls_stops_at_once_without_log(
    tmp_path: Path, pool: ThreadPoolExecutor, end: str
) -> None:
    with nexum_server(tmp_path) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        complete(stub, poll(stub))
        polling = pool.submit(poll, stub, wait_ms=LONG_MS)
        stream = Stream(server.address, "w1")
        stream.beat()
        until_polled(stub, execution_id)
        began = time.monotonic()
        getattr(server.process, end)()
        assert server.process.wait(DEADLINE) == 0
        assert time.monotonic() - began < AT_ONCE
        assert not polling.result(DEADLINE).has_task
        assert len(server.process.output.splitlines()) == 1
        stream.dies()


@pytest.mark.sqlite
def test_first_line_names_address_database_and_version(server_process: Server) -> None:
    (line,) = server_process.process.lines
    assert re.fullmatch(
        r"Nexum engine \d+\.\d+\.\d+ on 127\.0\.0\.1:\d+, database \S+[/\\]nexum\.db \(Ctrl\+C to stop\)", line
    )


def test_show_works_while_server_runs_and_afterwards(tmp_path: Path) -> None:
    def look(*arguments: str) -> subprocess.CompletedProcess[str]:
        url = harness.url_of(tmp_path)
        where = [] if "--nexum" in arguments else ["--database-url", url]
        return run_to_end(["-m", "nexum_engine", *arguments, *where], cwd=ROOT, forked=True)

    with nexum_server(tmp_path) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        done, running = start(stub, '{"q": 1}'), start(stub)
        complete(stub, poll(stub), '"out"')
        there = ["--nexum", server.address]
        listed, shown = look("ps", *there), look("show", done, *there)
        assert look("show", "exec-x", *there).returncode == 1
        server.process.terminate()
        server.process.wait()
    assert [line.split()[:2] for line in listed.stdout.splitlines()[1:]] == [[running, "RUNNING"], [done, "COMPLETED"]]
    assert shown.stdout == look("show", done).stdout
    assert "attempt 1  COMPLETED" in shown.stdout
    assert look("cancel", running).stdout == f"{running} is CANCELLED\n"
    after = json.loads(look("ps", "--json").stdout)
    assert [(one["execution_id"], one["status"]) for one in after] == [(running, "CANCELLED"), (done, "COMPLETED")]
    unknown = look("show", "exec-x")
    assert (unknown.returncode, unknown.stderr) == (1, "error: no execution 'exec-x' in this server's database\n")


def test_start_with_result_is_answered_without_task_and_result(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})

    def start(output: str, owner: str = "me") -> pb.StartResponse:
        return stub.StartExecution(
            pb.StartRequest(
                workflow_id="w",
                version_hash="v1",
                input_json="{}",
                idempotency_key="k",
                owner=owner,
                output_json=output,
            ),
            timeout=DEADLINE,
        )

    first, again = start('{"n":1}'), start('{"n":1}', "another")
    assert (first.status, first.existing) == ("COMPLETED", False)
    assert not first.HasField("task")
    assert not first.HasField("ended")
    assert (again.execution_id, again.existing) == (first.execution_id, True)
    assert record(stub, first.execution_id).nodes[0].output_json == '{"n":1}'
    assert refused(lambda: start('{"n":2}'))[0] is grpc.StatusCode.FAILED_PRECONDITION
    code, words = refused(lambda: start('{"n":1}', ""))
    assert (code, "give owner" in words) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_concurrent_starts_with_one_key_get_one_execution(address: str) -> None:
    ready = threading.Barrier(16)

    def race(_: int) -> tuple[str, bool]:
        with connected(address) as stub:
            ready.wait(DEADLINE)
            request = pb.StartRequest(workflow_id="w", version_hash="v1", input_json="{}", idempotency_key="key")
            answer = stub.StartExecution(request, timeout=DEADLINE)
            return answer.execution_id, answer.existing

    with connected(address) as stub, ThreadPoolExecutor(16) as pool:
        register(stub, {"a": []})
        answers = list(pool.map(race, range(16)))
        assert len({execution_id for execution_id, _ in answers}) == 1
        assert [existing for _, existing in answers].count(False) == 1
        other = pb.StartRequest(workflow_id="w", version_hash="v1", input_json="1", idempotency_key="key")
        code, words = refused(lambda: stub.StartExecution(other, timeout=DEADLINE))
        assert (code, answers[0][0] in words) == (grpc.StatusCode.ALREADY_EXISTS, True)


# ---- Malformed messages ----------------------------------------------------------------------------------------------

MALFORMED = [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"]
"""A bad tag, a text that is shorter than its length, and a text that is not UTF-8."""


TEXT, MESSAGE = FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE


def send(channel: Any, method: Any, data: bytes) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        list(channel.stream_stream(path)(iter([data]), timeout=DEADLINE))
    else:
        channel.unary_unary(path)(data, timeout=DEADLINE)


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_message_is_an_invalid_argument(address: str, data: bytes) -> None:
    methods = [
        method
        for method in pb.DESCRIPTOR.services_by_name["NexumService"].methods
        # Choose methods whose field 1 is a text or a message. With another type, some MALFORMED bytes would be valid.
        if (first := method.input_type.fields_by_number.get(1)) is not None and first.type in (TEXT, MESSAGE)
    ]
    assert "WorkerStream" in {method.name for method in methods}
    with grpc.insecure_channel(address) as channel:
        for method in methods:
            code, words = refused(partial(send, channel, method, data))
            assert (code, method.name) == (grpc.StatusCode.INVALID_ARGUMENT, method.name)
            assert f"the request is not a {method.input_type.name} message" in words


def test_call_for_a_database_with_a_zero_byte_in_its_name_is_refused(address: str) -> None:
    with connected(address) as stub:
        metadata = (("nexum-database-bin", b"/tmp/a\0b"),)
        code, words = refused(lambda: stub.ListExecutions(pb.ListRequest(), metadata=metadata, timeout=DEADLINE))
    assert (code, "open" in words) == (grpc.StatusCode.UNAVAILABLE, True)
