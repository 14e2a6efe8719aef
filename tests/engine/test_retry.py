"""RetryExecution: a FAILED execution continues at its failed node."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from harness import nexum_server
from nexum_wire import DEADLINE, complete, connected, poll, record, refused, register, start
from processes import wait_until
from server_thread import ServerThread

from nexum_engine.clock import ManualClock
from nexum_engine.errors import Conflict, ExecutionNotFound
from nexum_engine.records import NodeStatus, Outcome, Task
from nexum_engine.store import Store, executions, leases, reading, tasks, waits
from nexum_engine.store.retry import retry_execution
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

pytestmark = pytest.mark.both_stores

CHAIN = {"a": [], "b": ["a"], "c": ["b"]}
FAN = {"root": [], "left": ["root"], "right": ["root"], "end": ["left", "right"], "late": ["right"]}


async def begin(store: Store, nodes: Mapping[str, Sequence[str]], key: str = "") -> str:
    ir = {"nodes": {name: {"type": "EFFECT", "dependencies": list(needs)} for name, needs in nodes.items()}}
    await store.run(executions.register_workflow, "w", "v1", json.dumps(ir))
    return (await store.run(executions.start_execution, "w", "v1", '{"q": 1}', key)).execution_id


async def take(store: Store, node_id: str) -> Task:
    task = (await store.run(tasks.claim, "worker", ("v1",), 2**40, 30_000, True)).task
    assert task is not None
    assert task.node_id == node_id
    return task


async def run(store: Store, node_id: str) -> None:
    await store.run(tasks.complete_task, (await take(store, node_id)).task_id, f'"of {node_id}"')


async def fail(store: Store, node_id: str) -> None:
    await store.run(tasks.fail_task, (await take(store, node_id)).task_id, "broken", True)


async def states(store: Store, execution_id: str) -> dict[str, str]:
    return {one.node_id: one.status.value for one in (await store.run(reading.get_execution, execution_id)).nodes}


async def test_retry_continues_at_the_failed_node(store: Store) -> None:
    execution_id = await begin(store, CHAIN, "k")
    await run(store, "a")
    await fail(store, "b")
    assert await states(store, execution_id) == {"a": "COMPLETED", "b": "FAILED", "c": "CANCELLED"}
    changed = await store.run(retry_execution, execution_id)
    assert [one.version_hash for one in changed.ready] == ["v1"]
    execution = await store.run(reading.get_execution, execution_id)
    assert (execution.status.value, execution.error, execution.ended_ms) == ("RUNNING", "", None)
    assert await states(store, execution_id) == {"a": "COMPLETED", "b": "READY", "c": "PENDING"}
    # A start with the key finds the execution, because it is RUNNING again.
    assert await begin(store, CHAIN, "k") == execution_id
    task = await take(store, "b")
    assert json.loads(task.input_json) == {"input": {"q": 1}, "deps": {"a": "of a"}}
    assert task.attempt == 2
    await store.run(tasks.complete_task, task.task_id, '"of b"')
    await run(store, "c")
    ended = await store.run(reading.get_execution, execution_id, True)
    assert ended.outputs() == {name: f'"of {name}"' for name in "abc"}
    assert [(one.attempt, one.outcome) for one in ended.nodes[1].attempts] == [
        (1, Outcome.FAILED),
        (2, Outcome.COMPLETED),
    ]
    assert len(ended.nodes[0].attempts) == 1
    assert ended.status.value == "COMPLETED"


async def test_retry_gives_fresh_retries(store: Store, clock: ManualClock) -> None:
    execution_id = await begin(store, {"a": []})
    for round_ in range(2):
        for attempt in range(4):
            task = await take(store, "a")
            assert task.attempt == 4 * round_ + attempt + 1
            await store.run(tasks.fail_task, task.task_id, f"broken {task.attempt}", False)
            clock.advance(5)
        execution = await store.run(reading.get_execution, execution_id, True)
        assert execution.error == f"a: broken {4 * round_ + 4} (attempt 4 of 4)"
        assert len(execution.nodes[0].attempts) == 4 * round_ + 4
        await store.run(retry_execution, execution_id)


@pytest.mark.parametrize("late", ["it reports a failure", "it is at work again"])
async def test_worker_lost_before_the_retry_does_not_change_the_fresh_counts(
    store: Store, clock: ManualClock, late: str
) -> None:
    ir = {"nodes": {"a": {"type": "EFFECT"}, "person": {"type": "HUMAN_APPROVAL"}}}
    await store.run(executions.register_workflow, "w", "v1", json.dumps(ir))
    execution_id = (await store.run(executions.start_execution, "w", "v1", "null", "")).execution_id

    async def lose() -> None:
        await store.run(leases.disconnect, "worker", 1000)
        clock.advance(1)
        await store.run(leases.sweep, 0)

    lost = await take(store, "a")
    await lose()
    await store.run(waits.reject, execution_id, "person", "someone", "no")
    await store.run(retry_execution, execution_id)
    if late == "it reports a failure":
        await store.run(tasks.fail_task, lost.task_id, "broken", False)
        clock.advance(5)
        losses = 0
    else:
        await store.run(leases.renew, "worker", (lost.task_id,), 30_000)
        await lose()
        losses = 1
    while (await store.run(reading.get_execution, execution_id)).status.value == "RUNNING":
        await take(store, "a")
        await lose()
        losses += 1
    assert losses == leases.MAX_LOST_ATTEMPTS


async def test_cancelled_nodes_wait_for_what_they_depend_on(store: Store) -> None:
    execution_id = await begin(store, FAN)
    await run(store, "root")
    left = await take(store, "left")
    await fail(store, "right")
    assert await states(store, execution_id) == {
        "root": "COMPLETED",
        "left": "CANCELLED",
        "right": "FAILED",
        "end": "CANCELLED",
        "late": "CANCELLED",
    }
    changed = await store.run(retry_execution, execution_id)
    assert len(changed.ready) == 2
    assert await states(store, execution_id) == {
        "root": "COMPLETED",
        "left": "READY",
        "right": "READY",
        "end": "PENDING",
        "late": "PENDING",
    }
    # The worker that was at work on `left` reports after all.
    await store.run(tasks.complete_task, left.task_id, '"late"')
    for node in ("right", "end", "late"):
        await run(store, node)
    ended = await store.run(reading.get_execution, execution_id)
    assert ended.outputs()["left"] == '"late"'
    assert {one.status for one in ended.nodes} == {NodeStatus.COMPLETED}


async def test_execution_that_has_not_failed_is_not_retried(store: Store) -> None:
    execution_id = await begin(store, {"a": []})
    with pytest.raises(Conflict, match="is RUNNING: only a FAILED one can be retried"):
        await store.run(retry_execution, execution_id)
    await run(store, "a")
    with pytest.raises(Conflict, match="is COMPLETED"):
        await store.run(retry_execution, execution_id)
    cancelled = await begin(store, {"a": []})
    await store.run(executions.cancel_execution, cancelled)
    with pytest.raises(Conflict, match="is CANCELLED"):
        await store.run(retry_execution, cancelled)
    with pytest.raises(ExecutionNotFound):
        await store.run(retry_execution, "exec-9")


async def test_key_with_a_newer_execution_is_not_retried(store: Store) -> None:
    first = await begin(store, {"a": []}, "k")
    await fail(store, "a")
    second = await begin(store, {"a": []}, "k")
    for status in ("RUNNING", "FAILED: retry that one"):
        with pytest.raises(Conflict, match=f"its key has a newer execution, {second}, which is {status}"):
            await store.run(retry_execution, first)
        if status == "RUNNING":
            await fail(store, "a")
    await store.run(retry_execution, second)
    await run(store, "a")
    with pytest.raises(Conflict, match=f"{second}, which is COMPLETED"):
        await store.run(retry_execution, first)
    assert await begin(store, {"a": []}, "k") == second


async def test_owned_execution_is_not_retried(store: Store) -> None:
    await begin(store, {"a": []})
    started = await store.run(tasks.start_owned, "w", "v1", "1", "owned", "owner", 30_000)
    assert started.task is not None
    await store.run(tasks.fail_task, started.task.task_id, "broken", True)
    with pytest.raises(
        Conflict, match="belongs to the program that started it, and no worker gets it: run that program again"
    ):
        await store.run(retry_execution, started.execution_id)
    assert await states(store, started.execution_id) == {"a": "FAILED"}


# ---- Over the wire ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stub(server: ServerThread) -> Iterator[NexumServiceStub]:
    with connected(server.address) as connection:
        yield connection


def test_retry_wakes_a_waiting_worker(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    register(stub, {"a": []}, version="v2")
    probe = start(stub, version="v2")  # its `has_poller` says whether the worker below polls
    stub.CancelExecution(pb.CancelRequest(execution_id=probe), timeout=DEADLINE)
    execution_id = start(stub)
    failed = poll(stub)
    stub.FailTask(pb.FailRequest(task_id=failed.task_id, error_message="broken", final=True), timeout=DEADLINE)
    request = pb.RetryRequest(execution_id=execution_id)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(poll, stub, wait_ms=25_000, more_version_hashes=["v2"])
        wait_until(lambda: record(stub, probe).has_poller, "the worker polls")
        assert stub.RetryExecution(request, timeout=DEADLINE).ok
        task = waiting.result(10)
        ended = pool.submit(record, stub, execution_id, wait_ms=25_000)
        complete(stub, task, '"out"')
        assert ended.result(10).status == "COMPLETED"
    assert (task.execution_id, task.attempt) == (execution_id, 2)
    code, words = refused(lambda: stub.RetryExecution(request, timeout=DEADLINE))
    assert (code, "is COMPLETED" in words) == (grpc.StatusCode.FAILED_PRECONDITION, True)


def test_retry_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    with nexum_server(tmp_path) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        stub.FailTask(pb.FailRequest(task_id=poll(stub).task_id, final=True), timeout=DEADLINE)
        stub.RetryExecution(pb.RetryRequest(execution_id=execution_id), timeout=DEADLINE)
        server.process.kill()
    with nexum_server(tmp_path) as server, connected(server.address) as stub:
        task = poll(stub, wait_ms=20_000)
        assert (task.execution_id, task.attempt) == (execution_id, 2)
        complete(stub, task)
        assert record(stub, execution_id).status == "COMPLETED"
