"""Two servers on one PostgreSQL: if both do the same at one time, it happens once. Each test tries this many times."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable
from functools import partial
from typing import Any

import pytest
from processes import wait_until

from nexum_engine.clock import ManualClock
from nexum_engine.errors import Conflict, IdempotencyConflict, NexumError, StaleTask
from nexum_engine.records import ExecutionStatus, NodeStatus, Outcome, Task
from nexum_engine.store import Store, executions, leases, listing, open_store, reading, retention, tasks, waits
from nexum_engine.store.db import Db

LEASE_MS = 30_000
psycopg = pytest.importorskip("psycopg", reason="psycopg isn't installed")

from nexum_engine.store import postgresql_servers  # noqa: E402
from nexum_engine.store.postgresql_connection import connect  # noqa: E402
from nexum_engine.store.postgresql_servers import ALIVE_SECONDS  # noqa: E402

RACES = 30
SEED = 4519
NO_RETRIES = 2**50
DIAMOND = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}
PAIR: dict[str, list[str]] = {"a": [], "b": []}
ONE: dict[str, list[str]] = {"a": []}


@pytest.fixture
async def stores(postgres_url: str, clock: ManualClock) -> AsyncIterator[tuple[Store, Store]]:
    stores = [await open_store(postgres_url, clock), await open_store(postgres_url, clock)]
    yield stores[0], stores[1]
    for store in stores:
        await store.close()


async def register(store: Store, nodes: dict[str, list[str]], workflow_id: str = "w", version: str = "v1") -> None:
    ir = {"nodes": {name: {"type": "EFFECT", "dependencies": needs} for name, needs in nodes.items()}}
    await store.run(executions.register_workflow, workflow_id, version, json.dumps(ir))


async def start(store: Store, key: str = "") -> str:
    return (await store.run(executions.start_execution, "w", "v1", "{}", key)).execution_id


async def take(store: Store, worker_id: str = "w1") -> Task | None:
    return (await store.run(tasks.claim, worker_id, ("v1",), 2**40, LEASE_MS, True)).task


async def taken(store: Store, worker_id: str = "w1") -> Task:
    task = await take(store, worker_id)
    assert task is not None
    return task


async def both(*awaitables: object) -> list[object]:
    """Return the result or the error of each awaitable."""
    return list(await asyncio.gather(*awaitables, return_exceptions=True))  # type: ignore[call-overload]


def errors(outcomes: list[object]) -> list[object]:
    return [one for one in outcomes if isinstance(one, BaseException)]


async def test_both_name_the_database_by_the_same_id(stores: tuple[Store, Store]) -> None:
    one, other = stores
    assert one.database_id == other.database_id
    assert len(one.database_id) == 32


async def test_key_started_on_both_gets_one_execution(stores: tuple[Store, Store]) -> None:
    await register(stores[0], ONE)
    for number in range(RACES):
        found = await asyncio.gather(*(start(store, f"k{number}") for store in stores for _ in range(3)))
        assert len(set(found)) == 1
    assert len(await stores[0].run(listing.list_executions, "w", "", 1000)) == RACES


async def test_key_started_on_both_with_different_inputs_is_refused_on_one(stores: tuple[Store, Store]) -> None:
    await register(stores[0], ONE)
    for number in range(RACES):
        outcomes = await both(
            *(
                store.run(executions.start_execution, "w", "v1", json.dumps(which), f"k{number}")
                for which, store in enumerate(stores)
            )
        )
        assert [type(one) for one in errors(outcomes)] == [IdempotencyConflict]


async def test_version_registered_on_both_is_stored_once(stores: tuple[Store, Store]) -> None:
    for number in range(RACES):
        await asyncio.gather(*(register(store, ONE, "w", f"v{number}") for store in stores))
    assert len(await stores[0].run(executions.workflow_versions, "w")) == RACES


async def test_each_task_is_handed_out_once(stores: tuple[Store, Store]) -> None:
    await register(stores[0], ONE)
    await asyncio.gather(*(start(store) for store in stores for _ in range(100)))

    async def claimer(store: Store, worker_id: str) -> list[str]:
        mine = []
        while task := await take(store, worker_id):
            mine.append(task.execution_id)
        return mine

    found = await asyncio.gather(*(claimer(store, f"w{n}") for n in range(10) for store in stores))
    every = [one for mine in found for one in mine]
    assert len(every) == len(set(every)) == 200
    assert len([mine for mine in found if mine]) > 1


async def test_last_two_nodes_reported_on_both_end_the_execution_once(stores: tuple[Store, Store]) -> None:
    await register(stores[0], PAIR)
    for _ in range(RACES):
        execution_id = await start(stores[0])
        held = [await taken(stores[0]), await taken(stores[1])]
        changed = await asyncio.gather(
            *(store.run(tasks.complete_task, task.task_id, "1") for store, task in zip(stores, held, strict=True))
        )
        assert [one.execution_id for change in changed for one in change.ended] == [execution_id]


async def test_next_node_of_two_reported_on_both_is_ready_once(stores: tuple[Store, Store]) -> None:
    await register(stores[0], DIAMOND)
    for _ in range(RACES):
        execution_id = await start(stores[0])
        await stores[0].run(tasks.complete_task, (await taken(stores[0])).task_id, "1")
        held = [await taken(stores[0]), await taken(stores[1])]
        changed = await asyncio.gather(
            *(store.run(tasks.complete_task, task.task_id, "1") for store, task in zip(stores, held, strict=True))
        )
        assert len([one for change in changed for one in change.ready]) == 1
        await stores[1].run(tasks.complete_task, (await taken(stores[1])).task_id, "1")
        execution = await stores[0].run(reading.get_execution, execution_id)
        assert execution.status is ExecutionStatus.COMPLETED


async def test_items_reported_on_both_complete_the_map_once(stores: tuple[Store, Store]) -> None:
    await stores[0].run(executions.register_workflow, "w", "v1", '{"nodes": {"each": {"type": "MAP"}}}')
    for _ in range(RACES):
        execution_id = await start(stores[0])
        await stores[0].run(tasks.complete_task, (await taken(stores[0])).task_id, "[0, 1, 2, 3]")
        held = [await taken(stores[number % 2]) for number in range(4)]
        changed = await asyncio.gather(
            *(stores[number % 2].run(tasks.complete_task, task.task_id, "1") for number, task in enumerate(held))
        )
        assert [one.execution_id for change in changed for one in change.ended] == [execution_id]
        execution = await stores[0].run(reading.get_execution, execution_id)
        assert execution.outputs() == {"each": "[1,1,1,1]"}


async def test_report_and_cancel_on_both_have_one_winner(stores: tuple[Store, Store]) -> None:
    await register(stores[0], ONE)
    ends = set()
    for number in range(RACES):
        execution_id = await start(stores[0])
        task = await taken(stores[0])
        report = partial(stores[0].run, tasks.complete_task, task.task_id, "1")
        cancel = partial(stores[1].run, executions.cancel_execution, execution_id)
        # Let each of them begin first in half of the races: on a fast machine, the first one wins nearly always.
        outcomes = await both(report(), cancel()) if number % 2 else await both(cancel(), report())
        (error,) = errors(outcomes)
        execution = await stores[0].run(reading.get_execution, execution_id)
        assert (type(error), execution.status) in (
            (Conflict, ExecutionStatus.COMPLETED),
            (StaleTask, ExecutionStatus.CANCELLED),
        )
        ends.add(execution.status)
    assert len(ends) == 2, f"each race had the same winner: {ends}"


async def test_child_that_ends_while_its_parent_is_cancelled(stores: tuple[Store, Store]) -> None:
    await stores[0].run(executions.register_workflow, "w", "v1", '{"nodes": {"each": {"type": "MAP"}}}')
    for _ in range(RACES):
        execution_id = await start(stores[0])
        await stores[0].run(tasks.complete_task, (await taken(stores[0])).task_id, "[1]")
        item = await taken(stores[0])
        outcomes = await both(
            stores[0].run(tasks.complete_task, item.task_id, "1"),
            stores[1].run(executions.cancel_execution, execution_id),
        )
        assert len(errors(outcomes)) == 1
        assert all(isinstance(one, NexumError) for one in errors(outcomes)), outcomes
        execution = await stores[0].run(reading.get_execution, execution_id)
        (child,) = await stores[0].run(listing.list_executions, "", "", 10, parent=execution_id)
        assert execution.status == child.status != ExecutionStatus.RUNNING


async def test_worker_that_disconnects_keeps_what_it_holds_at_another_server(
    stores: tuple[Store, Store], clock: ManualClock
) -> None:
    await register(stores[0], ONE)
    ids = [await start(stores[0]) for _ in stores]
    for store in stores:
        await store.run(lambda db: db.one("beat", seconds=60))
        await taken(store)

    async def disconnected() -> list[Outcome]:
        await stores[1].run(leases.disconnect, "w1", 1000)
        clock.advance(2)
        await stores[1].run(leases.sweep, NO_RETRIES)
        found = [await stores[0].run(reading.get_execution, one, True) for one in ids]
        return [one.nodes[0].attempts[0].outcome for one in found]

    assert await disconnected() == [Outcome.RUNNING, Outcome.LOST]
    await stores[0].run(lambda db: db.run("leave"))
    assert await disconnected() == [Outcome.LOST, Outcome.LOST]


async def test_server_that_follows_a_killed_one_takes_its_workers_at_once(
    postgres_url: str, clock: ManualClock
) -> None:
    killed, living = [await open_store(postgres_url, clock) for _ in range(2)]
    await register(killed, ONE)
    ids = [await start(killed) for _ in range(2)]
    for store in (killed, living):
        await store.run(lambda db: db.one("beat", seconds=60))
        await taken(store)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"SELECT pg_sleep(extract(epoch FROM pg_postmaster_start_time() - now()) + {ALIVE_SECONDS})")
    await killed.close()  # its row in `servers` stays, as after a kill
    follower = await open_store(postgres_url, clock)
    follower.join(lambda news: None)
    await follower.run(leases.restart, 1500, 60_000)
    clock.advance(2)
    await follower.run(leases.sweep, NO_RETRIES)
    found = [(await follower.run(reading.get_execution, one, True)).nodes[0].attempts for one in ids]
    assert [[one.outcome for one in attempts] for attempts in found] == [[Outcome.INTERRUPTED], [Outcome.RUNNING]]
    for store in (follower, living):
        await store.close()


async def outcomes_after(store: Store, clock: ManualClock, seconds: float, execution_id: str) -> list[Outcome]:
    clock.advance(seconds)
    await store.run(leases.sweep, NO_RETRIES)
    (node,) = (await store.run(reading.get_execution, execution_id, True)).nodes
    return [one.outcome for one in node.attempts]


async def test_outage_of_the_database_takes_no_task_from_the_workers_of_a_living_server(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two servers reaches the database again later than the other one."""
    reachable = {"one", "other"}

    def connect_if_reachable(url: str) -> Any:
        if url.rpartition("=")[2] not in reachable:
            raise psycopg.OperationalError("the database is down")
        return connect(url)

    async def alive(count: int) -> None:
        query = "SELECT count(*) FROM servers WHERE alive_until > now()"
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            await asyncio.to_thread(
                wait_until, lambda: connection.execute(query).fetchone() == (count,), f"{count} server(s) are alive"
            )

    def cut(*names: str) -> None:
        reachable.difference_update(names)
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = ANY(%s)"
            connection.execute(end, ([*names],))

    monkeypatch.setattr(postgresql_servers, "connect", connect_if_reachable)
    monkeypatch.setattr(postgresql_servers, "ALIVE_SECONDS", 1.0)
    monkeypatch.setattr(postgresql_servers, "BEAT_SECONDS", 0.2)
    mark = "&" if "?" in postgres_url else "?"
    one, other = [await open_store(f"{postgres_url}{mark}application_name={name}", clock) for name in ("one", "other")]
    for store in (one, other):
        store.join(lambda news: None)
    await register(one, ONE)
    execution_id = await start(one)
    await taken(one)
    await alive(2)

    cut("one", "other")
    await alive(0)
    reachable.add("other")
    await alive(1)
    await asyncio.sleep(0.4)  # the other server has looked for dead servers
    reachable.add("one")
    await alive(2)
    await asyncio.sleep(1.5)
    assert await outcomes_after(other, clock, 2, execution_id) == [Outcome.RUNNING]

    cut("one")
    await alive(1)
    await asyncio.sleep(2.5)
    assert await outcomes_after(other, clock, 2, execution_id) == [Outcome.INTERRUPTED]
    for store in (one, other):
        await store.close()


async def test_server_that_starts_after_an_outage_of_the_database_leaves_the_workers_of_the_others(
    stores: tuple[Store, Store], clock: ManualClock
) -> None:
    await register(stores[0], ONE)
    execution_id = await start(stores[0])
    await stores[0].run(lambda db: db.one("beat", seconds=0))
    await taken(stores[0])
    await stores[1].run(leases.restart, 1500, 60_000)
    assert await outcomes_after(stores[1], clock, 2, execution_id) == [Outcome.RUNNING]


async def test_loss_found_by_both_is_counted_once(stores: tuple[Store, Store], clock: ManualClock) -> None:
    await register(stores[0], ONE)
    ids = [await start(stores[0]) for _ in range(RACES)]
    for _ in ids:
        await taken(stores[0])
    clock.advance(31)
    swept = await asyncio.gather(*(store.run(leases.sweep, NO_RETRIES) for store in stores))
    assert sum(len(one.changed.ready) for one in swept) == RACES
    for _ in ids:
        await taken(stores[1])
    for execution_id in ids:
        (node,) = (await stores[0].run(reading.get_execution, execution_id, True)).nodes
        assert [one.outcome for one in node.attempts] == [Outcome.EXPIRED, Outcome.RUNNING]


async def test_lease_that_runs_out_while_its_task_is_reported(stores: tuple[Store, Store], clock: ManualClock) -> None:
    await register(stores[0], ONE)
    for _ in range(RACES):
        execution_id = await start(stores[0])
        task = await taken(stores[0])
        clock.advance(31)
        await asyncio.gather(
            stores[0].run(tasks.complete_task, task.task_id, "1"), stores[1].run(leases.sweep, NO_RETRIES)
        )
        execution = await stores[0].run(reading.get_execution, execution_id, True)
        assert execution.status is ExecutionStatus.COMPLETED
        assert [one.outcome for one in execution.nodes[0].attempts] == [Outcome.COMPLETED]


async def test_node_decided_on_both_has_one_decision(stores: tuple[Store, Store]) -> None:
    await stores[0].run(executions.register_workflow, "w", "v1", '{"nodes": {"ok": {"type": "HUMAN_APPROVAL"}}}')
    for _ in range(RACES):
        execution_id = await start(stores[0])
        outcomes = await both(
            stores[0].run(waits.approve, execution_id, "ok", "a", ""),
            stores[1].run(waits.reject, execution_id, "ok", "b", ""),
        )
        assert [type(one) for one in errors(outcomes)] == [Conflict]


async def test_session_taken_over_on_both_has_one_owner(stores: tuple[Store, Store]) -> None:
    await register(stores[0], ONE)
    for number in range(RACES):
        outcomes = await both(
            *(
                store.run(tasks.start_owned, "w", "v1", "0", f"s{number}", f"owner{which}", LEASE_MS)
                for which, store in enumerate(stores)
            )
        )
        assert [type(one) for one in errors(outcomes)] == [Conflict]


async def test_session_that_begins_again_is_not_pruned_in_part(stores: tuple[Store, Store], clock: ManualClock) -> None:
    await register(stores[0], ONE)
    for number in range(RACES):
        for event in range(3):
            one = ("w", "v1", "0", f"s{number}/a/{event}", "owner", LEASE_MS, "", "1")
            await stores[0].run(tasks.start_owned, *one)
        clock.advance(10)
        begin = ("w", "v1", "0", f"s{number}/2", "owner", LEASE_MS)
        await asyncio.gather(stores[0].run_alone(retention.prune, 5000), stores[1].run(tasks.start_owned, *begin))
        left = await stores[0].run(listing.list_executions, "w", "", 100, key_prefix=f"s{number}/")
        assert len(left) in (1, 4)


async def test_random_transitions_on_both_leave_a_sound_database(
    stores: tuple[Store, Store], clock: ManualClock
) -> None:
    """Workers on both servers report, fail and lose tasks of shared executions, in any order and all at once."""
    await register(stores[0], DIAMOND)
    ids = [await start(store) for store in stores for _ in range(20)]
    choose, done = random.Random(SEED), asyncio.Event()

    async def work(store: Store, name: str) -> None:
        while not done.is_set():
            task = await take(store, name)
            if task is None:
                await asyncio.sleep(0.005)
                continue
            fate = choose.randrange(7)
            if fate == 0:
                await store.run(tasks.fail_task, task.task_id, "no", False)
            elif fate == 1:
                await store.run(tasks.release, task.task_id, "lost")
            else:
                await store.run(tasks.complete_task, task.task_id, json.dumps(task.node_id))

    async def sweep(store: Store) -> None:
        while not done.is_set():
            clock.advance(0.5)
            await store.run(leases.sweep, 0)

    async def watch() -> None:
        while not done.is_set():
            await asyncio.sleep(0.02)
            if not await stores[0].run(listing.list_executions, "w", "RUNNING", 1):
                done.set()

    workers = [work(store, f"{number}-{n}") for number, store in enumerate(stores) for n in range(4)]
    await asyncio.wait_for(asyncio.gather(watch(), *workers, *(sweep(store) for store in stores)), 60)
    outcomes = set()
    for execution_id in ids:
        execution = await stores[0].run(reading.get_execution, execution_id, True)
        if execution.status is ExecutionStatus.COMPLETED:
            assert execution.outputs() == {name: json.dumps(name) for name in DIAMOND}
        for node in execution.nodes:
            assert [one.attempt for one in node.attempts] == list(range(1, len(node.attempts) + 1))
            outcomes |= {one.outcome for one in node.attempts}
    assert outcomes >= {Outcome.COMPLETED, Outcome.FAILED, Outcome.INTERRUPTED}


async def test_execution_is_read_as_it_was_at_one_time(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two SQL statements of one reading, the other server completes the execution."""
    await register(stores[0], ONE)
    execution_id = await start(stores[0])
    task = await taken(stores[0])
    loop = asyncio.get_running_loop()
    payload_bytes, completed = reading.payload_bytes, list[object]()

    def slow(db: Db, *args: Any) -> int:
        found = payload_bytes(db, *args)
        if not completed:
            report = stores[1].run(tasks.complete_task, task.task_id, "1")
            completed.append(asyncio.run_coroutine_threadsafe(wait_for(report), loop).result(10))
        return found

    async def wait_for(report: Awaitable[object]) -> object:
        return await report

    monkeypatch.setattr(reading, "payload_bytes", slow)
    execution = await stores[0].run(reading.get_execution, execution_id, max_bytes=2**20)
    assert completed
    (node,) = execution.nodes
    assert (execution.status, node.status) == (ExecutionStatus.RUNNING, NodeStatus.RUNNING)
    execution = await stores[0].run(reading.get_execution, execution_id, max_bytes=2**20)
    assert execution.status is ExecutionStatus.COMPLETED
