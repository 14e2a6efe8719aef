"""Server processes that share one PostgreSQL: they tell each other of changes, and continue if one server dies."""

from __future__ import annotations

import json
import os
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from harness import Server, nexum_server
from nexum_wire import (
    DEADLINE,
    Stream,
    cancelled,
    complete,
    connected,
    poll,
    record,
    register,
    say_large,
    start,
    until_polled,
)
from processes import Acknowledged, assert_recorded_once, counting_worker, effects, recorded, wait_until
from server_thread import ServerThread, server_thread

from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub
from submit_task import call_key
from workflow import TOOL_CALL

SOON = 5.0  # seconds
RARELY = 60.0  # seconds; much longer than the calls wait
LEASE = 60.0
"""The servers' lease: longer than each test, so that no test passes because a lease has run out."""


@pytest.fixture
def servers(tmp_path: Path, postgres_url: str) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(nexum_server(tmp_path, database_url=postgres_url, lease=LEASE)) for _ in range(2)]


@contextmanager
def worker_stream(server: Server | ServerThread, worker_id: str, *task_ids: str) -> Iterator[Stream]:
    """Open a worker's stream with a heartbeat. The worker dies at the end of the `with`."""
    stream = Stream(server.address, worker_id)
    try:
        stream.beat(*task_ids)
        yield stream
    finally:
        stream.dies()


def attempts(stub: NexumServiceStub, execution_id: str) -> list[tuple[int, str]]:
    return [(one.attempt, one.outcome) for one in record(stub, execution_id).nodes[0].attempts]


@pytest.fixture
def told(tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ServerThread]]:
    """Two servers that must tell each other of changes: each looks for changes itself only after the tests' end."""
    servers = pytest.importorskip("nexum_engine.store.postgresql_servers", reason="psycopg isn't installed")
    monkeypatch.setattr(servers, "BEAT_SECONDS", RARELY)
    with ExitStack() as stack:
        yield [stack.enter_context(server_thread(tmp_path, database_url=postgres_url)) for _ in range(2)]


def test_large_input_is_accepted_at_the_server_without_workers(told: list[ServerThread]) -> None:
    with connected(told[0].address) as one, connected(told[1].address) as other:
        register(one, {"a": []})
        say_large(one)
        assert start(other, json.dumps("x" * 5 * 2**20))


def test_poll_on_one_server_gets_the_task_of_the_other_at_once(told: list[ServerThread]) -> None:
    with connected(told[0].address) as one, connected(told[1].address) as other, ThreadPoolExecutor(1) as pool:
        register(one, {"a": []})
        probe = cancelled(other)
        waiting = pool.submit(poll, other, wait_ms=20_000)
        until_polled(other, probe)  # so that the poll waits: else it would simply find the task
        begun = time.monotonic()
        execution_id = start(one)
        assert waiting.result().execution_id == execution_id
        assert time.monotonic() - begun < SOON
        complete(other, waiting.result())


def test_wait_on_one_server_ends_with_the_report_on_the_other(
    told: list[ServerThread], begun_waits: queue.SimpleQueue[str]
) -> None:
    with connected(told[0].address) as one, connected(told[1].address) as other, ThreadPoolExecutor(1) as pool:
        register(one, {"a": []})
        execution_id = start(one)
        waiting = pool.submit(record, one, execution_id, wait_ms=20_000)
        assert begun_waits.get(timeout=DEADLINE) == execution_id
        task = poll(other)
        begun = time.monotonic()
        complete(other, task)
        assert waiting.result().status == "COMPLETED"
        assert time.monotonic() - begun < SOON


def test_starting_server_leaves_the_workers_of_another_alone(
    servers: list[Server], postgres_url: str, tmp_path: Path
) -> None:
    with connected(servers[0].address) as one:
        register(one, {"a": []})
        execution_id = start(one)
        with worker_stream(servers[0], "w") as stream:
            task = poll(one, "w")
            with nexum_server(tmp_path, database_url=postgres_url, lease=LEASE) as third:
                time.sleep(3)  # longer than the time within which workers must reconnect to a restarted server
                with connected(third.address) as stub:
                    assert attempts(stub, execution_id) == [(1, "RUNNING")]
                assert not stream.beat(task.task_id).lost_task_ids


def test_worker_that_moves_to_the_other_server_keeps_its_task(servers: list[Server]) -> None:
    with connected(servers[0].address) as one, connected(servers[1].address) as other:
        register(one, {"a": []})
        execution_id = start(one)
        with worker_stream(servers[0], "w"):
            task = poll(one, "w")
            servers[0].process.kill()
            with worker_stream(servers[1], "w", task.task_id) as stream:
                for _ in range(8):  # longer than the time within which a dead server's workers must reconnect
                    time.sleep(1)
                    assert not stream.beat(task.task_id).lost_task_ids
                assert attempts(other, execution_id) == [(1, "RUNNING")]
                complete(other, task)
        assert attempts(other, execution_id) == [(1, "COMPLETED")]


def test_task_of_a_worker_that_died_with_its_server_runs_elsewhere(servers: list[Server]) -> None:
    with connected(servers[0].address) as one, connected(servers[1].address) as other:
        register(one, {"a": []})
        execution_id = start(one)
        with worker_stream(servers[0], "w"):
            task = poll(one, "w")
            servers[0].process.kill()
            begun = time.monotonic()
        again = poll(other, "w2", wait_ms=20_000)
        assert again.execution_id == execution_id
        assert again.task_id != task.task_id
        assert time.monotonic() - begun < 7
        assert attempts(other, execution_id) == [(1, "INTERRUPTED"), (2, "RUNNING")]


def test_task_of_a_worker_that_died_runs_on_the_other_server(servers: list[Server]) -> None:
    with connected(servers[0].address) as one, connected(servers[1].address) as other, ThreadPoolExecutor(1) as pool:
        register(one, {"a": []})
        execution_id = start(one)
        with worker_stream(servers[0], "w"):
            poll(one, "w")
            waiting = pool.submit(poll, other, "w2", wait_ms=20_000)
            until_polled(other, execution_id)
        begun = time.monotonic()
        assert waiting.result().execution_id == execution_id
        assert time.monotonic() - begun < 4


def test_result_is_seen_by_a_client_of_either_server(servers: list[Server]) -> None:
    with connected(servers[0].address) as one, connected(servers[1].address) as other:
        register(one, {"a": []})
        ids = [start(stub, idempotency_key=f"k{number}") for number in range(5) for stub in (one, other)]
        assert len(set(ids)) == 5
        for stub in (other, one, other, one, other):
            complete(stub, poll(stub, wait_ms=int(DEADLINE * 1000)))
        for execution_id in ids:
            for stub in (one, other):
                assert record(stub, execution_id).status == "COMPLETED"


@pytest.mark.timeout(180)
def test_server_and_worker_killed_under_load_lose_and_change_nothing(servers: list[Server], tmp_path: Path) -> None:
    """Two servers with two workers each. During the calls, one server and a worker of the other are killed.

    LOAD_CALLS=500 makes more calls than the usual 200.
    """
    log, calls = tmp_path / "log", int(os.environ.get("LOAD_CALLS") or 200)
    with ExitStack() as stack:
        workers = [stack.enter_context(counting_worker(tmp_path, one.address)) for one in servers for _ in range(2)]
        stub = stack.enter_context(connected(servers[1].address))
        pool = stack.enter_context(ThreadPoolExecutor(50))
        wait_until(lambda: bool(status_of_workflow(stub)), "a worker registers the workflow")

        def start_call(number: int) -> str:
            name, args = "count_effect", {"log": str(log), "number": number}
            call = json.dumps({"tool_name": name, "tool_args": args})
            return start(stub, call, "tool-call", TOOL_CALL.version_hash, idempotency_key=call_key(name, args))

        def make_call(number: int) -> tuple[str, str]:
            execution_id = start_call(number)
            while (answer := record(stub, execution_id, wait_ms=20_000)).status == "RUNNING":
                pass
            assert answer.status == "COMPLETED", answer
            return execution_id, str(json.loads(answer.nodes[0].output_json)["result"])

        made = [pool.submit(make_call, number) for number in range(calls)]
        wait_until(lambda: len(effects(log)) >= calls // 4, "a quarter has run")
        servers[0].process.kill()
        workers[2].kill()
        assert len(effects(log)) < calls, "all calls had ended before the kill"
        acknowledged = Acknowledged()
        ids, results = zip(*(one.result(timeout=60) for one in made), strict=True)
        acknowledged.results = dict(enumerate(results))

        assert [start_call(number) for number in range(calls)] == list(ids)
        records = recorded(tmp_path, servers[1].address)
        assert_recorded_once(records, acknowledged, log, calls, {"LOST", "INTERRUPTED"})
        repeated = sum(len(one["nodes"][0]["attempts"]) - 1 for one in records)
        # A task ran again only if it was held by the killed worker or by one of the killed server's two workers. Each
        # worker runs at most four tasks. While it reports one, it may hold the next one already: a report and the next
        # poll share a message, and the server may die between the two transactions.
        assert 0 < repeated <= 3 * 2 * 4


def status_of_workflow(stub: NexumServiceStub) -> object:
    return stub.ListWorkflowVersions(pb.ListVersionsRequest(workflow_id="tool-call"), timeout=DEADLINE).versions
