"""Owned executions: the task goes to the owner, and never to a poll. If the owner dies, another owner can get it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import harness
import pytest
from harness import running
from nexum_wire import connected
from server_thread import ServerThread, server_thread

from nexum_engine.client import NexumClient, Started
from nexum_engine.clock import ManualClock
from nexum_engine.errors import Conflict, ExecutionNotFound, InvalidRequest, ServerError, StaleTask
from nexum_engine.heartbeat import Heartbeat
from nexum_engine.owner import HELD_FOR, Owner
from nexum_engine.records import ExecutionStatus, NodeStatus, Outcome
from nexum_engine.server.liveness import RECONNECT_GRACE_MS, RESTART_GRACE_MS
from nexum_engine.store import Store, executions, leases, listing, open_store, reading, tasks
from nexum_engine.store.leases import MAX_LOST_ATTEMPTS
from nexum_engine.store.results import StoredStart
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub
from nexum_engine.workflow import workflow

LEASE_MS = 30_000
OWNED = workflow("owned").effect("a").build()


@pytest.fixture
async def store(tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
    opened = await open_store(harness.url_of(tmp_path), clock)
    await opened.run(
        executions.register_workflow, "w", "v1", json.dumps({"nodes": {"a": {"type": "EFFECT", "dependencies": []}}})
    )
    yield opened
    await opened.close()


async def own(store: Store, owner: str, key: str = "k") -> StoredStart:
    return await store.run(tasks.start_owned, "w", "v1", "{}", key, owner, LEASE_MS)


async def polled(store: Store) -> object:
    return (await store.run(tasks.claim, "poller", ("v1",), 2**40, LEASE_MS, True)).task


async def lose(store: Store, clock: ManualClock, owner: str) -> None:
    """Break the owner's connection, and let its lease run out."""
    await store.run(leases.disconnect, owner, 1000)
    clock.advance(1)
    await store.run(leases.sweep, 0)


async def test_owner_gets_the_task_and_no_poll_does(store: Store, clock: ManualClock) -> None:
    started = await own(store, "one")
    assert started.task is not None
    assert started.task.attempt == 1
    assert await polled(store) is None
    await lose(store, clock, "one")
    clock.advance(3600)
    assert (await store.run(leases.sweep, 0)).changed.ready == []
    assert await polled(store) is None
    (node,) = (await store.run(reading.get_execution, started.execution_id)).nodes
    assert node.status is NodeStatus.READY


async def test_second_start_by_same_owner_gets_the_same_task(store: Store) -> None:
    assert (await own(store, "one")).task == (await own(store, "one")).task


async def test_owner_keeps_a_task_that_its_heartbeats_do_not_name(store: Store) -> None:
    """If the answer to a start is lost, the owner lacks the task. A second start with the same key returns the task."""
    started = await own(store, "one")
    assert started.task is not None
    assert (await store.run(leases.renew, "one", (), LEASE_MS)).unnamed == set()
    await store.run(leases.lose, "one", frozenset({started.task.task_id}))
    assert (await own(store, "one")).task == started.task


async def test_second_owner_is_refused_while_first_owner_lives(store: Store, clock: ManualClock) -> None:
    await own(store, "one")
    await store.run(leases.disconnect, "one", 1000)
    clock.advance(0.999)
    await store.run(leases.sweep, 0)
    with pytest.raises(Conflict, match="'k' is in use by one"):
        await own(store, "other")


@pytest.mark.parametrize("lost", ["connection", "server"])
async def test_nobody_takes_over_while_an_owner_counts_as_holding_its_tasks(
    store: Store, clock: ManualClock, lost: str
) -> None:
    await own(store, "one")
    if lost == "connection":
        await store.run(leases.disconnect, "one", RECONNECT_GRACE_MS)
    else:
        await store.run(leases.restart, RESTART_GRACE_MS, 2 * LEASE_MS)
    clock.advance(HELD_FOR - 0.001)
    await store.run(leases.sweep, 0)
    with pytest.raises(Conflict, match="'k' is in use by one"):
        await own(store, "other")


async def test_dead_owner_is_taken_over_and_can_not_report(store: Store, clock: ManualClock) -> None:
    first = await own(store, "one")
    await lose(store, clock, "one")
    second = await own(store, "other")
    assert first.task is not None
    assert second.task is not None
    assert (second.execution_id, second.task.attempt) == (first.execution_id, 2)
    with pytest.raises(StaleTask):
        await store.run(tasks.complete_task, first.task.task_id, "1")
    await store.run(tasks.complete_task, second.task.task_id, "2")
    execution = await store.run(reading.get_execution, first.execution_id, with_attempts=True)
    assert execution.outputs() == {"a": "2"}
    assert [attempt.outcome for attempt in execution.nodes[0].attempts] == [Outcome.LOST, Outcome.COMPLETED]


async def test_owner_finds_completed_execution_and_restarts_failed_one(store: Store) -> None:
    first = await own(store, "one")
    assert first.task is not None
    await store.run(tasks.fail_task, first.task.task_id, "no", True)
    second = await own(store, "other")
    assert second.task is not None
    assert second.execution_id != first.execution_id
    await store.run(tasks.complete_task, second.task.task_id, "1")
    third = await own(store, "third")
    assert (third.execution_id, third.status, third.task) == (second.execution_id, ExecutionStatus.COMPLETED, None)


async def test_owner_that_lost_its_held_task_can_not_start(store: Store, clock: ManualClock) -> None:
    async def under(held: StoredStart, owner: str, key: str) -> StoredStart:
        assert held.task is not None
        return await store.run(tasks.start_owned, "w", "v1", "{}", key, owner, LEASE_MS, held.task.task_id)

    first = await own(store, "one", "run")
    assert (await under(first, "one", "e/1")).task is not None
    await lose(store, clock, "one")
    # No other owner has taken the run over, so the first owner still has its task.
    assert (await under(first, "one", "e/2")).task is not None
    second = await own(store, "two", "run")
    with pytest.raises(StaleTask, match="attempt 2 was handed out later"):
        await under(first, "one", "e/3")
    assert (await under(second, "two", "e/3")).task is not None
    with pytest.raises(StaleTask, match="holds task task-of-elsewhere, but this server has no such task"):
        await store.run(tasks.start_owned, "w", "v1", "{}", "e/4", "two", LEASE_MS, "task-of-elsewhere")
    keys = {one.idempotency_key for one in await store.run(listing.list_executions, "w", "", 10)}
    assert keys == {"run", "e/1", "e/2", "e/3"}


async def test_start_that_arrives_after_its_owner_is_dead_does_not_keep_the_next_owner_waiting(
    store: Store, clock: ManualClock
) -> None:
    """The server may read the last request of a killed process after it has noticed the process's death."""
    run = await own(store, "one", "run")
    assert run.task is not None
    await store.run(leases.disconnect, "one", 1000)
    late = await store.run(tasks.start_owned, "w", "v1", "{}", "e/1", "one", LEASE_MS, run.task.task_id)
    assert late.task is not None
    assert late.lease_ends_ms == clock.now_ms() + 1000
    clock.advance(1)
    await store.run(leases.sweep, 0)
    second = await own(store, "two", "run")
    assert second.task is not None
    taken = await store.run(tasks.start_owned, "w", "v1", "{}", "e/1", "two", LEASE_MS, second.task.task_id)
    assert taken.task is not None
    assert taken.task.attempt == 2


async def record(store: Store, output: str, owner: str = "one", key: str = "k", held: str = "") -> StoredStart:
    return await store.run(tasks.start_owned, "w", "v1", "{}", key, owner, LEASE_MS, held, output)


async def test_start_with_result_records_the_result(store: Store) -> None:
    started = await record(store, '{"n":1}')
    assert (started.status, started.existing, started.task) == (ExecutionStatus.COMPLETED, False, None)
    execution = await store.run(reading.get_execution, started.execution_id, with_attempts=True)
    assert execution.status is ExecutionStatus.COMPLETED
    assert execution.outputs() == {"a": '{"n":1}'}
    assert [(one.worker_id, one.outcome) for one in execution.nodes[0].attempts] == [("one", Outcome.COMPLETED)]
    assert started.changed.ended == []  # nobody waits for the end of a new execution


async def test_repeated_start_with_result_is_acknowledged_only_if_equal(
    store: Store,
) -> None:
    first = await record(store, '{"n":1}')
    again = await record(store, '{ "n": 1 }', "other")
    assert (again.execution_id, again.status, again.changed.ended) == (first.execution_id, first.status, [])
    with pytest.raises(StaleTask, match="'k' has another result"):
        await record(store, '{"n":2}')
    with pytest.raises(InvalidRequest, match="output_json is not valid JSON"):
        await record(store, "{")
    assert (await store.run(reading.get_execution, first.execution_id)).outputs() == {"a": '{"n":1}'}


async def test_start_with_result_finds_an_execution_without_one_result(store: Store) -> None:
    once = {"a": {"type": "EFFECT", "effect": "once"}}
    await store.run(executions.register_workflow, "once", "v1", json.dumps({"nodes": once}))
    one = ("once", "v1", "{}", "k", "one", LEASE_MS)
    started = await store.run(tasks.start_owned, *one)
    await store.run(executions.cancel_execution, started.execution_id)
    with pytest.raises(StaleTask, match=r"once 'k' is CANCELLED, without a result \(execution"):
        await store.run(tasks.start_owned, *one, "", "1")

    two_timers = {name: {"type": "TIMER", "delay_seconds": 0} for name in "ab"}
    await store.run(executions.register_workflow, "two", "v1", json.dumps({"nodes": two_timers}))
    await store.run(executions.start_execution, "two", "v1", "{}", "k")
    with pytest.raises(StaleTask, match="two 'k' has another result"):
        await store.run(tasks.start_owned, "two", "v1", "{}", "k", "one", LEASE_MS, "", "1")


async def test_start_with_result_completes_own_and_dead_owners_execution(store: Store, clock: ManualClock) -> None:
    begun, left = await own(store, "one"), await own(store, "dead", "l")
    with pytest.raises(Conflict, match="is in use by one"):
        await record(store, "1", "other")
    assert (await record(store, "1")).execution_id == begun.execution_id
    await lose(store, clock, "dead")
    assert (await record(store, "2", key="l")).execution_id == left.execution_id
    for started, output, attempts in ((begun, "1", 1), (left, "2", 2)):
        execution = await store.run(reading.get_execution, started.execution_id, with_attempts=True)
        assert execution.outputs() == {"a": output}
        assert len(execution.nodes[0].attempts) == attempts


async def test_refused_start_with_result_stores_nothing(store: Store, clock: ManualClock) -> None:
    run = await own(store, "one", "run")
    assert run.task is not None
    await lose(store, clock, "one")
    await record(store, "1", key="e/1", held=run.task.task_id)  # no other owner has taken the run over
    await own(store, "two", "run")
    with pytest.raises(StaleTask, match="attempt 2 was handed out later"):
        await record(store, "1", key="e/2", held=run.task.task_id)
    with pytest.raises(StaleTask, match="this server has no such task"):
        await record(store, "1", key="e/3", held="task-of-elsewhere")
    with pytest.raises(InvalidRequest, match="output_json is not valid JSON"):
        await record(store, "NaN", key="e/4")
    assert [one.idempotency_key for one in await store.run(listing.list_executions, "w", "", 10)] == ["e/1", "run"]


async def test_deaths_of_owners_are_not_counted(store: Store, clock: ManualClock) -> None:
    for number in range(MAX_LOST_ATTEMPTS + 2):
        assert (await own(store, f"owner {number}")).task is not None
        await lose(store, clock, f"owner {number}")
    last = await own(store, "last")
    assert last.task is not None
    assert last.task.attempt == MAX_LOST_ATTEMPTS + 3, "the first execution failed, and this is a new one"


async def test_owner_that_reconnects_soon_after_restart_keeps_its_task(store: Store, clock: ManualClock) -> None:
    kept, lost = await own(store, "one"), await own(store, "two", "l")
    assert kept.task is not None
    await store.run(leases.restart, 5000, 2 * LEASE_MS)
    await store.run(leases.renew, "one", (kept.task.task_id,), LEASE_MS)
    clock.advance(0.499)
    await store.run(leases.sweep, 0)
    with pytest.raises(Conflict):
        await own(store, "other", "l")
    clock.advance(0.001)
    await store.run(leases.sweep, 0)
    with pytest.raises(Conflict):
        await own(store, "other")
    assert (await own(store, "other", "l")).execution_id == lost.execution_id


async def test_execution_for_workers_can_not_be_owned(store: Store) -> None:
    await store.run(executions.start_execution, "w", "v1", "{}", "k")
    with pytest.raises(Conflict, match="started for workers"):
        await own(store, "one")


async def test_workflow_of_two_nodes_can_not_be_owned(store: Store) -> None:
    nodes = {"a": {"type": "EFFECT", "dependencies": []}, "b": {"type": "EFFECT", "dependencies": ["a"]}}
    await store.run(executions.register_workflow, "w", "v2", json.dumps({"nodes": nodes}))
    with pytest.raises(InvalidRequest, match="has 2 nodes, but an owned execution can have only one"):
        await store.run(tasks.start_owned, "w", "v2", "{}", "k", "one", LEASE_MS)
    assert await store.run(listing.list_executions, "w", "", 10) == []


async def test_executions_are_listed_by_key_prefix_page_by_page(store: Store) -> None:
    for key in ("a/1", "a/2", "a/3", "ab/1", "b"):
        await own(store, "one", key)
    newest = await store.run(listing.list_executions, "w", "", 2, key_prefix="a/")
    assert [one.idempotency_key for one in newest] == ["a/3", "a/2"]
    older = await store.run(
        listing.list_executions, "w", "", 2, key_prefix="a/", before=newest[-1].execution_id, with_nodes=True
    )
    assert [(one.idempotency_key, len(one.nodes)) for one in older] == [("a/1", 1)]
    of_all = await store.run(listing.list_executions, "", "", 2, key_prefix="a/")
    assert [one.idempotency_key for one in of_all] == ["a/3", "a/2"]


@pytest.mark.parametrize("prefix", ["", "a/"])
async def test_page_before_unknown_execution_is_an_error(server: ServerThread, prefix: str) -> None:
    async with NexumClient(server.address) as client:
        with pytest.raises(ExecutionNotFound, match="'typo'"):
            await client.list_executions(workflow_id="owned", key_prefix=prefix, before="typo")


async def test_list_with_nodes_ends_at_its_size_limit(store: Store) -> None:
    large = json.dumps("x" * 6_000_000)
    for key in ("a/1", "a/2", "a/3", "a/4"):
        started = await own(store, "one", key)
        assert started.task is not None
        await store.run(tasks.complete_task, started.task.task_id, large)
    pages = []
    before = ""
    while page := await store.run(
        listing.list_executions, "w", "", 100, key_prefix="a/", before=before, with_nodes=True
    ):
        pages.append([one.idempotency_key for one in page])
        before = page[-1].execution_id
    assert pages == [["a/4", "a/3"], ["a/2", "a/1"]]
    assert len(await store.run(listing.list_executions, "w", "", 100, key_prefix="a/")) == 4


async def test_execution_above_list_limit_is_its_own_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexum_engine.store.listing.MAX_LIST_BYTES", 1)
    for key in ("a", "b"):
        await own(store, "one", key)
    (newest,) = await store.run(listing.list_executions, "w", "", 10, with_nodes=True)
    (older,) = await store.run(listing.list_executions, "w", "", 10, with_nodes=True, before=newest.execution_id)
    assert [newest.idempotency_key, older.idempotency_key] == ["b", "a"]


# ---- Through a real server -------------------------------------------------------------------------------------------

DIES = """
import asyncio, sys
from nexum_engine.client import NexumClient
from nexum_engine.owner import HELD_FOR, Owner
from nexum_engine.workflow import workflow

async def main():
    async with NexumClient(sys.argv[1]) as client, Owner(client) as owner:
        await owner.start(workflow("owned").effect("a").build(), {}, idempotency_key="k")
        print("OWNED", owner.owner_id, flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


async def taken_over(owner: Owner) -> Started:
    """Start the execution as its next owner, as soon as the server notices that its owner is dead."""
    deadline = asyncio.get_running_loop().time() + 5
    while True:
        try:
            return await owner.start(OWNED, {}, idempotency_key="k")
        except Conflict:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)


async def test_killed_owner_is_taken_over_and_live_owner_is_not(server: ServerThread, tmp_path: Path) -> None:
    async with NexumClient(server.address) as client, Owner(client) as owner:
        with running(["-c", DIES, server.address], cwd=tmp_path) as process:
            name = process.wait_for("OWNED").split()[1]
            await asyncio.sleep(1.5)
            with pytest.raises(Conflict, match=f"in use by {name}"):
                await owner.start(OWNED, {}, idempotency_key="k")
            process.kill()
        started = await taken_over(owner)
        assert started.task is not None
        assert started.task.attempt == 2
        await owner.complete(started.task, {"done": True})
        again = await owner.start(OWNED, {}, idempotency_key="k")
        assert again.ended is not None
        assert again.ended.outputs() == {"a": '{"done":true}'}


BY_ONE = pb.StartRequest(
    workflow_id=OWNED.workflow_id,
    version_hash=OWNED.version_hash,
    input_json="{}",
    idempotency_key="k",
    owner="one",
)
"""The start of an execution by the owner "one"."""


async def test_first_start_that_arrives_after_its_owner_is_dead_does_not_keep_the_next_owner_waiting(
    server: ServerThread,
) -> None:
    async with NexumClient(server.address) as client, Owner(client) as two:
        await client.register_workflow(OWNED)
        with connected(server.address) as stub:
            assert stub.StartExecution(BY_ONE).HasField("task")
        started = await taken_over(two)
    assert started.task is not None
    assert started.task.attempt == 2


async def test_server_that_does_not_see_the_owners_stream_does_not_hold_its_tasks_for_longer(
    tmp_path: Path,
) -> None:
    """A session of a killed process could never be continued if each of its next runs started the server again."""
    with server_thread(tmp_path) as server:
        async with NexumClient(server.address) as client:
            await client.register_workflow(OWNED)
        with connected(server.address) as stub:
            assert stub.StartExecution(BY_ONE).HasField("task")
    with server_thread(tmp_path) as server:
        async with NexumClient(server.address) as client, Owner(client) as two:
            started = await taken_over(two)
    assert started.task is not None
    assert started.task.attempt == 2


async def test_owner_begins_although_the_server_ends_just_after_the_connection(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect_and_lose(heartbeat: Heartbeat) -> None:
        await asyncio.sleep(0)  # let the owner begin to wait
        heartbeat.connected.set()
        heartbeat.connected.clear()
        await asyncio.Event().wait()

    monkeypatch.setattr(Heartbeat, "run", connect_and_lose)
    async with NexumClient(server.address) as client, Owner(client) as owner:
        assert (await owner.start(OWNED, {}, idempotency_key="k")).task is not None


async def test_owner_cancels_execution_on_server_without_owners(server: ServerThread) -> None:
    class Ownerless(NexumClient):
        async def start_execution(self, *args: Any, **options: Any) -> Started:
            return await super().start_execution(*args, **{**options, "owner": ""})

    async with Ownerless(server.address) as client, Owner(client) as owner:
        with pytest.raises(ServerError, match="which can't record runs"):
            await owner.start(OWNED, {}, idempotency_key="k")
        (execution,) = await client.list_executions()
    assert execution.status is ExecutionStatus.CANCELLED


async def test_start_with_result_wakes_callers_that_wait(server: ServerThread) -> None:
    async with NexumClient(server.address) as client, Owner(client) as owner:
        started = await owner.start(OWNED, {}, idempotency_key="k")
        waiting = asyncio.create_task(client.get_execution(started.execution_id, wait=20))
        await asyncio.sleep(0.2)
        await owner.record(OWNED, {}, {"n": 1}, idempotency_key="k")
        assert (await asyncio.wait_for(waiting, 5)).execution.outputs() == {"a": '{"n":1}'}
        await owner.record(OWNED, {}, {"n": 1}, idempotency_key="k")
        with pytest.raises(Conflict, match="'k' has another result"):
            await owner.record(OWNED, {}, {"n": 2}, idempotency_key="k")


async def test_owner_completes_the_task_on_an_older_server(server: ServerThread) -> None:
    class Older(NexumClient):
        """A client whose server ignores `output_json`."""

        async def start_execution(self, *args: Any, **options: Any) -> Started:
            return await super().start_execution(*args, **{**options, "output_json": ""})

    async with Older(server.address) as client, Owner(client) as owner:
        await owner.record(OWNED, {}, {"n": 1}, idempotency_key="k")
        (execution,) = await client.list_executions(with_nodes=True)
        assert execution.outputs() == {"a": '{"n":1}'}
        with pytest.raises(Conflict, match="'k' already has a result"):
            await owner.record(OWNED, {}, {"n": 1}, idempotency_key="k")


async def test_published_poll_gets_no_owned_task(server: ServerThread) -> None:
    async with NexumClient(server.address) as client, Owner(client) as owner:
        await owner.start(OWNED, {}, idempotency_key="k")
        with grpc.insecure_channel(server.address) as channel:
            stub = NexumServiceStub(channel)
            answer = await asyncio.to_thread(
                stub.PollTask, pb.PollRequest(worker_id="old", version_hash=OWNED.version_hash)
            )
        assert not answer.has_task
