"""Effects that must happen only once, and decisions of people, in the store, on a clock that the tests move."""

from __future__ import annotations

import json

import pytest

from nexum_engine import jsontext
from nexum_engine.approvals import approval_workflow, decision_of
from nexum_engine.clock import ManualClock
from nexum_engine.errors import Conflict, InvalidRequest, NotFound, StaleTask
from nexum_engine.records import Attempt, ExecutionStatus, Node, NodeStatus, Outcome, Task
from nexum_engine.store import Store, executions, leases, reading, retry, tasks, waits
from nexum_engine.store.leases import MAX_LOST_ATTEMPTS
from nexum_engine.workflow import MAX_SECONDS, RetryPolicy, workflow

pytestmark = pytest.mark.both_stores

LEASE_MS = 30_000
GRACE_MS = 1_000
NO_RETRIES = 2**60  # a sweep looks for retries that are due after this time, and finds none


async def start(
    store: Store,
    *,
    reconcile: bool = False,
    retry: RetryPolicy | None = None,
    timeout: float | None = None,
    owner: str = "",
    key: str = "",
) -> str:
    """Start an execution of a workflow whose only node must run once. With `owner`, the owner gets the task."""
    built = workflow("pay").effect("pay", once=True, reconcile=reconcile, retry=retry, timeout_seconds=timeout).build()
    await store.run(executions.register_workflow, "pay", "v1", built.ir_json)
    if owner:
        started = await store.run(tasks.start_owned, "pay", "v1", "{}", key, owner, LEASE_MS)
        assert started.task is not None
        return started.execution_id
    return (await store.run(executions.start_execution, "pay", "v1", "{}", key)).execution_id


async def take(store: Store, worker_id: str = "w1") -> Task | None:
    return (await store.run(tasks.claim, worker_id, ("v1",), 2**40, LEASE_MS, True)).task


async def taken(store: Store, worker_id: str = "w1") -> Task:
    task = await take(store, worker_id)
    assert task is not None, "no task is due"
    return task


async def sweep(store: Store) -> None:
    await store.run(leases.sweep, NO_RETRIES)


async def lose(store: Store, clock: ManualClock, worker_id: str = "w1") -> None:
    """Break a worker's heartbeat stream; the worker does not come back."""
    await store.run(leases.disconnect, worker_id, GRACE_MS)
    clock.advance(GRACE_MS / 1000)
    await sweep(store)


async def node_of(store: Store, execution_id: str) -> Node:
    (node,) = (await store.run(reading.get_execution, execution_id, True)).nodes
    return node


async def attempts(store: Store, execution_id: str) -> list[Attempt]:
    return list((await node_of(store, execution_id)).attempts)


async def status(store: Store, execution_id: str) -> ExecutionStatus:
    return (await store.run(reading.get_execution, execution_id)).status


async def is_unknown(store: Store, execution_id: str) -> bool:
    node = await node_of(store, execution_id)
    listed = [one.execution_id for one in await store.run(waits.unknown_nodes)] == [execution_id]
    assert listed == (node.status is NodeStatus.WAITING and node.attempts[-1].outcome is Outcome.UNKNOWN)
    return listed


async def test_lost_attempt_is_not_repeated_and_waits_for_a_person(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store)
    await taken(store)
    began_ms = clock.now_ms()
    await lose(store, clock)
    assert await is_unknown(store, execution_id)
    assert await take(store, "w2") is None
    (one,) = await store.run(waits.unknown_nodes)
    assert (one.node_id, one.workflow_id, one.input_json) == ("pay", "pay", "{}")
    assert (one.attempt, one.worker_id, one.started_ms, one.since_ms) == (1, "w1", began_ms, clock.now_ms())
    assert one.error == "worker w1 disconnected and did not reconnect"
    clock.advance(MAX_SECONDS)
    await sweep(store)
    assert await is_unknown(store, execution_id)


async def test_silent_worker_and_restart_of_the_server_leave_the_effect_unknown(
    store: Store, clock: ManualClock
) -> None:
    execution_id = await start(store)
    await taken(store)
    clock.advance(LEASE_MS / 1000)
    await sweep(store)
    assert await is_unknown(store, execution_id)
    await store.run(waits.resolve, execution_id, "pay", "Ann", not_done=True)
    await taken(store)
    await store.run(leases.restart, GRACE_MS, 2 * LEASE_MS)
    clock.advance(GRACE_MS / 1000)
    await sweep(store)
    assert await is_unknown(store, execution_id)
    reasons = [one.error for one in await attempts(store, execution_id)]
    assert "sent no heartbeat" in reasons[0]
    assert "the server was restarted" in reasons[2]


async def test_last_heartbeat_of_an_unknown_attempt_is_kept(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store)

    async def last_heartbeat() -> int:
        assert await is_unknown(store, execution_id)
        (one,) = await store.run(waits.unknown_nodes)
        return one.heartbeat_ms

    async def beat(task: Task) -> int:
        clock.advance(1)
        await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS)
        return clock.now_ms()

    first = await taken(store)
    await beat(first)
    beat_ms = await beat(first)
    await lose(store, clock)
    assert await last_heartbeat() == beat_ms
    beat_ms = await beat(first)  # the worker comes back, which resumes the attempt
    assert await status(store, execution_id) is ExecutionStatus.RUNNING
    await store.run(leases.restart, GRACE_MS, 2 * LEASE_MS)
    clock.advance(GRACE_MS / 1000)
    await sweep(store)
    assert await last_heartbeat() == beat_ms
    await store.run(waits.resolve, execution_id, "pay", "Ann", not_done=True)
    await taken(store)
    await lose(store, clock)
    assert await last_heartbeat() == 0, "no heartbeat named the task of the second attempt"


async def test_attempt_that_took_too_long_leaves_the_effect_unknown(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store, timeout=5, retry=RetryPolicy(max_attempts=3))
    task = await taken(store)
    clock.advance(6)
    await sweep(store)
    assert await is_unknown(store, execution_id)
    assert "longer than its time limit of 5 s" in (await attempts(store, execution_id))[0].error
    # The worker still runs the task and names it in its heartbeat. But the attempt has ended: no lease is renewed.
    renewed = await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS)
    assert renewed.lost == (task.task_id,)
    await store.run(tasks.complete_task, task.task_id, '"paid"')
    assert await status(store, execution_id) is ExecutionStatus.COMPLETED


async def test_task_that_never_began_is_handed_out_again(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store)
    task = await taken(store)
    await store.run(tasks.release, task.task_id, "the poll was cancelled")
    task = await taken(store)
    clock.advance(GRACE_MS / 1000)
    unnamed = (await store.run(leases.renew, "w1", (), LEASE_MS)).unnamed
    await store.run(leases.lose, "w1", unnamed)
    task = await taken(store, "w2")
    assert not task.must_reconcile
    outcomes = [one.outcome for one in await attempts(store, execution_id)]
    assert outcomes == [Outcome.INTERRUPTED, Outcome.LOST, Outcome.RUNNING]


async def test_late_report_counts_while_the_effect_is_unknown(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store)
    task = await taken(store)
    await lose(store, clock)
    await store.run(tasks.complete_task, task.task_id, '"paid"')
    assert await status(store, execution_id) is ExecutionStatus.COMPLETED
    await store.run(tasks.complete_task, task.task_id, '"paid"')  # repeated
    (attempt,) = await attempts(store, execution_id)
    assert (attempt.outcome, attempt.error) == (Outcome.COMPLETED, "")
    assert await store.run(waits.unknown_nodes) == []


async def test_late_failure_counts_while_the_effect_is_unknown(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store)
    task = await taken(store)
    await lose(store, clock)
    await store.run(tasks.fail_task, task.task_id, "the card is refused", False)
    assert await status(store, execution_id) is ExecutionStatus.FAILED  # a reported failure is final by default


async def test_worker_that_comes_back_continues_its_attempt(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store)
    task = await taken(store)
    await lose(store, clock)
    renewed = await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS)
    assert (renewed.lost, renewed.resumed) == ((), True)
    node = await node_of(store, execution_id)
    assert (node.status, node.attempts[0].outcome) == (NodeStatus.RUNNING, Outcome.RUNNING)
    assert not await is_unknown(store, execution_id)
    await store.run(tasks.complete_task, task.task_id, '"paid"')


async def test_handler_reports_that_the_effect_is_unknown(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store)
    task = await taken(store)
    for _ in range(2):  # the second report is a repetition
        await store.run(tasks.fail_task, task.task_id, "no answer from the bank", True, True)
    assert await is_unknown(store, execution_id)
    # A heartbeat that was sent before the report doesn't resume the attempt.
    renewed = await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS)
    assert renewed.lost == (task.task_id,)
    assert await is_unknown(store, execution_id)


async def test_effect_of_an_ordinary_node_can_be_reported_as_unknown(store: Store) -> None:
    await store.run(executions.register_workflow, "w", "v1", workflow("w").effect("a").build().ir_json)
    execution_id = (await store.run(executions.start_execution, "w", "v1", "{}", "")).execution_id
    await store.run(tasks.fail_task, (await taken(store)).task_id, "no answer", True, True)
    assert await is_unknown(store, execution_id)


async def test_unknown_report_of_a_compute_node_is_a_final_failure(store: Store) -> None:
    await store.run(executions.register_workflow, "w", "v1", workflow("w").compute("a").build().ir_json)
    execution_id = (await store.run(executions.start_execution, "w", "v1", "{}", "")).execution_id
    await store.run(tasks.fail_task, (await taken(store)).task_id, "no answer", True, True)
    assert await status(store, execution_id) is ExecutionStatus.FAILED
    assert await store.run(waits.unknown_nodes) == []


# ---- Reconciliation --------------------------------------------------------------------------------------------------


async def test_attempt_after_a_lost_one_must_reconcile(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store, reconcile=True, retry=RetryPolicy(max_attempts=3))
    assert not (await taken(store)).must_reconcile
    await lose(store, clock)
    task = await taken(store, "w2")
    assert task.must_reconcile
    # Each later attempt must reconcile until one reports a result, also after an attempt that failed or never began.
    await store.run(tasks.release, task.task_id, "the poll was cancelled")
    task = await taken(store, "w3")
    assert task.must_reconcile
    await store.run(tasks.fail_task, task.task_id, "the bank is closed", False)
    clock.advance(1)
    task = await taken(store, "w4")
    assert task.must_reconcile
    await store.run(tasks.complete_task, task.task_id, '"paid"')
    assert await status(store, execution_id) is ExecutionStatus.COMPLETED


async def test_reconciliation_that_fails_leaves_the_effect_unknown(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store, reconcile=True)
    await taken(store)
    await lose(store, clock)
    task = await taken(store, "w2")
    await store.run(tasks.fail_task, task.task_id, "the bank does not answer", True, True)
    assert await is_unknown(store, execution_id)
    await store.run(waits.resolve, execution_id, "pay", "Ann", not_done=True)
    assert not (await taken(store, "w3")).must_reconcile


async def test_unknown_report_of_a_first_attempt_leads_to_reconciliation(store: Store) -> None:
    execution_id = await start(store, reconcile=True)
    task = await taken(store)
    for _ in range(2):  # the second report is a repetition
        await store.run(tasks.fail_task, task.task_id, "no answer from the bank", True, True)
    assert not await is_unknown(store, execution_id)
    assert (await taken(store, "w2")).must_reconcile


async def test_node_that_loses_every_worker_waits_for_a_person_in_the_end(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store, reconcile=True)
    for _ in range(MAX_LOST_ATTEMPTS - 1):
        await taken(store)
        await lose(store, clock)
    task = await taken(store)
    clock.advance(GRACE_MS / 1000)
    await store.run(leases.lose, "w1", frozenset([task.task_id]))  # never began, but earlier attempts may have
    assert await is_unknown(store, execution_id)


async def test_time_limit_with_reconcile_leads_to_reconciliation(store: Store, clock: ManualClock) -> None:
    await start(store, reconcile=True, timeout=5)
    await taken(store)
    clock.advance(6)
    await sweep(store)
    assert (await taken(store, "w2")).must_reconcile


# ---- A person's decision ---------------------------------------------------------------------------------------------


async def unknown(store: Store, clock: ManualClock) -> str:
    execution_id = await start(store)
    await taken(store)
    await lose(store, clock)
    return execution_id


async def test_person_resolves_with_a_result(store: Store, clock: ManualClock) -> None:
    execution_id = await unknown(store, clock)
    clock.advance(5)
    await store.run(waits.resolve, execution_id, "pay", "Ann", output_json='{"receipt": 7}')
    execution = await store.run(reading.get_execution, execution_id, True)
    assert execution.status is ExecutionStatus.COMPLETED
    assert execution.outputs() == {"pay": '{"receipt": 7}'}
    first, decision = execution.nodes[0].attempts
    assert (first.outcome, first.worker_id) == (Outcome.UNKNOWN, "w1")
    assert (decision.outcome, decision.worker_id) == (Outcome.COMPLETED, "Ann")
    assert (decision.started_ms, decision.ended_ms) == (clock.now_ms(), clock.now_ms())
    assert decision.error == ""


async def test_person_resolves_as_not_done(store: Store, clock: ManualClock) -> None:
    execution_id = await unknown(store, clock)
    changed = await store.run(waits.resolve, execution_id, "pay", "Ann", not_done=True)
    assert [one.version_hash for one in changed.ready] == ["v1"]
    task = await taken(store, "w2")
    assert (task.attempt, task.must_reconcile) == (3, False)
    await store.run(tasks.complete_task, task.task_id, "1")
    assert [(one.outcome, one.worker_id) for one in await attempts(store, execution_id)] == [
        (Outcome.UNKNOWN, "w1"),
        (Outcome.FAILED, "Ann"),
        (Outcome.COMPLETED, "w2"),
    ]


async def test_person_resolves_as_failed_and_it_stays_failed(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store, key="k")
    await taken(store)
    await lose(store, clock)
    await store.run(waits.resolve, execution_id, "pay", "Ann", failed="we pay by cheque")
    execution = await store.run(reading.get_execution, execution_id, True)
    assert (execution.status, execution.error) == (ExecutionStatus.FAILED, "pay: we pay by cheque")
    assert execution.nodes[0].attempts[-1].error == "we pay by cheque"
    # Starting again with the same key doesn't run the effect again.
    again = await store.run(executions.start_execution, "pay", "v1", "{}", "k")
    assert (again.execution_id, again.status, again.existing) == (execution_id, ExecutionStatus.FAILED, True)
    # A person can run the effect again by retrying the execution. The record keeps the decision.
    await store.run(retry.retry_execution, execution_id)
    await store.run(tasks.complete_task, (await taken(store)).task_id, "1")
    outcomes = [(one.outcome, one.worker_id) for one in await attempts(store, execution_id)]
    assert outcomes == [(Outcome.UNKNOWN, "w1"), (Outcome.FAILED, "Ann"), (Outcome.COMPLETED, "w1")]


async def test_late_report_is_refused_after_a_decision(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store)
    task = await taken(store)
    await lose(store, clock)
    await store.run(waits.resolve, execution_id, "pay", "Ann", not_done=True)
    with pytest.raises(StaleTask, match="a person has decided about it"):
        await store.run(tasks.complete_task, task.task_id, "1")
    renewed = await store.run(leases.renew, "w1", (task.task_id,), LEASE_MS)
    assert renewed.lost == (task.task_id,)


async def test_only_an_unknown_effect_can_be_resolved_and_only_once(store: Store, clock: ManualClock) -> None:
    execution_id = await start(store)
    with pytest.raises(Conflict, match="it is READY, and waits for no decision"):
        await store.run(waits.resolve, execution_id, "pay", "Ann", not_done=True)
    await taken(store)
    with pytest.raises(Conflict, match="it is RUNNING"):
        await store.run(waits.resolve, execution_id, "pay", "Ann", output_json="1")
    await lose(store, clock)
    with pytest.raises(NotFound, match="has no node 'other'"):
        await store.run(waits.resolve, execution_id, "other", "Ann", not_done=True)
    with pytest.raises(InvalidRequest, match="output_json"):
        await store.run(waits.resolve, execution_id, "pay", "Ann", output_json="{")
    with pytest.raises(InvalidRequest, match="failed needs a reason"):
        await store.run(waits.resolve, execution_id, "pay", "Ann", failed="")
    await store.run(waits.resolve, execution_id, "pay", "Ann", output_json="1")
    with pytest.raises(Conflict, match="it is COMPLETED"):
        await store.run(waits.resolve, execution_id, "pay", "Bob", not_done=True)
    assert len(await attempts(store, execution_id)) == 2


async def test_decision_counts_only_for_the_attempt_that_the_person_has_looked_at(
    store: Store, clock: ManualClock
) -> None:
    execution_id = await unknown(store, clock)
    with pytest.raises(Conflict, match="attempt 2 is over, and now attempt 1 is in doubt"):
        await store.run(waits.resolve, execution_id, "pay", "Ann", not_done=True, attempt=2)
    await store.run(waits.resolve, execution_id, "pay", "Ann", not_done=True, attempt=1)
    await taken(store)
    await lose(store, clock)  # attempt 2 is Ann's decision, and attempt 3 is in doubt
    # Bob looked before attempt 3 began.
    for named, why in ((1, "attempt 1 is over"), (0, "a person has decided about an earlier attempt")):
        with pytest.raises(Conflict, match=rf"{why}, and now attempt 3 is in doubt.+name it: --attempt 3"):
            await store.run(waits.resolve, execution_id, "pay", "Bob", not_done=True, attempt=named)
    assert await take(store) is None
    await store.run(waits.resolve, execution_id, "pay", "Bob", not_done=True, attempt=3)
    assert (await taken(store)).attempt == 5


# ---- Owned executions ------------------------------------------------------------------------------------------------


async def test_owner_finds_an_unknown_effect_and_gets_the_task_after_the_decision(
    store: Store, clock: ManualClock
) -> None:
    execution_id = await start(store, owner="one", key="k")
    await lose(store, clock, "one")
    assert await is_unknown(store, execution_id)
    (lost,) = await attempts(store, execution_id)
    assert lost.error == "process one ended, or lost its connection"  # an owner is no worker
    found = await store.run(tasks.start_owned, "pay", "v1", "{}", "k", "two", LEASE_MS)
    assert (found.execution_id, found.unknown, found.task) == (execution_id, True, None)
    assert found.status is ExecutionStatus.RUNNING
    with pytest.raises(Conflict, match="waits for a person"):
        await store.run(tasks.start_owned, "pay", "v1", "{}", "k", "two", LEASE_MS, "", "1")
    changed = await store.run(waits.resolve, execution_id, "pay", "Ann", not_done=True)
    assert changed.ready == []
    assert await take(store) is None
    found = await store.run(tasks.start_owned, "pay", "v1", "{}", "k", "two", LEASE_MS)
    assert found.task is not None
    assert not found.unknown
    assert not found.task.must_reconcile


async def test_next_owner_must_reconcile(store: Store, clock: ManualClock) -> None:
    await start(store, owner="one", key="k", reconcile=True)
    await lose(store, clock, "one")
    found = await store.run(tasks.start_owned, "pay", "v1", "{}", "k", "two", LEASE_MS)
    assert found.task is not None
    assert found.task.must_reconcile
    await store.run(tasks.fail_task, found.task.task_id, "no answer", True, True)
    assert await is_unknown(store, found.execution_id)


async def test_owner_that_reports_unknown_waits_for_a_person_at_once(store: Store) -> None:
    """No worker gets an owner's task. So the task isn't handed out again, although the node allows a reconciliation."""
    execution_id = await start(store, owner="one", key="k", reconcile=True)
    found = await store.run(tasks.start_owned, "pay", "v1", "{}", "k", "one", LEASE_MS)
    assert found.task is not None
    await store.run(tasks.fail_task, found.task.task_id, "no answer", True, True)
    assert await is_unknown(store, execution_id)


async def test_failed_and_cancelled_effects_are_not_started_again(store: Store) -> None:
    execution_id = await start(store, owner="one", key="k")
    await store.run(executions.cancel_execution, execution_id, "Ann")
    again = await store.run(tasks.start_owned, "pay", "v1", "{}", "k", "two", LEASE_MS)
    assert (again.execution_id, again.status, again.task) == (execution_id, ExecutionStatus.CANCELLED, None)


# ---- Retries of whole executions -------------------------------------------------------------------------------------


async def two_nodes(store: Store, clock: ManualClock, **fields: object) -> str:
    """Let the node `other` of an execution fail while an attempt at `pay` runs, and retry the execution."""
    once = {"type": "EFFECT", "dependencies": [], "effect": "once", **fields}
    other = {"type": "EFFECT", "dependencies": [], "retry_policy": {"max_attempts": 1}}
    await store.run(executions.register_workflow, "two", "v1", json.dumps({"nodes": {"pay": once, "other": other}}))
    execution_id = (await store.run(executions.start_execution, "two", "v1", "{}", "")).execution_id
    pay, other_task = await taken(store), await taken(store)
    assert (pay.node_id, other_task.node_id) == ("pay", "other")
    await store.run(tasks.fail_task, other_task.task_id, "no", False)
    assert await status(store, execution_id) is ExecutionStatus.FAILED
    await store.run(retry.retry_execution, execution_id)
    return execution_id


async def test_retry_does_not_repeat_an_effect_that_ran_when_the_execution_failed(
    store: Store, clock: ManualClock
) -> None:
    execution_id = await two_nodes(store, clock)
    assert (await taken(store)).node_id == "other"
    assert await take(store) is None
    (one,) = await store.run(waits.unknown_nodes)
    assert (one.execution_id, one.node_id, one.error) == (
        execution_id,
        "pay",
        "the execution ended during the attempt",
    )


async def test_retry_reconciles_an_effect_that_ran_when_the_execution_failed(store: Store, clock: ManualClock) -> None:
    await two_nodes(store, clock, reconcile=True)
    found = [await taken(store), await taken(store)]
    assert {task.node_id: task.must_reconcile for task in found} == {"pay": True, "other": False}


# ---- Definitions -----------------------------------------------------------------------------------------------------


def test_ir_says_once_and_reconcile_and_leaves_the_defaults_out() -> None:
    plain = json.loads(workflow("w").effect("a").build().ir_json)["nodes"]["a"]
    assert plain == {"type": "EFFECT", "dependencies": []}
    once = json.loads(workflow("w").effect("a", once=True, reconcile=True).build().ir_json)["nodes"]["a"]
    assert once == {"type": "EFFECT", "dependencies": [], "effect": "once", "reconcile": True}
    with pytest.raises(InvalidRequest, match="reconcile without once"):
        workflow("w").effect("a", reconcile=True)


async def test_unknown_kind_of_effect_is_refused(store: Store) -> None:
    ir = json.dumps({"nodes": {"a": {"type": "EFFECT", "dependencies": [], "effect": "twice"}}})
    with pytest.raises(InvalidRequest, match="effect"):
        await store.run(executions.register_workflow, "w", "v1", ir)


# ---- Approvals -------------------------------------------------------------------------------------------------------


async def ask(store: Store, timeout_seconds: float | None = None) -> str:
    built = workflow("ask").human_approval("boss", timeout_seconds=timeout_seconds).build()
    await store.run(executions.register_workflow, "ask", "v1", built.ir_json)
    return (await store.run(executions.start_execution, "ask", "v1", '{"cents": 5}', "")).execution_id


async def test_approval_that_nobody_decides_fails_in_time_and_has_no_decision(store: Store, clock: ManualClock) -> None:
    execution_id = await ask(store, 60)
    clock.advance(60)
    await sweep(store)
    assert await status(store, execution_id) is ExecutionStatus.RUNNING  # the time is over only after 60 s
    clock.advance(0.001)
    await sweep(store)
    execution = await store.run(reading.get_execution, execution_id, True)
    assert (execution.status, execution.error) == (ExecutionStatus.FAILED, "boss: not decided within 60 s")
    assert execution.nodes[0].attempts == ()
    with pytest.raises(Conflict, match="can't be decided any more"):
        await store.run(waits.approve, execution_id, "boss", "Ann", "")
    await store.run(retry.retry_execution, execution_id)  # which starts the approval's time limit again
    clock.advance(60)
    await sweep(store)
    await store.run(waits.approve, execution_id, "boss", "Ann", "")
    assert await status(store, execution_id) is ExecutionStatus.COMPLETED


async def test_answer_of_a_person_is_stored_with_the_approval(store: Store) -> None:
    execution_id = await ask(store)
    (pending,) = await store.run(waits.pending_approvals)
    assert pending.input_json == '{"cents": 5}'
    with pytest.raises(InvalidRequest, match="answer_json"):
        await store.run(waits.approve, execution_id, "boss", "Ann", "fine", "{")
    deepest = "[" * 201 + "]" * 201
    assert jsontext.parse(deepest, "it")
    with pytest.raises(InvalidRequest, match="the decision with its answer"):  # nobody could read the decision
        await store.run(waits.approve, execution_id, "boss", "Ann", "fine", deepest)
    await store.run(waits.approve, execution_id, "boss", "Ann", "fine", '{"cents": 4}')
    output = json.loads((await store.run(reading.get_execution, execution_id)).outputs()["boss"])
    assert (output["approver"], output["comment"], output["answer"]) == ("Ann", "fine", {"cents": 4})


async def test_every_decision_stays_on_record(store: Store, clock: ManualClock) -> None:
    execution_id = await ask(store)
    asked_ms = clock.now_ms()
    clock.advance(1)
    await store.run(waits.reject, execution_id, "boss", "Bob", "too much")
    rejected_ms = clock.now_ms()
    clock.advance(1)
    await store.run(retry.retry_execution, execution_id)
    again_ms = clock.now_ms()
    assert [one.since_ms for one in await store.run(waits.pending_approvals)] == [again_ms]
    clock.advance(1)
    await store.run(waits.approve, execution_id, "boss", "Ann", "fine")
    assert await attempts(store, execution_id) == [
        Attempt(1, "Bob", asked_ms, rejected_ms, Outcome.FAILED, "too much"),
        Attempt(2, "Ann", again_ms, clock.now_ms(), Outcome.COMPLETED, ""),
    ]


async def test_refusal_names_the_rejection_or_that_nobody_decided(store: Store, clock: ManualClock) -> None:
    built = approval_workflow(timeout=60)
    await store.run(executions.register_workflow, "ask", "v1", built.ir_json)
    execution_id = (await store.run(executions.start_execution, "ask", "v1", "{}", "")).execution_id

    async def refusal() -> str:
        return decision_of(await store.run(reading.get_execution, execution_id, True)).refusal

    for by, reason, said in (
        ("", "", "this call was not approved"),
        ("", "too much", "this call was not approved: too much"),
        ("Bob", "", "Bob rejected this call"),
        ("Bob", "rejected: too much", "Bob rejected this call: rejected: too much"),
    ):
        clock.advance(1)
        await store.run(waits.reject, execution_id, "approval", by, reason)
        assert await refusal() == said
        await store.run(retry.retry_execution, execution_id)
    clock.advance(61)
    await sweep(store)
    assert await refusal() == "this call was not approved: not decided within 60 s"


async def test_long_inputs_are_left_out_of_the_lists(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "MAX_SHOWN_INPUT", 100)
    monkeypatch.setattr(waits, "MAX_SHOWN_INPUTS", 150)
    await ask(store)
    for size in (200, 90, 90, 20):
        await store.run(executions.start_execution, "ask", "v1", json.dumps("x" * size), "")
    shown = [len(one.input_json) for one in await store.run(waits.pending_approvals)]
    assert shown == [12, 0, 92, 0, 22]
