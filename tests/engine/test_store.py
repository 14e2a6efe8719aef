"""The promises of every store (G1 to G8), on a clock that the tests move."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable

import pytest

from nexum_engine.clock import ManualClock
from nexum_engine.errors import (
    Conflict,
    ExecutionNotFound,
    IdempotencyConflict,
    InvalidRequest,
    StaleTask,
    TaskNotFound,
    TooLarge,
    VersionConflict,
    WorkflowNotFound,
)
from nexum_engine.records import Attempt, Compatibility, Execution, ExecutionStatus, NodeStatus, Outcome, Task
from nexum_engine.store import Store, base, executions, flow, leases, listing, reading, tasks, waits
from nexum_engine.store.db import Db
from nexum_engine.store.leases import MAX_LOST_ATTEMPTS, SLOW_LINE
from nexum_engine.store.results import Changes, Renewed, StoredStart
from nexum_engine.store.submitted import Submitted

pytestmark = [pytest.mark.every_python, pytest.mark.both_stores]


LEASE_MS = 30_000
GRACE_MS = 1_000
NO_RETRIES = 2**60  # a sweep looks for retries that became due after this time: it finds none
ONE: dict[str, list[str]] = {"a": []}
CHAIN: dict[str, list[str]] = {"a": [], "b": ["a"]}
DIAMOND: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}

Reopen = Callable[[], Awaitable[Store]]


async def register(
    store: Store, nodes: dict[str, list[str]], workflow_id: str = "w", version: str = "v1"
) -> Compatibility:
    ir = {"nodes": {name: {"type": "EFFECT", "dependencies": needs} for name, needs in nodes.items()}}
    return await store.run(executions.register_workflow, workflow_id, version, json.dumps(ir))


async def start(
    store: Store, nodes: dict[str, list[str]] = ONE, *, key: str = "", input_json: str = "{}"
) -> StoredStart:
    await register(store, nodes)
    return await store.run(executions.start_execution, "w", "v1", input_json, key)


async def take(store: Store, worker_id: str = "w1", *, streamed: bool = True, max_bytes: int = 2**40) -> Task | None:
    return (await store.run(tasks.claim, worker_id, ("v1",), max_bytes, LEASE_MS, streamed)).task


async def taken(store: Store, worker_id: str = "w1", *, streamed: bool = True) -> Task:
    task = await take(store, worker_id, streamed=streamed)
    assert task is not None, "no task is due"
    return task


async def attempts(store: Store, execution_id: str, node: str = "a") -> list[Attempt]:
    execution = await store.run(reading.get_execution, execution_id, True)
    return list(next(one for one in execution.nodes if one.node_id == node).attempts)


async def node_status(store: Store, execution_id: str) -> dict[str, NodeStatus]:
    return {node.node_id: node.status for node in (await store.run(reading.get_execution, execution_id)).nodes}


async def sweep(store: Store) -> tuple[int, list[Execution]]:
    """Sweep; return how many lost attempts will be retried, and which executions ended."""
    swept = await store.run(leases.sweep, NO_RETRIES)
    return len(swept.changed.ready), list(swept.changed.ended)


# ---- Starting (G6) ---------------------------------------------------------------------------------------------------


async def test_key_finds_its_running_or_completed_execution(store: Store) -> None:
    first = await start(store, key="k")
    assert not first.existing
    again = await store.run(executions.start_execution, "w", "v1", "{}", "k")
    assert (again.execution_id, again.existing, again.status) == (first.execution_id, True, ExecutionStatus.RUNNING)
    await store.run(tasks.complete_task, (await taken(store)).task_id, '"done"')
    later = await store.run(executions.start_execution, "w", "v1", "{}", "k")
    assert (later.execution_id, later.existing, later.status) == (first.execution_id, True, ExecutionStatus.COMPLETED)
    assert await take(store) is None


async def test_key_is_found_in_another_version_of_its_workflow(store: Store) -> None:
    first = await start(store, key="k")
    await register(store, CHAIN, version="v2")
    assert (await store.run(executions.start_execution, "w", "v2", "{}", "k")).execution_id == first.execution_id
    # The version of the second start need not be registered: the caller's code may have changed since the first start.
    assert (await store.run(executions.start_execution, "w", "v3", "{}", "k")).execution_id == first.execution_id


async def test_key_in_two_workflows_is_two_executions(store: Store) -> None:
    first = await start(store, key="k")
    await register(store, ONE, workflow_id="other")
    assert (await store.run(executions.start_execution, "other", "v1", "{}", "k")).execution_id != first.execution_id


@pytest.mark.parametrize("other", ['{"x":1}', '{"x":1.0}', '{"x":true}', "null"])
async def test_key_with_another_input_is_refused(store: Store, other: str) -> None:
    first = await start(
        store, key="k", input_json='{"x":2}' if other == '{"x":1}' else '{"x":1}' if other != "null" else "{}"
    )
    with pytest.raises(IdempotencyConflict, match=first.execution_id):
        await store.run(executions.start_execution, "w", "v1", other, "k")
    assert len(await store.run(listing.list_executions, "", "", 20)) == 1


async def test_key_accepts_another_spelling_of_its_input(store: Store) -> None:
    first = await start(store, key="k", input_json='{"a":1,"b":"é"}')
    again = await store.run(executions.start_execution, "w", "v1", '{ "b": "\\u00e9", "a": 1 }', "k")
    assert again.execution_id == first.execution_id


@pytest.mark.parametrize("end", ["FAILED", "CANCELLED"])
async def test_key_of_failed_or_cancelled_execution_starts_a_new_one(store: Store, end: str) -> None:
    first = await start(store, key="k")
    first_task = await taken(store)
    if end == "FAILED":
        await store.run(tasks.fail_task, first_task.task_id, "no", True)
    else:
        await store.run(executions.cancel_execution, first.execution_id)
    assert (await store.run(reading.get_execution, first.execution_id)).status == end
    second = await store.run(executions.start_execution, "w", "v1", "{}", "k")
    assert not second.existing
    assert second.execution_id != first.execution_id
    # The task has the same key as the first execution's task, so that a service can recognize the repeated call.
    assert (await taken(store)).idempotency_key == first_task.idempotency_key
    with pytest.raises(IdempotencyConflict):
        await store.run(executions.start_execution, "w", "v1", '{"x":1}', "k")


async def test_concurrent_starts_of_one_key_get_one_execution(store: Store) -> None:
    await register(store, ONE)
    started = await asyncio.gather(*(store.run(executions.start_execution, "w", "v1", "{}", "k") for _ in range(300)))
    assert len({one.execution_id for one in started}) == 1
    assert sum(not one.existing for one in started) == 1


async def test_each_start_without_key_is_a_new_execution(store: Store) -> None:
    await register(store, ONE)
    started = [await store.run(executions.start_execution, "w", "v1", "{}", "") for _ in range(2)]
    both = [await taken(store), await taken(store)]
    assert {task.execution_id for task in both} == {one.execution_id for one in started}
    assert len({task.idempotency_key for task in both}) == 2


async def test_unknown_workflow_or_version_stores_no_execution(store: Store) -> None:
    await register(store, ONE)
    for workflow_id, version in (("nowhere", "v1"), ("w", "v9")):
        with pytest.raises(WorkflowNotFound, match=r"call RegisterWorkflow first"):
            await store.run(executions.start_execution, workflow_id, version, "{}", "")
    assert await store.run(listing.list_executions, "", "", 20) == []


@pytest.mark.parametrize("text", ["{", "NaN", "[" * 100_000, "9" * 5000])
async def test_input_that_is_not_json_is_refused(store: Store, text: str) -> None:
    await register(store, ONE)
    with pytest.raises(InvalidRequest, match="input_json"):
        await store.run(executions.start_execution, "w", "v1", text, "k")
    assert await store.run(listing.list_executions, "", "", 20) == []


async def test_start_counts_its_tasks(store: Store) -> None:
    assert len((await start(store, {"a": [], "b": [], "c": ["a", "b"]})).changed.ready) == 2


# ---- Workflows -------------------------------------------------------------------------------------------------------


async def test_part_of_payload_after_its_end_is_empty(store: Store) -> None:
    execution_id = (await start(store)).execution_id
    for offset in (2, 2**31, 2**63 - 1):
        assert await store.run(reading.payload_part, execution_id, "", offset, 10) == (b"", 2)


async def test_versions_are_listed_latest_first_with_running_executions(store: Store) -> None:
    assert await register(store, ONE) is Compatibility.NEW
    assert await register(store, ONE) is Compatibility.IDENTICAL
    assert await register(store, CHAIN, version="v2") is Compatibility.SAFE
    assert await register(store, {"x": []}, version="v3") is Compatibility.BREAKING
    await store.run(executions.start_execution, "w", "v2", "{}", "")
    versions = await store.run(executions.workflow_versions, "w")
    assert [(one.version_hash, one.active_executions) for one in versions] == [("v3", 0), ("v2", 1), ("v1", 0)]
    assert await store.run(executions.workflow_versions, "nowhere") == []


async def test_version_registered_again_is_identical(store: Store) -> None:
    """Every worker that reconnects registers its version again; an old worker registers an old version."""
    versions: dict[str, dict[str, list[str]]] = {"v1": ONE, "v2": CHAIN, "v3": {"x": []}}
    for version, nodes in versions.items():
        await register(store, nodes, version=version)
    for version, nodes in versions.items():
        assert await register(store, nodes, version=version) is Compatibility.IDENTICAL
    # Registering a version again does not make it the latest version.
    assert [one.version_hash for one in await store.run(executions.workflow_versions, "w")] == ["v3", "v2", "v1"]
    assert await register(store, {"x": [], "y": []}, version="v4") is Compatibility.SAFE


async def test_version_with_another_definition_is_refused(store: Store) -> None:
    await register(store, CHAIN)
    with pytest.raises(VersionConflict, match="a changed workflow needs a new version_hash"):
        await register(store, ONE)
    assert [one.version_hash for one in await store.run(executions.workflow_versions, "w")] == ["v1"]


async def test_workflows_with_one_version_hash_get_their_own_input(store: Store) -> None:
    await register(store, ONE)
    await register(store, {"b": []}, workflow_id="other")
    await store.run(executions.start_execution, "w", "v1", "1", "")
    await store.run(executions.start_execution, "other", "v1", "2", "")
    both = {(task.node_id, json.loads(task.input_json)["input"]) for task in (await taken(store), await taken(store))}
    assert both == {("a", 1), ("b", 2)}


# ---- Running (G2, G3) ------------------------------------------------------------------------------------------------


async def test_diamond_runs_in_order_with_direct_dependencies(store: Store) -> None:
    started = await start(store, DIAMOND, input_json='{"q":1}')
    inputs: dict[str, object] = {}
    order: list[str] = []
    while (task := await take(store)) is not None:
        order.append(task.node_id)
        inputs[task.node_id] = json.loads(task.input_json)
        await store.run(tasks.complete_task, task.task_id, json.dumps({"from": task.node_id}))
    assert order == ["a", "b", "c", "d"]
    assert inputs["d"] == {"input": {"q": 1}, "deps": {"b": {"from": "b"}, "c": {"from": "c"}}}
    assert inputs["b"] == {"input": {"q": 1}, "deps": {"a": {"from": "a"}}}
    execution = await store.run(reading.get_execution, started.execution_id)
    assert execution.status is ExecutionStatus.COMPLETED
    assert execution.outputs()["d"] == '{"from": "d"}'


async def test_node_waits_for_its_second_dependency(store: Store) -> None:
    await start(store, {"a": [], "b": [], "c": ["a", "b"]})
    first, second = await taken(store), await taken(store)
    assert (await store.run(tasks.complete_task, first.task_id, "1")).ready == []
    assert await take(store) is None
    changed = await store.run(tasks.complete_task, second.task_id, "2")
    assert len(changed.ready) == 1
    assert (await taken(store)).node_id == "c"


async def test_recorded_result_never_changes(store: Store) -> None:
    started = await start(store)
    task = await taken(store)
    changed = await store.run(tasks.complete_task, task.task_id, '{"a": 1, "b": 2}')
    assert [one.execution_id for one in changed.ended] == [started.execution_id]
    again = await store.run(tasks.complete_task, task.task_id, '{"b":2,"a":1}')
    assert (again.ready, again.ended) == ([], [])
    for other in ('{"a": 1}', '{"a": 1.0, "b": 2}'):
        with pytest.raises(StaleTask):
            await store.run(tasks.complete_task, task.task_id, other)
    with pytest.raises(StaleTask):
        await store.run(tasks.fail_task, task.task_id, "after all", False)
    execution = await store.run(reading.get_execution, started.execution_id)
    assert execution.outputs() == {"a": '{"a": 1, "b": 2}'}
    assert execution.status is ExecutionStatus.COMPLETED


async def test_recorded_node_is_never_handed_out_again(store: Store, clock: ManualClock) -> None:
    started = await start(store, CHAIN)
    task = await taken(store)
    await store.run(tasks.complete_task, task.task_id, "1")
    clock.advance(10 * LEASE_MS)
    await sweep(store)
    assert (await taken(store)).node_id == "b"
    assert await take(store) is None
    assert len(await attempts(store, started.execution_id, "a")) == 1


async def test_output_that_is_not_json_is_refused_and_attempt_continues(store: Store) -> None:
    await start(store)
    task = await taken(store)
    for text in ("", "{", "NaN", "[" * 100_000):
        with pytest.raises(InvalidRequest, match="output_json"):
            await store.run(tasks.complete_task, task.task_id, text)
    await store.run(tasks.complete_task, task.task_id, "null")


async def test_unknown_task_is_refused(store: Store) -> None:
    with pytest.raises(TaskNotFound, match="'task-nowhere'"):
        await store.run(tasks.complete_task, "task-nowhere", "1")
    with pytest.raises(TaskNotFound):
        await store.run(tasks.fail_task, "task-nowhere", "why", False)
    with pytest.raises(InvalidRequest, match="task_id is empty"):
        await store.run(tasks.complete_task, "", "1")


async def test_claim_takes_longest_due_task_of_its_versions(store: Store, clock: ManualClock) -> None:
    await register(store, ONE)
    await register(store, ONE, workflow_id="other", version="v2")
    expected = []
    for version, workflow_id in (("v2", "other"), ("v1", "w"), ("v2", "other")):
        expected.append((await store.run(executions.start_execution, workflow_id, version, "{}", "")).execution_id)
        clock.advance(0.001)
    assert (await store.run(tasks.claim, "w1", ("v9",), 2**40, LEASE_MS, True)).task is None
    order = [(await store.run(tasks.claim, "w1", ("v1", "v2"), 2**40, LEASE_MS, True)).task for _ in range(3)]
    assert [task.execution_id for task in order if task is not None] == expected


# ---- Failures (G8) ---------------------------------------------------------------------------------------------------


async def test_failing_node_is_retried_after_1_2_and_4_seconds(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    for attempt, delay in enumerate((1, 2, 4), start=1):
        task = await taken(store)
        assert task.attempt == attempt
        changed = await store.run(tasks.fail_task, task.task_id, f"reason {attempt}", False)
        assert changed.due_ms == clock.now_ms() + delay * 1000
        clock.advance(delay - 0.001)
        assert await take(store) is None
        clock.advance(0.001)
    changed = await store.run(tasks.fail_task, (await taken(store)).task_id, "reason 4", False)
    assert [one.status for one in changed.ended] == [ExecutionStatus.FAILED]
    execution = await store.run(reading.get_execution, started.execution_id, True)
    assert execution.error == "a: reason 4 (attempt 4 of 4)"
    assert [(one.outcome, one.error) for one in execution.nodes[0].attempts] == [
        (Outcome.FAILED, f"reason {n}") for n in range(1, 5)
    ]
    clock.advance(3600)
    assert await take(store) is None


async def test_due_retry_is_announced_once(store: Store, clock: ManualClock) -> None:
    await start(store)
    await store.run(tasks.fail_task, (await taken(store)).task_id, "no", False)
    since = clock.now_ms()
    clock.advance(0.999)
    swept = await store.run(leases.sweep, since)
    assert (swept.changed.ready, swept.next_ms) == ([], since + 1000)
    clock.advance(0.001)
    assert len((await store.run(leases.sweep, since)).changed.ready) == 1
    assert (await store.run(leases.sweep, clock.now_ms())).changed.ready == []


async def test_final_failure_ends_the_execution(store: Store, clock: ManualClock) -> None:
    started = await start(store, {"a": [], "b": [], "c": ["a", "b"]})
    first, second = await taken(store), await taken(store)
    await store.run(tasks.fail_task, first.task_id, "no such tool", True)
    execution = await store.run(reading.get_execution, started.execution_id, True)
    assert (execution.status, execution.error) == (ExecutionStatus.FAILED, "a: no such tool")
    assert await node_status(store, started.execution_id) == {
        "a": NodeStatus.FAILED,
        "b": NodeStatus.CANCELLED,
        "c": NodeStatus.CANCELLED,
    }
    with pytest.raises(StaleTask, match="the execution is FAILED"):
        await store.run(tasks.complete_task, second.task_id, "1")
    clock.advance(3600)
    assert await take(store) is None


async def test_failure_reported_twice_counts_once(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    task = await taken(store)
    for _ in range(5):
        await store.run(tasks.fail_task, task.task_id, "same", False)
    with pytest.raises(StaleTask, match="already reported as FAILED"):
        await store.run(tasks.fail_task, task.task_id, "another", False)
    with pytest.raises(StaleTask):
        await store.run(tasks.complete_task, task.task_id, "1")
    clock.advance(1)
    assert (await taken(store)).attempt == 2
    await store.run(tasks.fail_task, task.task_id, "same", False)
    assert [one.outcome for one in await attempts(store, started.execution_id)] == [Outcome.FAILED, Outcome.RUNNING]


async def test_failure_reason_is_cut_and_never_empty(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    task = await taken(store)
    for _ in range(2):  # an equal second report changes nothing, even if its reason was cut
        await store.run(tasks.fail_task, task.task_id, "x" * 100_000, False)
    clock.advance(1)
    await store.run(tasks.fail_task, (await taken(store)).task_id, "", True)
    reasons = [one.error for one in await attempts(store, started.execution_id)]
    assert reasons == [f"{'x' * 4000} [cut: 4,000 of 100,000 characters]", "the worker gave no reason"]


async def test_lost_and_failed_attempts_are_counted_separately(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    for lost in range(MAX_LOST_ATTEMPTS - 1):
        await taken(store, f"crashing-{lost}")
        clock.advance(LEASE_MS / 1000)
        assert await sweep(store) == (1, [])
    for delay in (1, 2, 4):
        await store.run(tasks.fail_task, (await taken(store)).task_id, "no", False)
        clock.advance(delay)
    await store.run(tasks.complete_task, (await taken(store)).task_id, "1")
    outcomes = [one.outcome for one in await attempts(store, started.execution_id)]
    assert outcomes == [Outcome.EXPIRED] * 9 + [Outcome.FAILED] * 3 + [Outcome.COMPLETED]


async def test_node_fails_after_ten_lost_attempts(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    for lost in range(1, MAX_LOST_ATTEMPTS + 1):
        await taken(store)
        await store.run(leases.disconnect, "w1", GRACE_MS)
        clock.advance(GRACE_MS / 1000)
        ready, ended = await sweep(store)
        assert (ready, len(ended)) == ((1, 0) if lost < MAX_LOST_ATTEMPTS else (0, 1))
    execution = await store.run(reading.get_execution, started.execution_id, True)
    assert execution.status is ExecutionStatus.FAILED
    assert execution.error == (
        "a: 10 attempts were lost, the last because worker w1 disconnected and did not reconnect; "
        "the task itself may kill its workers"
    )
    assert {one.outcome for one in execution.nodes[0].attempts} == {Outcome.LOST}
    assert await take(store) is None


async def test_loss_that_ends_execution_cancels_its_other_expired_attempt(store: Store, clock: ManualClock) -> None:
    started = await start(store, {"a": [], "b": []})
    await taken(store, "steady")
    for _ in range(MAX_LOST_ATTEMPTS - 1):
        await taken(store, "crashing")
        await store.run(leases.disconnect, "crashing", GRACE_MS)
        clock.advance(GRACE_MS / 1000)
        assert await sweep(store) == (1, [])
    await taken(store, "crashing")
    await store.run(leases.disconnect, "crashing", GRACE_MS)
    clock.advance(LEASE_MS / 1000)
    ready, ended = await sweep(store)
    assert (ready, [one.status for one in ended]) == (0, [ExecutionStatus.FAILED])
    last = [(await attempts(store, started.execution_id, node))[-1] for node in ("a", "b")]
    assert {one.worker_id: (one.outcome, one.error) for one in last} == {
        "crashing": (Outcome.LOST, "worker crashing disconnected and did not reconnect"),
        "steady": (Outcome.CANCELLED, ""),
    }


# ---- Leases and fencing ----------------------------------------------------------------------------------------------


async def test_lease_ends_at_its_exact_millisecond(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    first = await taken(store)
    clock.advance((LEASE_MS - 1) / 1000)
    swept = await store.run(leases.sweep, NO_RETRIES)
    assert (swept.changed.ready, swept.next_ms) == ([], clock.now_ms() + 1)
    assert await take(store, "w2") is None
    clock.advance(0.001)
    swept = await store.run(leases.sweep, clock.now_ms() - 1)
    assert len(swept.changed.ready) == 1
    second = await taken(store, "w2")
    assert (second.attempt, second.idempotency_key) == (2, first.idempotency_key)
    lost = (await attempts(store, started.execution_id))[0]
    assert (lost.outcome, lost.error) == (Outcome.EXPIRED, "worker w1 sent no heartbeat for longer than its lease")


async def test_heartbeat_renews_only_the_leases_of_named_tasks(store: Store, clock: ManualClock) -> None:
    await register(store, ONE)
    for _ in range(3):
        await store.run(executions.start_execution, "w", "v1", "{}", "")
    kept, dropped, others = await taken(store), await taken(store), await taken(store, "w2")
    clock.advance((LEASE_MS - 1) / 1000)
    await store.run(leases.renew, "w1", (kept.task_id, others.task_id, "task-unknown"), LEASE_MS)
    clock.advance(0.001)
    assert await sweep(store) == (2, [])
    assert {(await taken(store, "w3")).execution_id for _ in range(2)} == {dropped.execution_id, others.execution_id}
    clock.advance((LEASE_MS - 1) / 1000)
    assert (await sweep(store))[0] == 1


async def test_worker_that_reconnects_within_grace_keeps_its_task(store: Store, clock: ManualClock) -> None:
    await start(store)
    task = await taken(store)
    await store.run(leases.disconnect, "w1", GRACE_MS)
    clock.advance((GRACE_MS - 1) / 1000)
    await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS)
    clock.advance((LEASE_MS - 1) / 1000)
    assert await sweep(store) == (0, [])
    await store.run(tasks.complete_task, task.task_id, "1")


async def test_grace_ends_at_its_exact_millisecond(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    await taken(store)
    await store.run(leases.disconnect, "w1", GRACE_MS)
    clock.advance((GRACE_MS - 1) / 1000)
    assert await sweep(store) == (0, [])
    clock.advance(0.001)
    assert await sweep(store) == (1, [])
    assert (await attempts(store, started.execution_id))[0].outcome is Outcome.LOST


async def test_grace_does_not_extend_a_lease(store: Store, clock: ManualClock) -> None:
    await start(store)
    await taken(store)
    clock.advance((LEASE_MS - 1) / 1000)
    await store.run(leases.disconnect, "w1", GRACE_MS)
    clock.advance(0.001)
    assert await sweep(store) == (1, [])


async def test_disconnect_shortens_only_leases_of_its_streamed_worker(store: Store, clock: ManualClock) -> None:
    await register(store, ONE)
    for _ in range(2):
        await store.run(executions.start_execution, "w", "v1", "{}", "")
    await taken(store, "w2")
    await taken(store, "w1", streamed=False)
    await store.run(leases.disconnect, "w1", GRACE_MS)
    clock.advance((LEASE_MS - 1) / 1000)
    assert await sweep(store) == (0, [])


@pytest.mark.parametrize("loss", [Outcome.EXPIRED, Outcome.LOST, Outcome.INTERRUPTED])
async def test_heartbeat_resumes_attempt_whose_lease_ran_out(store: Store, clock: ManualClock, loss: Outcome) -> None:
    started = await start(store)
    task = await taken(store)
    if loss is Outcome.LOST:
        await store.run(leases.disconnect, "w1", GRACE_MS)
    elif loss is Outcome.INTERRUPTED:
        await store.run(leases.restart, GRACE_MS, GRACE_MS)
    clock.advance(LEASE_MS / 1000)
    assert await sweep(store) == (1, [])
    (ended,) = await attempts(store, started.execution_id)
    assert ended.outcome is loss
    assert await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS) == Renewed(frozenset(), resumed=True)
    (resumed,) = await attempts(store, started.execution_id)
    assert (resumed.outcome, resumed.ended_ms, resumed.error) == (Outcome.RUNNING, None, "")
    assert await take(store, "w2") is None
    clock.advance((LEASE_MS - 1) / 1000)
    assert await sweep(store) == (0, [])
    await store.run(tasks.complete_task, task.task_id, "1")
    assert (await store.run(reading.get_execution, started.execution_id)).status is ExecutionStatus.COMPLETED


async def test_resumed_attempt_does_not_count_as_lost(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    task = await taken(store)
    for _ in range(2 * MAX_LOST_ATTEMPTS):
        clock.advance(LEASE_MS / 1000)
        assert await sweep(store) == (1, [])
        assert (await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS)).resumed
    assert (await store.run(reading.get_execution, started.execution_id)).status is ExecutionStatus.RUNNING


async def test_heartbeat_resumes_no_foreign_or_ended_attempt(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    task = await taken(store)
    assert (await store.run(leases.renew, "w2", (task.task_id,), LEASE_MS)).lost == (task.task_id,)
    clock.advance(LEASE_MS / 1000)
    await sweep(store)
    assert (await store.run(leases.renew, "w2", (task.task_id,), LEASE_MS)).lost == (task.task_id,)
    await store.run(executions.cancel_execution, started.execution_id)
    assert (await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS)).lost == (task.task_id,)


async def test_stale_report_is_refused_after_newer_attempt(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    stale = await taken(store)
    clock.advance(LEASE_MS / 1000)
    await sweep(store)
    newer = await taken(store, "w2")
    with pytest.raises(StaleTask, match=r"attempt 1 .* is over \(EXPIRED\): attempt 2 was handed out later"):
        await store.run(tasks.complete_task, stale.task_id, '"stale"')
    with pytest.raises(StaleTask):
        await store.run(tasks.fail_task, stale.task_id, "stale", True)
    assert await store.run(leases.renew, "w1", (stale.task_id,), LEASE_MS) == Renewed(frozenset(), (stale.task_id,))
    await store.run(tasks.complete_task, newer.task_id, '"newer"')
    assert (await store.run(reading.get_execution, started.execution_id)).outputs() == {"a": '"newer"'}


async def test_first_result_of_a_worker_without_a_stream_counts(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    first = await taken(store, streamed=False)
    clock.advance(LEASE_MS / 1000)
    await sweep(store)
    second = await taken(store, streamed=False)
    with pytest.raises(StaleTask, match="attempt 2 was handed out later"):
        await store.run(tasks.fail_task, first.task_id, "late", False)
    await store.run(tasks.complete_task, first.task_id, '"first"')
    assert await store.run(tasks.complete_task, second.task_id, '"first"') == Changes()
    with pytest.raises(StaleTask, match="the execution is COMPLETED"):
        await store.run(tasks.complete_task, second.task_id, '"second"')
    execution = await store.run(reading.get_execution, started.execution_id)
    assert (execution.status, execution.outputs()) == (ExecutionStatus.COMPLETED, {"a": '"first"'})
    assert [one.outcome for one in await attempts(store, started.execution_id)] == [Outcome.EXPIRED, Outcome.COMPLETED]


async def test_result_is_refused_if_another_worker_without_a_stream_has_the_task(
    store: Store, clock: ManualClock
) -> None:
    await start(store)
    first = await taken(store, "w1", streamed=False)
    clock.advance(LEASE_MS / 1000)
    await sweep(store)
    await taken(store, "w2", streamed=False)
    with pytest.raises(StaleTask, match="attempt 2 was handed out later"):
        await store.run(tasks.complete_task, first.task_id, '"first"')


async def test_late_report_is_accepted_before_newer_attempt(store: Store, clock: ManualClock) -> None:
    started = await start(store, CHAIN)
    late = await taken(store)
    clock.advance(LEASE_MS / 1000)
    assert await sweep(store) == (1, [])
    changed = await store.run(tasks.complete_task, late.task_id, '"late"')
    assert len(changed.ready) == 1
    assert (await taken(store)).node_id == "b"
    assert (await attempts(store, started.execution_id))[0].outcome is Outcome.COMPLETED


async def test_late_failure_is_not_counted_as_a_loss(store: Store, clock: ManualClock) -> None:
    started = await start(store)
    for _ in range(MAX_LOST_ATTEMPTS - 1):
        late = await taken(store)
        clock.advance(LEASE_MS / 1000)
        await sweep(store)
    await store.run(tasks.fail_task, late.task_id, "no", False)
    clock.advance(1)
    # The last attempt was lost, but then its worker reported a failure: now the attempt counts as failed, not as lost.
    # So one more loss doesn't end the execution.
    await taken(store)
    clock.advance(LEASE_MS / 1000)
    assert await sweep(store) == (1, [])
    assert (await store.run(reading.get_execution, started.execution_id)).status is ExecutionStatus.RUNNING


async def test_interrupted_attempts_after_restart_are_not_counted(
    store: Store, reopen: Reopen, clock: ManualClock
) -> None:
    started = await start(store)
    current = store
    for _ in range(MAX_LOST_ATTEMPTS + 2):
        await taken(current)
        current = await reopen()
        await current.run(leases.restart, 5000, 2 * LEASE_MS)
        clock.advance(4.999)
        assert await sweep(current) == (0, [])
        clock.advance(0.001)
        assert await sweep(current) == (1, [])
    assert {one.outcome for one in await attempts(current, started.execution_id)} == {Outcome.INTERRUPTED}
    await current.run(tasks.complete_task, (await taken(current)).task_id, "1")


async def test_clock_set_back_between_servers_delays_no_task(store: Store, reopen: Reopen, clock: ManualClock) -> None:
    first = await start(store)
    lost = await taken(store)
    waiting = await store.run(executions.start_execution, "w", "v1", "{}", "")
    clock.advance(-3600)
    again = await reopen()
    await again.run(leases.restart, 5000, 2 * LEASE_MS)
    clock.advance(5)
    assert await sweep(again) == (1, [])
    handed_out = [await taken(again) for _ in range(2)]
    assert {task.execution_id for task in handed_out} == {first.execution_id, waiting.execution_id}
    with pytest.raises(StaleTask):
        await again.run(tasks.complete_task, lost.task_id, "1")


async def test_retry_keeps_its_delay_across_a_restart(store: Store, reopen: Reopen, clock: ManualClock) -> None:
    await start(store)
    for delay in (1, 2):
        await store.run(tasks.fail_task, (await taken(store)).task_id, "no", False)
        clock.advance(delay)
    await store.run(tasks.fail_task, (await taken(store)).task_id, "no", False)
    again = await reopen()
    await again.run(leases.restart, 5000, 2 * LEASE_MS)
    clock.advance(3.999)
    assert await take(again) is None
    clock.advance(0.001)
    assert await take(again) is not None


async def test_worker_keeps_its_task_across_a_restart(store: Store, reopen: Reopen, clock: ManualClock) -> None:
    await register(store, ONE)
    for _ in range(2):
        await store.run(executions.start_execution, "w", "v1", "{}", "")
    beating, polling = await taken(store), await taken(store, "w2", streamed=False)
    again = await reopen()
    await again.run(leases.restart, 5000, 2 * LEASE_MS)
    await again.run(leases.renew, "w1", (beating.task_id,), LEASE_MS)
    clock.advance((LEASE_MS - 1) / 1000)
    assert await sweep(again) == (0, [])
    await again.run(tasks.complete_task, beating.task_id, "1")
    await again.run(tasks.complete_task, polling.task_id, "1")


async def test_leases_in_the_process_of_a_killed_server_end_at_once(
    store: Store, reopen: Reopen, clock: ManualClock
) -> None:
    await register(store, ONE)
    for _ in range(2):
        await store.run(executions.start_execution, "w", "v1", "{}", "")
    dead, other = await taken(store, "host-1-a"), await taken(store, "host-12-b")
    owner = ("w", "v1", "{}", "owned")
    assert (await store.run(tasks.start_owned, *owner, "host-1-c", LEASE_MS)).task is not None
    again = await reopen()
    await again.run(leases.restart, 5000, 2 * LEASE_MS, "host-1-")
    assert await sweep(again) == (1, [])
    assert (await taken(again, "host-12-b")).execution_id == dead.execution_id
    taken_over = (await again.run(tasks.start_owned, *owner, "host-12-d", LEASE_MS)).task
    assert taken_over is not None
    assert taken_over.attempt == 2
    await again.run(tasks.complete_task, other.task_id, "1")


async def test_worker_that_hangs_after_restart_counts_as_lost(store: Store, reopen: Reopen, clock: ManualClock) -> None:
    started = await start(store)
    task = await taken(store)
    again = await reopen()
    await again.run(leases.restart, 5000, 2 * LEASE_MS)
    await again.run(leases.renew, "w1", (task.task_id,), LEASE_MS)
    clock.advance(LEASE_MS / 1000)
    assert await sweep(again) == (1, [])
    assert (await attempts(again, started.execution_id))[0].outcome is Outcome.EXPIRED


async def test_released_task_is_not_counted_as_lost(store: Store) -> None:
    started = await start(store)
    for _ in range(MAX_LOST_ATTEMPTS + 2):
        changed = await store.run(tasks.release, (await taken(store)).task_id, "gone")
        assert len(changed.ready) == 1
    task = await taken(store)
    await store.run(tasks.complete_task, task.task_id, "1")
    assert (await store.run(tasks.release, task.task_id, "gone")).ready == []
    assert (await store.run(tasks.release, "task-unknown", "gone")).ready == []
    assert (await store.run(reading.get_execution, started.execution_id)).status is ExecutionStatus.COMPLETED


async def test_renew_returns_handed_out_tasks_that_heartbeat_did_not_name(store: Store) -> None:
    await start(store)
    await store.run(executions.start_execution, "w", "v1", "{}", "")
    named, unnamed = await taken(store), await taken(store)
    assert await store.run(leases.renew, "w1", (named.task_id, "task-unknown"), LEASE_MS) == Renewed(
        frozenset({unnamed.task_id}), ("task-unknown",)
    )
    assert await store.run(leases.renew, "w2", (), LEASE_MS) == Renewed(frozenset())
    await store.run(tasks.complete_task, unnamed.task_id, "1")
    assert (await store.run(leases.renew, "w1", (), LEASE_MS)).unnamed == {named.task_id}


async def test_large_task_has_time_to_reach_its_worker(store: Store, clock: ManualClock) -> None:
    await start(store, input_json=json.dumps("x" * 10_000 * SLOW_LINE))
    task = await taken(store)
    clock.advance(9.9)
    assert (await store.run(leases.renew, "w1", (), LEASE_MS)).unnamed == set()
    clock.advance(0.2)
    assert (await store.run(leases.renew, "w1", (), LEASE_MS)).unnamed == {task.task_id}


async def test_task_that_never_arrived_counts_as_lost_and_is_retried(store: Store) -> None:
    started = await start(store)
    for _ in range(MAX_LOST_ATTEMPTS - 1):
        changed = await store.run(leases.lose, "w1", frozenset({(await taken(store)).task_id}))
        assert (len(changed.ready), changed.ended) == (1, [])
    lost = await attempts(store, started.execution_id)
    assert {(one.outcome, one.error) for one in lost} == {
        (Outcome.LOST, "the task did not reach worker w1: two heartbeats in a row did not name it")
    }
    last = await taken(store)
    assert await store.run(leases.lose, "w2", frozenset({last.task_id})) == Changes()
    # The number of losses is limited, because some tasks can never arrive.
    (ended,) = (await store.run(leases.lose, "w1", frozenset({last.task_id}))).ended
    assert ended.status is ExecutionStatus.FAILED
    assert await store.run(leases.lose, "w1", frozenset({last.task_id})) == Changes()


# ---- Cancelling ------------------------------------------------------------------------------------------------------


async def test_cancelled_execution_hands_out_no_task_and_refuses_results(store: Store, clock: ManualClock) -> None:
    started = await start(store, {"a": [], "b": [], "c": ["a"]})
    task = await taken(store)
    changed = await store.run(executions.cancel_execution, started.execution_id)
    assert [one.status for one in changed.ended] == [ExecutionStatus.CANCELLED]
    assert set((await node_status(store, started.execution_id)).values()) == {NodeStatus.CANCELLED}
    assert (await attempts(store, started.execution_id))[0].outcome is Outcome.CANCELLED
    with pytest.raises(StaleTask, match="the execution is CANCELLED"):
        await store.run(tasks.complete_task, task.task_id, "1")
    clock.advance(3600)
    assert await sweep(store) == (0, [])
    assert await take(store) is None


async def test_cancel_keeps_recorded_results(store: Store) -> None:
    started = await start(store, CHAIN)
    await store.run(tasks.complete_task, (await taken(store)).task_id, '"kept"')
    await store.run(executions.cancel_execution, started.execution_id)
    execution = await store.run(reading.get_execution, started.execution_id)
    assert execution.outputs() == {"a": '"kept"'}
    assert [node.status for node in execution.nodes] == [NodeStatus.COMPLETED, NodeStatus.CANCELLED]


async def test_second_cancel_is_accepted_but_not_after_another_end(store: Store) -> None:
    started = await start(store)
    await store.run(executions.cancel_execution, started.execution_id)
    assert (await store.run(executions.cancel_execution, started.execution_id)).ended == []
    done = await store.run(executions.start_execution, "w", "v1", "{}", "")
    await store.run(tasks.complete_task, (await taken(store)).task_id, "1")
    with pytest.raises(Conflict, match="is COMPLETED and can't be cancelled any more"):
        await store.run(executions.cancel_execution, done.execution_id)
    with pytest.raises(ExecutionNotFound, match="'exec-nowhere'"):
        await store.run(executions.cancel_execution, "exec-nowhere")


# ---- Sizes -----------------------------------------------------------------------------------------------------------


async def test_task_too_large_for_worker_waits_and_notes_why(store: Store) -> None:
    started = await start(store, input_json=json.dumps("é" * 1000))
    claim = await store.run(tasks.claim, "small", ("v1",), 1500, LEASE_MS, True)
    assert claim.task is None
    assert claim.oversized is not None
    node = (await store.run(reading.get_execution, started.execution_id)).nodes[0]
    assert node.status is NodeStatus.READY
    assert node.error.startswith(
        f"the task is {claim.oversized.task_bytes:,} bytes, more than worker small can receive"
    )
    task = await taken(store, "large")
    assert len(task.input_json.encode()) <= claim.oversized.task_bytes
    assert (await store.run(reading.get_execution, started.execution_id)).nodes[0].error == ""


async def test_task_size_counts_outputs_of_dependencies(store: Store) -> None:
    await start(store, CHAIN)
    await store.run(tasks.complete_task, (await taken(store)).task_id, json.dumps("€" * 1000, ensure_ascii=False))
    assert (await store.run(tasks.claim, "small", ("v1",), 3000, LEASE_MS, True)).oversized is not None
    task = (await store.run(tasks.claim, "large", ("v1",), 3200, LEASE_MS, True)).task
    assert task is not None
    assert 3000 < len(task.input_json.encode()) <= 3200


async def test_large_task_does_not_delay_a_small_one(store: Store, clock: ManualClock) -> None:
    await start(store, input_json=json.dumps("x" * 1000))
    clock.advance(1)
    small = await store.run(executions.start_execution, "w", "v1", "1", "")
    task = await take(store, max_bytes=500)
    assert task is not None
    assert task.execution_id == small.execution_id


# ---- Lists -----------------------------------------------------------------------------------------------------------


async def test_executions_are_listed_newest_first_and_filtered(store: Store) -> None:
    await register(store, ONE)
    await register(store, ONE, workflow_id="other")
    ids = [(await store.run(executions.start_execution, "w", "v1", "{}", "")).execution_id for _ in range(3)]
    ids.append((await store.run(executions.start_execution, "other", "v1", "{}", "")).execution_id)
    await store.run(executions.cancel_execution, ids[1])
    assert [one.execution_id for one in await store.run(listing.list_executions, "", "", 20)] == ids[::-1]
    assert [one.execution_id for one in await store.run(listing.list_executions, "", "", 2)] == ids[:1:-1]
    assert [one.execution_id for one in await store.run(listing.list_executions, "other", "", 20)] == ids[3:]
    assert [one.execution_id for one in await store.run(listing.list_executions, "", "CANCELLED", 20)] == [ids[1]]
    with pytest.raises(InvalidRequest, match="unknown status 'DONE': use one of RUNNING"):
        await store.run(listing.list_executions, "", "DONE", 20)


# ---- Durability (G1) -------------------------------------------------------------------------------------------------


async def test_limit_of_outputs_counts_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "MAX_OUTPUT_BYTES", 100_000)
    await start(store)
    task = await taken(store)
    with pytest.raises(TooLarge, match="over the limit of 100,000 bytes"):
        await store.run(tasks.complete_task, task.task_id, json.dumps("é" * 70_000, ensure_ascii=False))
    await store.run(tasks.complete_task, task.task_id, json.dumps("e" * 70_000))


async def test_records_survive_reopening_the_store(store: Store, reopen: Reopen) -> None:
    started = await start(store, CHAIN, key="k", input_json='{"text":"é😀\\u0000"}')
    await store.run(tasks.complete_task, (await taken(store)).task_id, '"recorded"')
    task = await taken(store)
    await store.run(tasks.fail_task, task.task_id, "why", False)
    before = await store.run(reading.get_execution, started.execution_id, True)
    again = await reopen()
    assert await again.run(reading.get_execution, started.execution_id, True) == before
    assert (await again.run(executions.start_execution, "w", "v1", '{"text":"é😀\\u0000"}', "k")).existing


async def test_failing_transition_raises_only_for_its_caller(store: Store) -> None:
    """The other transitions of the same transaction succeed."""
    await register(store, ONE)
    outcomes = await asyncio.gather(
        store.run(executions.start_execution, "w", "v1", "1", ""),
        store.run(executions.start_execution, "w", "v1", "{", ""),
        store.run(tasks.complete_task, "task-unknown", "1"),
        store.run(executions.start_execution, "w", "v1", "2", ""),
        return_exceptions=True,
    )
    assert [type(one) for one in outcomes] == [StoredStart, InvalidRequest, TaskNotFound, StoredStart]
    assert len(await store.run(listing.list_executions, "", "", 20)) == 2


async def test_fifty_claimers_get_each_of_200_tasks_once(store: Store) -> None:
    await register(store, ONE)
    started = await asyncio.gather(*(store.run(executions.start_execution, "w", "v1", str(n), "") for n in range(200)))

    async def work(worker_id: str) -> list[str]:
        mine = []
        while (task := await take(store, worker_id)) is not None:
            mine.append(task.execution_id)
            await store.run(tasks.complete_task, task.task_id, "1")
        return mine

    shares = await asyncio.gather(*(work(f"w{n}") for n in range(50)))
    assert sorted(one for share in shares for one in share) == sorted(one.execution_id for one in started)


# ---- Nodes that start executions, or wait ----------------------------------------------------------------------------


async def register_ir(store: Store, workflow_id: str, version: str, nodes: dict[str, dict[str, object]]) -> None:
    ir = {"nodes": {name: {"dependencies": [], **fields} for name, fields in nodes.items()}}
    await store.run(executions.register_workflow, workflow_id, version, json.dumps(ir))


@pytest.mark.parametrize("last", ["a", "b"])
async def test_childs_output_is_of_the_node_that_completed_last_within_a_millisecond(store: Store, last: str) -> None:
    await register(store, {"a": [], "b": []}, workflow_id="child")
    await register_ir(store, "parent", "p1", {"sub": {"type": "SUBWORKFLOW"}})
    execution_id = (await store.run(executions.start_execution, "parent", "p1", "{}", "")).execution_id
    start_of_child = (await store.run(tasks.claim, "w1", ("p1",), 2**40, LEASE_MS, True)).task
    assert start_of_child is not None
    await store.run(tasks.complete_task, start_of_child.task_id, '{"subWorkflowId": "child"}')
    for task in sorted([await taken(store), await taken(store)], key=lambda task: task.node_id == last):
        await store.run(tasks.complete_task, task.task_id, json.dumps(task.node_id))
    assert (await store.run(reading.get_execution, execution_id)).outputs() == {"sub": json.dumps(last)}


async def test_timer_is_not_early_by_the_rounding_of_the_clock(store: Store, clock: ManualClock) -> None:
    await register_ir(store, "w", "v1", {"wait": {"type": "TIMER", "delay_seconds": 1}})
    started = await store.run(executions.start_execution, "w", "v1", "{}", "")
    clock.advance(1)  # the clock drops fractions of 1 ms, so a little less than a second may have passed
    await store.run(leases.sweep, NO_RETRIES)
    assert await node_status(store, started.execution_id) == {"wait": NodeStatus.WAITING}
    clock.advance(0.001)
    await store.run(leases.sweep, NO_RETRIES)
    assert await node_status(store, started.execution_id) == {"wait": NodeStatus.COMPLETED}


async def test_new_task_with_a_retry_policy_is_due_after_the_clock_was_set_back(
    store: Store, clock: ManualClock, reopen: Reopen
) -> None:
    await register_ir(store, "w", "v1", {"a": {"type": "EFFECT", "retry_policy": {"max_attempts": 2}}})
    await store.run(executions.start_execution, "w", "v1", "{}", "")
    clock.advance(-3600)
    again = await reopen()
    await again.run(leases.restart, GRACE_MS, LEASE_MS)
    assert await take(again) is not None


@pytest.mark.parametrize(
    ("waiting", "ended"),
    [
        ({"type": "TIMER", "delay_seconds": 60}, NodeStatus.COMPLETED),
        ({"type": "EVENT", "event": "paid", "timeout_seconds": 60}, NodeStatus.FAILED),
        ({"type": "HUMAN_APPROVAL", "timeout_seconds": 60}, NodeStatus.FAILED),
    ],
)
async def test_clock_set_back_between_servers_delays_no_wait(
    store: Store, clock: ManualClock, reopen: Reopen, waiting: dict[str, object], ended: NodeStatus
) -> None:
    await register_ir(store, "w", "v1", {"wait": waiting})
    started = await store.run(executions.start_execution, "w", "v1", "{}", "")
    for seconds in (-3600, 30):  # the wait begins again at the first restart, but not at the second one
        clock.advance(seconds)
        store = await reopen()
        await store.run(leases.restart, GRACE_MS, LEASE_MS)
    clock.advance(30)
    await store.run(leases.sweep, NO_RETRIES)
    assert await node_status(store, started.execution_id) == {"wait": NodeStatus.WAITING}  # a wait is never short
    clock.advance(0.001)
    await store.run(leases.sweep, NO_RETRIES)
    assert await node_status(store, started.execution_id) == {"wait": ended}


async def test_clock_set_back_between_servers_delays_no_retry_of_a_policy(
    store: Store, clock: ManualClock, reopen: Reopen
) -> None:
    policy = {"max_attempts": 2, "first_delay_seconds": 600}
    await register_ir(store, "w", "v1", {"a": {"type": "EFFECT", "retry_policy": policy}})
    await store.run(executions.start_execution, "w", "v1", "{}", "")
    task = await take(store)
    assert task is not None
    await store.run(tasks.fail_task, task.task_id, "no answer", False)
    for seconds in (-3600, 300):
        clock.advance(seconds)
        store = await reopen()
        await store.run(leases.restart, GRACE_MS, LEASE_MS)
    clock.advance(299.999)
    assert await take(store) is None
    clock.advance(0.001)
    assert await take(store) is not None


async def test_decision_after_the_time_for_it_is_refused_even_if_no_server_has_ended_the_wait(
    store: Store, clock: ManualClock
) -> None:
    asked = {"nodes": {"boss": {"type": "HUMAN_APPROVAL", "timeout_seconds": 60}}}
    await store.run(executions.register_workflow, "asked", "v1", json.dumps(asked))
    started = await store.run(executions.start_execution, "asked", "v1", "{}", "")
    clock.advance(60_000)
    for decide in (waits.approve, waits.reject):
        with pytest.raises(Conflict, match="can't be decided any more: its time is over"):
            await store.run(decide, started.execution_id, "boss", "Ann", "yes")


async def test_reading_whose_callers_were_cancelled_is_dropped(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store is busy, the callers of one reading are cancelled, and one of the two callers of another."""
    read, go_on = list[str](), threading.Event()

    def dropped(_: Db) -> None:
        read.append("dropped")

    def kept(_: Db) -> None:
        read.append("kept")

    monkeypatch.setattr(base, "SNAPSHOTS", {dropped, kept})

    async def result_of(submitted: Submitted[None]) -> None:
        await submitted

    busy = store.run(lambda _: go_on.wait(10))
    await asyncio.sleep(0.05)
    shared = store.run(kept)
    callers = [asyncio.create_task(result_of(one)) for one in (store.run(dropped), shared, shared)]
    await asyncio.sleep(0)
    callers[0].cancel()
    callers[1].cancel()
    go_on.set()
    await busy
    await callers[2]
    assert read == ["kept"]


async def test_size_that_workers_can_receive_is_known_after_a_restart(store: Store, reopen: Reopen) -> None:
    assert not await store.run(tasks.note_largest_task, "v1", 5000)  # the version is not registered yet
    known = await start(store, key="k")
    found = await store.run(executions.start_execution, "w", "v1", "{}", "k", any_worker_bytes=1)
    assert found.execution_id == known.execution_id  # a known key's execution is found, whatever its size
    for size in (5000, 4000):
        assert await store.run(tasks.note_largest_task, "v1", size)
    store = await reopen()
    fits, too_large = json.dumps("x" * 3000), json.dumps("x" * 6000)
    await store.run(executions.start_execution, "w", "v1", fits, "", any_worker_bytes=1000)
    with pytest.raises(TooLarge, match=r"the input is 6,002 bytes.*more than"):
        await store.run(executions.start_execution, "w", "v1", too_large, "", any_worker_bytes=1000)
