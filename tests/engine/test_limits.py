"""Limits of nodes, held by the store: rates and concurrency, over all executions, versions, servers and restarts."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from nexum_engine.clock import ManualClock
from nexum_engine.errors import InvalidRequest
from nexum_engine.records import ExecutionStatus, NodeStatus, Task
from nexum_engine.store import Store, executions, leases, open_store, reading, tasks
from nexum_engine.store.db import Db
from nexum_engine.store.results import Changes, Claim, StoredStart
from nexum_engine.workflow import Rate, Workflow, WorkflowBuilder, parse_ir, workflow

LEASE_MS = 30_000
NO_RETRIES = 2**50
SOON = 20.0  # seconds
both_stores = pytest.mark.both_stores

Reopen = Callable[[], Awaitable[Store]]


def limited(rate: str | None = None, concurrency: int | None = None, *, once: bool = False) -> Workflow:
    return workflow("limited").effect("a", rate=rate, concurrency=concurrency, once=once).build()


async def register(store: Store, *built: Workflow) -> None:
    for one in built:
        await store.run(executions.register_workflow, one.workflow_id, one.version_hash, one.ir_json)


async def start(store: Store, built: Workflow, count: int = 1) -> list[str]:
    await register(store, built)
    return [
        (await store.run(executions.start_execution, built.workflow_id, built.version_hash, "{}", "")).execution_id
        for _ in range(count)
    ]


async def claim(store: Store, *built: Workflow, worker: str = "w1") -> Claim:
    versions = tuple(one.version_hash for one in built)
    return await store.run(tasks.claim, worker, versions, 2**40, LEASE_MS, True)


async def take(store: Store, *built: Workflow, worker: str = "w1") -> Task | None:
    return (await claim(store, *built, worker=worker)).task


async def taken(store: Store, *built: Workflow, worker: str = "w1") -> Task:
    task = await take(store, *built, worker=worker)
    assert task is not None, "no task is handed out"
    return task


async def take_all(store: Store, *built: Workflow) -> list[Task]:
    found = []
    while (task := await take(store, *built)) is not None:
        found.append(task)
    return found


async def own(store: Store, built: Workflow, key: str, output_json: str = "", owner: str = "o1") -> StoredStart:
    one = (built.workflow_id, built.version_hash, "{}", key, owner, LEASE_MS, "", output_json)
    return await store.run(tasks.start_owned, *one)


async def note(store: Store, execution_id: str, node: str = "a") -> str:
    execution = await store.run(reading.get_execution, execution_id)
    return next(one.error for one in execution.nodes if one.node_id == node)


# ---- The declaration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "calls", "seconds", "shown"),
    [
        ("10/s", 10, 1, "10/s"),
        ("10/min", 10, 60, "10/min"),
        ("500/h", 500, 3600, "500/h"),
        ("3/10s", 3, 10, "3/10s"),
        ("1/1.5s", 1, 1.5, "1/1.5s"),
        (" 2 / 60 s ", 2, 60, "2/min"),
        ("7/2d", 7, 172_800, "7/172800s"),
    ],
)
def test_rate_is_parsed_and_shown(text: str, calls: int, seconds: float, shown: str) -> None:
    rate = Rate.parse(text)
    assert (rate.calls, rate.seconds, str(rate)) == (calls, seconds, shown)
    assert Rate.parse(shown) == rate


@pytest.mark.parametrize(
    ("text", "place"),
    [
        *((text, "rate") for text in ("", "10", "10/", "/min", "-1/s", "10/week", "1.5/s", "٣/s")),
        ("0/s", "rate.calls"),
        *((text, "rate.seconds") for text in ("10/0s", "1/99999999999d")),
    ],
)
def test_wrong_rate_is_refused(text: str, place: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{place}: "):
        Rate.parse(text)


def test_limits_are_left_out_of_the_ir_by_default() -> None:
    assert json.loads(workflow("w").effect("a").build().ir_json)["nodes"]["a"] == {"type": "EFFECT", "dependencies": []}
    built = limited("10/min", 2)
    assert json.loads(built.ir_json)["nodes"]["a"] == {
        "type": "EFFECT",
        "dependencies": [],
        "rate": {"calls": 10, "seconds": 60},
        "concurrency": 2,
    }
    node = parse_ir(built.ir_json)["a"]
    assert (node.rate, node.concurrency) == (Rate(calls=10, seconds=60), 2)
    assert limited("10/min", 2).version_hash != limited("10/min", 3).version_hash


def test_other_nodes_have_no_limits() -> None:
    node = {"type": "MAP", "rate": {"calls": 1, "seconds": 1.0}, "concurrency": 1}
    assert not parse_ir(json.dumps({"nodes": {"a": node}}))["a"].is_limited


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"concurrency": True},
        {"concurrency": 1.0},
        {"rate": {"calls": 0, "seconds": 1}},
        {"rate": {"calls": 1}},
        {"rate": {"calls": 1, "seconds": -1}},
        {"rate": 5},
    ],
)
def test_wrong_limit_in_the_ir_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=r"nodes\.a\.(rate|concurrency)"):
        parse_ir(json.dumps({"nodes": {"a": {"type": "EFFECT", **wrong}}}))


# ---- Rates -----------------------------------------------------------------------------------------------------------


@both_stores
async def test_rate_lets_a_burst_pass_and_then_one_task_per_interval(store: Store, clock: ManualClock) -> None:
    built = limited("3/10s")
    await start(store, built, 9)
    assert len(await take_all(store, built)) == 3
    begin = clock.now_ms()
    passed: list[int] = []
    while len(passed) < 5:
        ((_, opens_ms),) = (await claim(store, built)).opening
        clock.advance((opens_ms - clock.now_ms() - 1) / 1000)
        assert await take(store, built) is None
        clock.advance(0.001)
        passed += [clock.now_ms() - begin for _ in await take_all(store, built)]
    assert passed == [3333, 6667, 10_000, 13_333, 16_667]
    # An unused bucket fills up again, but not above its size.
    await start(store, built, 9)
    clock.advance(1000)
    assert len(await take_all(store, built)) == 3


@both_stores
async def test_claim_says_when_the_rate_lets_the_next_task_pass(store: Store, clock: ManualClock) -> None:
    built = limited("2/10s")
    await start(store, built, 4)
    begin = clock.now_ms()
    first, second, third = [await claim(store, built) for _ in range(3)]
    assert first.opening == ((built.version_hash, begin),)
    assert second.opening == third.opening == ((built.version_hash, begin + 5000),)
    assert third.task is None
    clock.advance(4.999)
    assert await take(store, built) is None
    clock.advance(0.001)
    assert (await claim(store, built)).opening == ((built.version_hash, begin + 10_000),)


@both_stores
async def test_rate_survives_a_restart(store: Store, reopen: Reopen, clock: ManualClock) -> None:
    built = limited("2/min")
    await start(store, built, 4)
    assert len(await take_all(store, built)) == 2
    clock.advance(29)
    store = await reopen()
    assert await take(store, built) is None
    clock.advance(1)
    assert len(await take_all(store, built)) == 1


@both_stores
async def test_rate_counts_retries(store: Store, clock: ManualClock) -> None:
    built = limited("2/min")
    await start(store, built)
    for _ in range(2):
        await store.run(tasks.fail_task, (await taken(store, built)).task_id, "no", False)
        clock.advance(4)
    assert await take(store, built) is None
    clock.advance(60)
    assert (await taken(store, built)).attempt == 3


@both_stores
async def test_new_rate_applies_at_once(store: Store, clock: ManualClock) -> None:
    slow, fast = limited("1/d"), limited("10/s")
    await start(store, slow)
    assert len(await take_all(store, slow)) == 1
    await start(store, fast, 2)
    assert await take(store, fast) is None  # the bucket is empty
    clock.advance(0.1)
    assert await take(store, fast) is not None


# ---- Concurrency -----------------------------------------------------------------------------------------------------


@both_stores
async def test_concurrency_holds_the_third_task_back(store: Store, reopen: Reopen) -> None:
    built = limited(concurrency=2)
    await start(store, built, 4)
    first, _ = await take_all(store, built)
    store = await reopen()
    claimed = await claim(store, built)
    assert claimed == Claim()
    changed = await store.run(tasks.complete_task, first.task_id, "1")
    assert [one.version_hash for one in changed.ready] == [built.version_hash]
    assert len(await take_all(store, built)) == 1


async def completed(store: Store, task: Task, clock: ManualClock) -> Changes:
    return await store.run(tasks.complete_task, task.task_id, "1")


async def failed(store: Store, task: Task, clock: ManualClock) -> Changes:
    return await store.run(tasks.fail_task, task.task_id, "no", False)


async def failed_finally(store: Store, task: Task, clock: ManualClock) -> Changes:
    return await store.run(tasks.fail_task, task.task_id, "no", True)


async def unknown(store: Store, task: Task, clock: ManualClock) -> Changes:
    changed = await store.run(tasks.fail_task, task.task_id, "who knows", True, True)
    (node,) = (await store.run(reading.get_execution, task.execution_id)).nodes
    assert node.status is NodeStatus.WAITING
    return changed


async def cancelled(store: Store, task: Task, clock: ManualClock) -> Changes:
    return await store.run(executions.cancel_execution, task.execution_id)


async def released(store: Store, task: Task, clock: ManualClock) -> Changes:
    return await store.run(tasks.release, task.task_id, "the poll was cancelled")


async def never_arrived(store: Store, task: Task, clock: ManualClock) -> Changes:
    clock.advance(1)
    return await store.run(leases.lose, "w1", frozenset([task.task_id]))


async def expired(store: Store, task: Task, clock: ManualClock) -> Changes:
    clock.advance(LEASE_MS / 1000 - 0.001)
    early = await store.run(leases.sweep, NO_RETRIES)
    assert not early.changed.ready  # a silent attempt counts until its lease runs out
    clock.advance(0.001)
    return (await store.run(leases.sweep, NO_RETRIES)).changed


ENDS = [completed, failed, failed_finally, unknown, cancelled, released, never_arrived, expired]


@both_stores
@pytest.mark.parametrize("end", ENDS)
async def test_each_end_of_an_attempt_announces_the_tasks_held_back(
    store: Store, clock: ManualClock, end: Callable[[Store, Task, ManualClock], Awaitable[Changes]]
) -> None:
    built, other = limited(concurrency=1), limited("100/s", 1)
    await start(store, built)
    task = await taken(store, built)
    (waiting,) = await start(store, other)  # another version of the workflow
    assert await take(store, built, other) is None
    changed = await end(store, task, clock)
    assert other.version_hash in [one.version_hash for one in changed.ready]
    assert (await taken(store, other)).execution_id == waiting
    assert await take(store, built, other) is None


@both_stores
async def test_end_of_an_attempt_announces_nothing_while_no_task_waits(store: Store) -> None:
    built = limited(concurrency=1)
    await start(store, built)
    assert (await store.run(tasks.complete_task, (await taken(store, built)).task_id, "1")).ready == []


@both_stores
async def test_cancelled_execution_frees_the_slots_of_all_its_nodes(store: Store) -> None:
    built = WorkflowBuilder("two").effect("a", concurrency=1).effect("b", depends_on=[], concurrency=1).build()
    await start(store, built, 2)
    first = await take_all(store, built)
    assert {task.node_id for task in first} == {"a", "b"}
    await store.run(tasks.fail_task, first[0].task_id, "no", True)
    assert {task.node_id for task in await take_all(store, built)} == {"a", "b"}


@both_stores
async def test_node_without_limits_is_not_held_back(store: Store) -> None:
    built = WorkflowBuilder("two").effect("a", concurrency=1).effect("b", depends_on=[]).build()
    await start(store, built, 3)
    assert [task.node_id for task in await take_all(store, built)] == ["a", "b", "b", "b"]


@both_stores
async def test_version_held_back_does_not_hide_another_one(store: Store) -> None:
    built, free = limited(concurrency=1), workflow("free").effect("a").build()
    await start(store, built, 3)
    await start(store, free, 2)
    found = await take_all(store, built, free)
    assert [task.version_hash for task in found] == [built.version_hash, free.version_hash, free.version_hash]


@both_stores
async def test_equal_nodes_of_two_workflows_have_separate_limits(store: Store) -> None:
    both = [workflow(name).effect("a", concurrency=1, rate="1/h").build() for name in ("w", "x")]
    for built in both:
        await start(store, built, 2)
        assert len(await take_all(store, built)) == 1


@both_stores
async def test_resumed_attempt_counts_again(store: Store, clock: ManualClock) -> None:
    built = limited(concurrency=1)
    await start(store, built, 2)
    task = await taken(store, built)
    clock.advance(LEASE_MS / 1000)
    await store.run(leases.sweep, NO_RETRIES)
    assert (await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS)).resumed
    assert await take(store, built) is None


# ---- Owners ----------------------------------------------------------------------------------------------------------


@both_stores
async def test_owner_held_back_gets_the_task_later(store: Store, clock: ManualClock) -> None:
    built = limited("2/min", 1)
    await register(store, built)
    first = (await own(store, built, "k1")).task
    assert first is not None
    held = await own(store, built, "k2")
    assert held.task is None
    assert held.status is ExecutionStatus.RUNNING
    assert held.held is not None
    assert held.held.opens_ms is None
    assert await note(store, held.execution_id) == "held back by its concurrency of 1"
    assert (await own(store, built, "k1")).task == first  # a repeated start does not count again
    changed = await store.run(tasks.complete_task, first.task_id, "1")
    assert [one.version_hash for one in changed.ready] == [built.version_hash]
    second = await own(store, built, "k2")
    assert second.execution_id == held.execution_id
    assert second.task is not None
    await store.run(tasks.complete_task, second.task.task_id, "1")
    third = await own(store, built, "k3")
    assert third.held is not None
    assert third.held.opens_ms == clock.now_ms() + 30_000


@both_stores
async def test_dead_owner_gives_its_slot_back(store: Store, clock: ManualClock) -> None:
    built = limited(concurrency=1)
    await register(store, built)
    assert (await own(store, built, "k1")).task is not None
    held = await own(store, built, "k2", owner="o2")
    assert held.held is not None
    clock.advance(LEASE_MS / 1000)
    swept = await store.run(leases.sweep, NO_RETRIES)
    assert [one.version_hash for one in swept.changed.ready] == [built.version_hash]
    assert (await own(store, built, "k2", owner="o2")).task is not None


@both_stores
async def test_recorded_result_needs_no_slot(store: Store) -> None:
    built = limited("1/h", 1)
    await register(store, built)
    assert (await own(store, built, "k1")).task is not None
    assert (await own(store, built, "k2", "1")).status is ExecutionStatus.COMPLETED
    assert (await own(store, built, "k3")).held is not None
    assert (await own(store, built, "k3", "1")).status is ExecutionStatus.COMPLETED


# ---- What a person sees ----------------------------------------------------------------------------------------------


@both_stores
async def test_ready_node_says_which_limit_holds_it_back(store: Store, clock: ManualClock) -> None:
    built = limited("2/10s", 1)
    first, second, third = await start(store, built, 3)
    assert await note(store, first) == ""
    task = await taken(store, built)
    assert await note(store, first) == ""
    assert await note(store, second) == await note(store, third) == "held back by its concurrency of 1"
    await store.run(tasks.complete_task, task.task_id, "1")
    assert await note(store, second) == ""
    await store.run(tasks.complete_task, (await taken(store, built)).task_id, "1")
    assert await note(store, third) == "held back by its rate of 2/10s, until 2023-11-14 22:13:25 UTC"
    clock.advance(5)
    assert await note(store, third) == ""


# ---- Two servers -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def two(postgres_url: str, clock: ManualClock) -> AsyncIterator[tuple[Store, Store]]:
    stores = [await open_store(postgres_url, clock), await open_store(postgres_url, clock)]
    yield stores[0], stores[1]
    for store in stores:
        await store.close()


async def test_two_servers_hand_out_one_burst_together(two: tuple[Store, Store], clock: ManualClock) -> None:
    built = limited("5/min", 7)
    await start(two[0], built, 60)
    for expected in (5, 1, 1, 0):
        found = await asyncio.gather(*(take(store, built, worker=f"w{n}") for n in range(5) for store in two))
        assert len([task for task in found if task is not None]) == expected
        clock.advance(12)


async def test_end_of_an_attempt_waits_for_a_claim_that_counts_it(two: tuple[Store, Store], postgres_url: str) -> None:
    """One server starts a task and tries to claim it. Meanwhile the other server ends the only attempt that may run.

    The claim gets no task, because the end of the attempt isn't committed yet. Nothing would wake a poll for the
    new task if the end didn't see this task. So the end waits until the claim's transaction is committed, and then
    announces the new task as ready.
    """
    built = limited(concurrency=1)
    await start(two[0], built)
    task = await taken(two[0], built)
    claimed, may_commit = threading.Event(), threading.Event()

    def start_and_claim(db: Db) -> Claim:
        executions.start_execution(db, "limited", built.version_hash, "{}", "")
        found = tasks.claim(db, "w2", (built.version_hash,), 2**40, LEASE_MS, True)
        claimed.set()
        assert may_commit.wait(SOON)
        return found

    import psycopg  # it may not be installed

    claiming = asyncio.ensure_future(two[1].run(start_and_claim))
    assert await asyncio.to_thread(claimed.wait, SOON)
    ending = asyncio.ensure_future(two[0].run(tasks.complete_task, task.task_id, "1"))
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        while not ending.done() and not connection.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone():
            await asyncio.wait({ending}, timeout=0.01)
    may_commit.set()
    assert await claiming == Claim()
    assert [one.version_hash for one in (await ending).ready] == [built.version_hash]
    assert await take(two[1], built) is not None
