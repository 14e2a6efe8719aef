"""Each node type of Nexum, over the wire: timers, approvals, routers, maps, subworkflows, events, and policies."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness import nexum_server
from nexum_wire import DEADLINE, UNLIMITED, complete, connected, poll, record, refused, start, status
from server_thread import ServerThread, server_thread

from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

Code = grpc.StatusCode
Nodes = dict[str, dict[str, Any]]


@pytest.fixture
def server(tmp_path: Path, database_url: str) -> Iterator[ServerThread]:
    with server_thread(tmp_path, database_url=database_url) as running:
        yield running


@pytest.fixture
def stub(server: ServerThread) -> Iterator[NexumServiceStub]:
    with connected(server.address) as connection:
        yield connection


def node(kind: str, *dependencies: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "dependencies": list(dependencies), **fields}


def routes(*targets: str) -> list[dict[str, str]]:
    return [{"condition": f"$.to == {target!r}", "target": target} for target in targets]


def register(stub: NexumServiceStub, nodes: Nodes, *, workflow_id: str = "w", version: str = "v1") -> None:
    ir_json = json.dumps({"nodes": nodes})
    request = pb.WorkflowIR(workflow_id=workflow_id, version_hash=version, ir_json=ir_json)
    assert stub.RegisterWorkflow(request, timeout=DEADLINE).ok


def began(stub: NexumServiceStub, nodes: Nodes, input_json: str = "{}") -> str:
    register(stub, nodes)
    return start(stub, input_json)


def ended(stub: NexumServiceStub, execution_id: str) -> pb.GetExecutionResponse:
    request = pb.GetExecutionRequest(execution_id=execution_id, wait_ms=20_000)
    answer = stub.GetExecution(request, timeout=DEADLINE)
    assert answer.status != "RUNNING"
    return answer


def statuses(stub: NexumServiceStub, execution_id: str) -> dict[str, str]:
    return {one.node_id: one.status for one in record(stub, execution_id).nodes}


def run_task(stub: NexumServiceStub, node_id: str, output: object, *, version: str = "v1") -> pb.PollResponse:
    task = poll(stub, version=version, wait_ms=5000)
    assert (task.has_task, task.node_id) == (True, node_id)
    complete(stub, task, json.dumps(output))
    return task


def approve(stub: NexumServiceStub, execution_id: str, node_id: str = "boss") -> pb.AckResponse:
    request = pb.ApproveRequest(execution_id=execution_id, node_id=node_id, approver="Ann", comment="fine")
    return stub.ApproveTask(request, timeout=DEADLINE)


def reject(stub: NexumServiceStub, execution_id: str, node_id: str = "boss") -> pb.AckResponse:
    request = pb.RejectRequest(execution_id=execution_id, node_id=node_id, approver="Bob", reason="too much")
    return stub.RejectTask(request, timeout=DEADLINE)


def pending(stub: NexumServiceStub) -> list[tuple[str, str, str]]:
    items = stub.GetPendingApprovals(pb.EmptyRequest(), timeout=DEADLINE).items
    return [(one.execution_id, one.node_id, one.workflow_id) for one in items]


def send(stub: NexumServiceStub, execution_id: str, name: str, payload: object, key: str = "") -> pb.AckResponse:
    request = pb.SendEventRequest(
        execution_id=execution_id, name=name, payload_json=json.dumps(payload), idempotency_key=key
    )
    return stub.SendEvent(request, timeout=DEADLINE)


def children(stub: NexumServiceStub, execution_id: str) -> list[pb.ExecutionSummary]:
    """Return the executions that the execution's nodes started, the oldest first."""
    request = pb.ListRequest(parent_execution_id=execution_id, limit=1000)
    return list(reversed(stub.ListExecutions(request, timeout=DEADLINE).executions))


# ---- TIMER -----------------------------------------------------------------------------------------------------------


@pytest.mark.both_stores
def test_timer_completes_without_a_poll_and_not_early(stub: NexumServiceStub) -> None:
    begun = time.time()
    execution_id = began(stub, {"wait": node("TIMER", delay_seconds=0.25), "after": node("EFFECT", "wait")})
    assert statuses(stub, execution_id) == {"wait": "WAITING", "after": "PENDING"}
    assert not poll(stub).has_task
    task = poll(stub, wait_ms=5000)
    assert time.time() - begun >= 0.25
    output = json.loads(task.input_json)["deps"]["wait"]
    assert output["delay_seconds"] == 0.25
    assert datetime.fromisoformat(output["waited_until"]).timestamp() - begun >= 0.25
    complete(stub, task)
    assert status(stub, execution_id)[0] == "COMPLETED"


def test_timers_of_zero_end_an_execution_at_its_start(stub: NexumServiceStub) -> None:
    nodes = {"a": node("TIMER", delay_seconds=0), "b": node("TIMER", "a"), "c": node("TIMER", "b", delay_seconds=0.0)}
    register(stub, nodes)
    request = pb.StartRequest(workflow_id="w", version_hash="v1", wait_ms=5000)
    answer = stub.StartExecution(request, timeout=DEADLINE)
    assert (answer.status, answer.ended.status) == ("COMPLETED", "COMPLETED")
    assert set(statuses(stub, answer.execution_id).values()) == {"COMPLETED"}


def test_thousand_timers_of_one_execution_end_together(stub: NexumServiceStub) -> None:
    # An earlier version of the server needed a minute for these timers, and answered no other call during that minute.
    begun = time.time()
    execution_id = began(stub, {f"wait-{number:03}": node("TIMER", delay_seconds=0.5) for number in range(1000)})
    answer = ended(stub, execution_id)
    assert answer.status == "COMPLETED"
    for one in answer.nodes:
        waited_until = datetime.fromisoformat(json.loads(one.output_json)["waited_until"])
        assert waited_until.timestamp() >= begun + 0.499  # recorded times have whole milliseconds


def test_many_executions_with_timers_all_end(stub: NexumServiceStub) -> None:
    register(stub, {name: node("TIMER", delay_seconds=0.5) for name in "abcd"})
    begun = {}
    for _ in range(250):
        before = time.time()
        begun[start(stub)] = before
    for execution_id, before in begun.items():
        answer = ended(stub, execution_id)
        assert answer.status == "COMPLETED"
        assert answer.ended_ms >= before * 1000 + 499


def test_timer_is_kept_over_a_kill_of_the_server(tmp_path: Path) -> None:
    begun = time.time()
    with nexum_server(tmp_path) as first, connected(first.address) as before:
        execution_id = began(before, {"wait": node("TIMER", delay_seconds=0.2)})
        first.process.kill()
    with nexum_server(tmp_path) as second, connected(second.address) as after:
        answer = ended(after, execution_id)
        assert answer.status == "COMPLETED"
        assert answer.ended_ms >= (begun + 0.2) * 1000
        assert json.loads(answer.nodes[0].output_json)["delay_seconds"] == 0.2


def test_cancelled_timer_does_not_complete(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"wait": node("TIMER", delay_seconds=0.5)})
    stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=DEADLINE)
    later = start(stub)
    assert ended(stub, later).status == "COMPLETED"  # the cancelled timer began earlier, so its time is over, too
    assert status(stub, execution_id) == ("CANCELLED", {})
    assert statuses(stub, execution_id) == {"wait": "CANCELLED"}


# ---- HUMAN_APPROVAL --------------------------------------------------------------------------------------------------


def test_approval_is_listed_at_once_and_never_handed_out(stub: NexumServiceStub) -> None:
    nodes = {"a": node("EFFECT"), "boss": node("HUMAN_APPROVAL", "a"), "pay": node("EFFECT", "boss")}
    execution_id = began(stub, nodes)
    assert pending(stub) == []
    code, words = refused(lambda: approve(stub, execution_id))
    assert (code, "can't be decided yet" in words) == (Code.FAILED_PRECONDITION, True)
    run_task(stub, "a", 1)
    assert pending(stub) == [(execution_id, "boss", "w")]
    assert not poll(stub).has_task
    assert approve(stub, execution_id).ok
    assert pending(stub) == []
    task = run_task(stub, "pay", "paid")
    decision = json.loads(task.input_json)["deps"]["boss"]
    assert decision.pop("decided_ms") > 0
    assert decision == {"approved": True, "approver": "Ann", "comment": "fine"}
    assert status(stub, execution_id)[0] == "COMPLETED"
    code, words = refused(lambda: reject(stub, execution_id))
    assert (code, "it is COMPLETED" in words) == (Code.FAILED_PRECONDITION, True)


def test_rejection_fails_the_execution_with_its_reason(stub: NexumServiceStub) -> None:
    nodes = {"boss": node("HUMAN_APPROVAL"), "other": node("EFFECT"), "pay": node("EFFECT", "boss")}
    execution_id = began(stub, nodes)
    assert reject(stub, execution_id).ok
    answer = record(stub, execution_id)
    assert (answer.status, answer.error) == ("FAILED", "boss: rejected by Bob: too much")
    assert statuses(stub, execution_id) == {"boss": "FAILED", "other": "CANCELLED", "pay": "CANCELLED"}
    assert not poll(stub).has_task
    code, _ = refused(lambda: approve(stub, execution_id))
    assert code is Code.FAILED_PRECONDITION


@pytest.mark.both_stores
def test_one_of_many_decisions_counts(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"boss": node("HUMAN_APPROVAL")})

    def decide(number: int) -> Code | None:
        try:
            (approve if number % 2 else reject)(stub, execution_id)
        except grpc.RpcError as error:
            return error.code()
        return None

    with ThreadPoolExecutor(8) as many:
        outcomes = list(many.map(decide, range(16)))
    assert outcomes.count(None) == 1
    assert outcomes.count(Code.FAILED_PRECONDITION) == 15
    by_reject = outcomes.index(None) % 2 == 0
    assert status(stub, execution_id)[0] == ("FAILED" if by_reject else "COMPLETED")


def test_decision_about_something_else_is_refused(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"a": node("EFFECT"), "boss": node("HUMAN_APPROVAL")})
    assert refused(lambda: approve(stub, execution_id, "a"))[0] is Code.NOT_FOUND
    assert refused(lambda: approve(stub, execution_id, "nowhere"))[0] is Code.NOT_FOUND
    assert refused(lambda: approve(stub, "exec-unknown"))[0] is Code.NOT_FOUND
    stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=DEADLINE)
    assert refused(lambda: approve(stub, execution_id))[0] is Code.FAILED_PRECONDITION
    assert pending(stub) == []


# ---- ROUTER ----------------------------------------------------------------------------------------------------------


@pytest.mark.both_stores
def test_router_runs_the_chosen_target_and_skips_the_others(stub: NexumServiceStub) -> None:
    nodes = {
        "decide": node("ROUTER", routes=routes("left", "right")),
        "left": node("EFFECT", "decide"),
        "right": node("EFFECT", "decide"),
        "after_right": node("EFFECT", "right"),
        "far": node("COMPUTE", "after_right"),
        "join": node("EFFECT", "left", "far"),
    }
    execution_id = began(stub, nodes)
    assert run_task(stub, "decide", {"routed_to": "left"}).node_type == "ROUTER"
    run_task(stub, "left", "went left")
    task = run_task(stub, "join", "joined")
    assert json.loads(task.input_json)["deps"] == {"left": "went left"}
    assert statuses(stub, execution_id) == {
        "decide": "COMPLETED",
        "left": "COMPLETED",
        "right": "SKIPPED",
        "after_right": "SKIPPED",
        "far": "SKIPPED",
        "join": "COMPLETED",
    }
    outputs = {"decide": {"routed_to": "left"}, "left": "went left", "join": "joined"}
    assert status(stub, execution_id) == ("COMPLETED", outputs)


def test_choice_that_ends_the_execution(stub: NexumServiceStub) -> None:
    nodes = {
        "decide": node("ROUTER", routes=routes("a", "stop")),
        "stop": node("TIMER", delay_seconds=0),
        "a": node("EFFECT", "decide"),
        "b": node("EFFECT", "a"),
    }
    execution_id = began(stub, nodes)
    run_task(stub, "decide", {"routed_to": "stop"})
    assert status(stub, execution_id)[0] == "COMPLETED"
    assert statuses(stub, execution_id) == {"decide": "COMPLETED", "stop": "COMPLETED", "a": "SKIPPED", "b": "SKIPPED"}


@pytest.mark.parametrize(
    "output", [{"routed_to": "x"}, {"routed_to": "decide"}, {}, "left", None, {"routed_to": ["left"]}]
)
def test_choice_outside_the_routes_is_refused_and_the_task_stays(stub: NexumServiceStub, output: object) -> None:
    nodes = {
        "decide": node("ROUTER", routes=routes("left", "right")),
        "left": node("EFFECT", "decide"),
        "right": node("EFFECT", "decide"),
    }
    execution_id = began(stub, nodes)
    task = poll(stub)
    code, words = refused(lambda: complete(stub, task, json.dumps(output)))
    assert (code, "'left', 'right'" in words) == (Code.INVALID_ARGUMENT, True)
    assert statuses(stub, execution_id)["decide"] == "RUNNING"
    complete(stub, task, '{"routed_to": "right"}')
    run_task(stub, "right", 1)
    assert status(stub, execution_id)[0] == "COMPLETED"


def test_target_without_a_dependency_waits_for_its_router_and_runs_once(stub: NexumServiceStub) -> None:
    nodes = {
        "slow": node("EFFECT"),
        "decide": node("ROUTER", "slow", routes=routes("left", "right")),
        "left": node("EFFECT"),
        "right": node("EFFECT"),
    }
    execution_id = began(stub, nodes)
    task = poll(stub)
    assert (task.node_id, poll(stub).has_task) == ("slow", False)
    complete(stub, task)
    run_task(stub, "decide", {"routed_to": "left"})
    run_task(stub, "left", 1)
    assert not poll(stub).has_task
    assert statuses(stub, execution_id)["right"] == "SKIPPED"
    assert status(stub, execution_id)[0] == "COMPLETED"


def test_target_of_two_routers_runs_if_one_chooses_it(stub: NexumServiceStub) -> None:
    nodes = {
        "one": node("ROUTER", routes=routes("a", "b")),
        "two": node("ROUTER", "one", routes=routes("a", "c")),
        "a": node("EFFECT"),
        "b": node("EFFECT"),
        "c": node("EFFECT"),
    }
    execution_id = began(stub, nodes)
    run_task(stub, "one", {"routed_to": "b"})
    task = poll(stub)
    other = poll(stub)
    assert {task.node_id, other.node_id} == {"b", "two"}
    complete(stub, task if task.node_id == "two" else other, '{"routed_to": "a"}')
    complete(stub, other if task.node_id == "two" else task)
    run_task(stub, "a", 1)
    assert statuses(stub, execution_id)["c"] == "SKIPPED"
    assert status(stub, execution_id)[0] == "COMPLETED"


def test_skipped_router_chooses_nothing(stub: NexumServiceStub) -> None:
    nodes = {
        "first": node("ROUTER", routes=routes("second", "other")),
        "second": node("ROUTER", "first", routes=routes("a", "b")),
        "a": node("EFFECT", "second"),
        "b": node("EFFECT"),
        "other": node("EFFECT", "first"),
    }
    execution_id = began(stub, nodes)
    run_task(stub, "first", {"routed_to": "other"})
    run_task(stub, "other", 1)
    assert status(stub, execution_id)[0] == "COMPLETED"
    found = statuses(stub, execution_id)
    assert {name for name, one in found.items() if one == "SKIPPED"} == {"second", "a", "b"}


# ---- MAP and REDUCE --------------------------------------------------------------------------------------------------


@pytest.mark.both_stores
def test_map_runs_a_task_for_each_item_and_keeps_their_order(stub: NexumServiceStub) -> None:
    nodes = {
        "list": node("EFFECT"),
        "each": node("MAP", "list"),
        "sum": node("REDUCE", "each", mapNodeId="each"),
    }
    execution_id = began(stub, nodes, '{"q": 1}')
    run_task(stub, "list", "listed")
    items = ["a", {"b": 1.5}, None, 4]
    task = run_task(stub, "each", items)
    assert (task.node_type, task.is_map_subtask, json.loads(task.input_json)["deps"]) == (
        "MAP",
        False,
        {"list": "listed"},
    )
    assert statuses(stub, execution_id)["each"] == "WAITING"
    tasks = [poll(stub) for _ in items]
    assert not poll(stub).has_task
    for index, one in enumerate(tasks):
        assert (one.node_id, one.node_type, one.execution_id) == ("each", "MAP_SUBTASK", execution_id)
        assert (one.is_map_subtask, one.map_index, one.map_total) == (True, index, 4)
        assert json.loads(one.map_item_json) == items[index]
        assert json.loads(one.input_json) == {"input": {"q": 1}, "deps": {"list": "listed"}}
    assert len({one.idempotency_key for one in (task, *tasks)}) == 5
    for one in reversed(tasks):
        complete(stub, one, json.dumps({"of": one.map_index}))
    results = [{"of": index} for index in range(4)]
    last = run_task(stub, "sum", 10)
    assert json.loads(last.input_json)["deps"] == {"each": results}
    state, outputs = status(stub, execution_id)
    assert (state, outputs) == ("COMPLETED", {"list": "listed", "each": results, "sum": 10})


def test_empty_map_completes_at_once(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"each": node("MAP"), "sum": node("REDUCE", "each", mapNodeId="each")})
    task = run_task(stub, "each", [])
    complete(stub, task, "[]")  # a second report changes nothing
    run_task(stub, "sum", 0)
    assert status(stub, execution_id) == ("COMPLETED", {"each": [], "sum": 0})


@pytest.mark.parametrize("output", [{"a": 1}, "text", None, 3])
def test_map_output_that_is_no_list_is_refused_and_the_task_stays(stub: NexumServiceStub, output: object) -> None:
    execution_id = began(stub, {"each": node("MAP")})
    task = poll(stub)
    code, words = refused(lambda: complete(stub, task, json.dumps(output)))
    assert (code, "must be a list" in words) == (Code.INVALID_ARGUMENT, True)
    assert statuses(stub, execution_id) == {"each": "RUNNING"}
    complete(stub, task, "[]")
    assert status(stub, execution_id) == ("COMPLETED", {"each": []})


def test_repeated_report_of_a_map_starts_nothing_twice(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"each": node("MAP")})
    task = run_task(stub, "each", [1, 2])
    complete(stub, task, "[1,2]")
    assert refused(lambda: complete(stub, task, "[1,3]"))[0] is Code.FAILED_PRECONDITION
    assert len(children(stub, execution_id)) == 2
    for one in (poll(stub), poll(stub)):
        complete(stub, one, str(one.map_index))
        complete(stub, one, str(one.map_index))
    assert not poll(stub).has_task
    complete(stub, task, "[1, 2]")
    assert status(stub, execution_id) == ("COMPLETED", {"each": [0, 1]})


def test_item_is_retried_alone_and_its_last_failure_fails_the_execution(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"each": node("MAP"), "after": node("EFFECT", "each")})
    run_task(stub, "each", ["good", "bad", "slow"])
    good, bad, slow = poll(stub), poll(stub), poll(stub)
    complete(stub, good)
    stub.FailTask(pb.FailRequest(task_id=bad.task_id, error_message="oh"), timeout=DEADLINE)
    again = poll(stub, wait_ms=5000)
    assert (again.map_index, again.attempt, again.idempotency_key) == (1, 2, bad.idempotency_key)
    stub.FailTask(pb.FailRequest(task_id=again.task_id, error_message="no", final=True), timeout=DEADLINE)
    answer = record(stub, execution_id)
    assert (answer.status, answer.error) == ("FAILED", "each: each__1: no")
    assert statuses(stub, execution_id) == {"each": "FAILED", "after": "CANCELLED"}
    assert [one.status for one in children(stub, execution_id)] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert refused(lambda: complete(stub, slow))[0] is Code.FAILED_PRECONDITION


@pytest.mark.both_stores
def test_waiting_caller_is_told_of_the_end_of_an_item(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"each": node("MAP")})
    run_task(stub, "each", ["a", "b"])
    items = [one.execution_id for one in children(stub, execution_id)]
    waiting = [
        stub.GetExecution.future(pb.GetExecutionRequest(execution_id=item, wait_ms=30_000), timeout=DEADLINE)
        for item in items
    ]
    complete(stub, poll(stub))
    assert waiting[0].result().status == "COMPLETED"
    assert not waiting[1].done()
    stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=DEADLINE)
    assert waiting[1].result().status == "CANCELLED"


def test_map_of_300_items_over_300_kb_reported_twelve_at_once(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"each": node("MAP"), "sum": node("REDUCE", "each")}, json.dumps("x" * 300_000))
    items = [f"{index}:{'y' * 1000}" for index in range(300)]
    run_task(stub, "each", items)

    def work(_: int) -> int:
        done = 0
        while (task := poll(stub)).has_task and task.is_map_subtask:
            complete(stub, task, json.dumps(json.loads(task.map_item_json).partition(":")[0]))
            done += 1
        if task.has_task:
            assert task.node_id == "sum"
            complete(stub, task, str(len(json.loads(task.input_json)["deps"]["each"])))
        return done

    with ThreadPoolExecutor(12) as many:
        assert sum(many.map(work, range(12))) == 300
    if (task := poll(stub)).has_task:  # the task `sum` may become ready after all threads have stopped
        complete(stub, task, "300")
    state, outputs = status(stub, execution_id)
    assert (state, outputs["each"], outputs["sum"]) == ("COMPLETED", [str(n) for n in range(300)], 300)


def test_map_of_10000_items_begins_and_is_cancelled(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"each": node("MAP")})
    task = poll(stub)
    code, words = refused(lambda: complete(stub, task, json.dumps([0] * 10_001)))
    assert (code, "10,000" in words) == (Code.INVALID_ARGUMENT, True)
    complete(stub, task, json.dumps([0] * 10_000))
    assert poll(stub).map_total == 10_000
    stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=DEADLINE)
    assert not poll(stub).has_task
    assert status(stub, execution_id) == ("CANCELLED", {})


def test_items_are_in_no_list_of_executions_but_their_parents(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"each": node("MAP")})
    run_task(stub, "each", ["a", "b"])
    listed = stub.ListExecutions(pb.ListRequest(), timeout=DEADLINE).executions
    assert [one.execution_id for one in listed] == [execution_id]
    items = children(stub, execution_id)
    assert [(one.parent_execution_id, one.parent_node_id, one.child_index) for one in items] == [
        (execution_id, "each", 0),
        (execution_id, "each", 1),
    ]
    versions = stub.ListWorkflowVersions(pb.ListVersionsRequest(workflow_id="w"), timeout=DEADLINE).versions
    assert [one.active_executions for one in versions] == [1]


def test_router_leads_to_a_map(stub: NexumServiceStub) -> None:
    nodes = {
        "decide": node("ROUTER", routes=routes("each", "one")),
        "each": node("MAP", "decide"),
        "one": node("EFFECT", "decide"),
        "end": node("EFFECT", "each", "one"),
    }
    execution_id = began(stub, nodes)
    run_task(stub, "decide", {"routed_to": "each"})
    run_task(stub, "each", [1])
    run_task(stub, "each", "done")
    run_task(stub, "end", "end")
    assert status(stub, execution_id)[1] == {"decide": {"routed_to": "each"}, "each": ["done"], "end": "end"}


# ---- SUBWORKFLOW -----------------------------------------------------------------------------------------------------


PARENT: Nodes = {"sub": node("SUBWORKFLOW", subWorkflowId="child"), "after": node("EFFECT", "sub")}
CHILD: Nodes = {"a": node("EFFECT"), "b": node("COMPUTE", "a")}


def child_start(workflow_id: str = "child", child_input: object = None) -> dict[str, object]:
    return {"subWorkflowId": workflow_id, "childInput": child_input}


def test_subworkflow_completes_with_the_output_of_the_last_node(stub: NexumServiceStub) -> None:
    register(stub, {"old": node("EFFECT")}, workflow_id="child", version="c0")
    register(stub, CHILD, workflow_id="child", version="c1")
    execution_id = began(stub, PARENT)
    task = run_task(stub, "sub", child_start(child_input={"n": 1}))
    complete(stub, task, json.dumps(child_start(child_input={"n": 1})))  # a second report starts nothing
    (child,) = children(stub, execution_id)
    assert (child.workflow_id, child.version_hash, child.parent_node_id) == ("child", "c1", "sub")
    assert not child.HasField("child_index")
    first = run_task(stub, "a", "first", version="c1")
    assert json.loads(first.input_json)["input"] == {"n": 1}
    assert first.execution_id == child.execution_id
    assert status(stub, execution_id)[0] == "RUNNING"
    run_task(stub, "b", {"receipt": 7}, version="c1")
    after = run_task(stub, "after", "sent")
    assert json.loads(after.input_json)["deps"] == {"sub": {"receipt": 7}}
    assert status(stub, execution_id) == ("COMPLETED", {"sub": {"receipt": 7}, "after": "sent"})
    complete(stub, task, json.dumps(child_start(child_input={"n": 1})))
    assert len(children(stub, execution_id)) == 1


@pytest.mark.parametrize("report", ['{"subWorkflowId": "child"}', '{"subWorkflowId":"child","childInput":null,"x":1}'])
def test_repeated_start_of_a_child_is_acknowledged_in_any_spelling(stub: NexumServiceStub, report: str) -> None:
    register(stub, CHILD, workflow_id="child", version="c1")
    execution_id = began(stub, PARENT)
    task = poll(stub)
    complete(stub, task, report)
    complete(stub, task, report)
    assert len(children(stub, execution_id)) == 1
    other = json.dumps(child_start(child_input=1))
    assert refused(lambda: complete(stub, task, other))[0] is Code.FAILED_PRECONDITION


def test_failed_child_fails_its_parent(stub: NexumServiceStub) -> None:
    register(stub, CHILD, workflow_id="child", version="c1")
    execution_id = began(stub, PARENT)
    run_task(stub, "sub", child_start())
    task = poll(stub, version="c1")
    stub.FailTask(pb.FailRequest(task_id=task.task_id, error_message="broke", final=True), timeout=DEADLINE)
    answer = record(stub, execution_id)
    assert answer.status == "FAILED"
    assert answer.error == f"sub: execution {task.execution_id} failed: a: broke"


@pytest.mark.both_stores
def test_cancelled_parent_cancels_its_child_and_the_childs_child(stub: NexumServiceStub) -> None:
    register(stub, {"sub": node("SUBWORKFLOW"), "x": node("EFFECT")}, workflow_id="middle", version="m1")
    register(stub, CHILD, workflow_id="child", version="c1")
    execution_id = began(stub, PARENT)
    run_task(stub, "sub", child_start("middle"))
    tasks = [poll(stub, version="m1"), poll(stub, version="m1")]
    complete(stub, next(one for one in tasks if one.node_id == "sub"), json.dumps(child_start()))
    (middle,) = children(stub, execution_id)
    (inner,) = children(stub, middle.execution_id)
    held = poll(stub, version="c1")
    stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=DEADLINE)
    for one in (execution_id, middle.execution_id, inner.execution_id):
        assert status(stub, one)[0] == "CANCELLED"
    assert refused(lambda: complete(stub, held))[0] is Code.FAILED_PRECONDITION


def test_cancelled_child_fails_its_parent(stub: NexumServiceStub) -> None:
    register(stub, CHILD, workflow_id="child", version="c1")
    execution_id = began(stub, PARENT)
    run_task(stub, "sub", child_start())
    (child,) = children(stub, execution_id)
    stub.CancelExecution(pb.CancelRequest(execution_id=child.execution_id), timeout=DEADLINE)
    assert record(stub, execution_id).error == f"sub: execution {child.execution_id} was cancelled"


@pytest.mark.both_stores
def test_child_in_a_child_completes_both(stub: NexumServiceStub) -> None:
    register(stub, {"sub": node("SUBWORKFLOW")}, workflow_id="middle", version="m1")
    register(stub, {"wait": node("TIMER", delay_seconds=0)}, workflow_id="child", version="c1")
    execution_id = began(stub, PARENT)
    run_task(stub, "sub", child_start("middle"))
    run_task(stub, "sub", child_start(), version="m1")  # this starts the innermost execution, which ends at once
    after = run_task(stub, "after", 1)
    assert json.loads(after.input_json)["deps"]["sub"]["delay_seconds"] == 0
    assert status(stub, execution_id)[0] == "COMPLETED"


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (child_start("nowhere"), Code.NOT_FOUND),
        ({"childInput": 1}, Code.INVALID_ARGUMENT),
        ({"subWorkflowId": ""}, Code.INVALID_ARGUMENT),
        ({"subWorkflowId": 5}, Code.INVALID_ARGUMENT),
        ([], Code.INVALID_ARGUMENT),
    ],
)
def test_bad_start_of_a_child_is_refused_and_the_task_stays(
    stub: NexumServiceStub, output: object, code: grpc.StatusCode
) -> None:
    register(stub, CHILD, workflow_id="child", version="c1")
    execution_id = began(stub, PARENT)
    task = poll(stub)
    assert refused(lambda: complete(stub, task, json.dumps(output)))[0] is code
    assert statuses(stub, execution_id)["sub"] == "RUNNING"
    assert children(stub, execution_id) == []
    complete(stub, task, json.dumps(child_start()))
    assert len(children(stub, execution_id)) == 1


def test_endless_nesting_is_refused(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"sub": node("SUBWORKFLOW")})
    for _ in range(99):
        run_task(stub, "sub", child_start("w"))
    task = poll(stub)
    code, words = refused(lambda: complete(stub, task, json.dumps(child_start("w"))))
    assert (code, "nested 100 deep" in words) == (Code.INVALID_ARGUMENT, True)
    stub.FailTask(pb.FailRequest(task_id=task.task_id, error_message="too deep", final=True), timeout=DEADLINE)
    assert status(stub, execution_id)[0] == "FAILED"


# ---- EVENT -----------------------------------------------------------------------------------------------------------


def test_event_completes_the_node_that_waits_for_it(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"paid": node("EVENT", event="payment"), "ship": node("EFFECT", "paid")})
    assert statuses(stub, execution_id) == {"paid": "WAITING", "ship": "PENDING"}
    assert not poll(stub).has_task
    send(stub, execution_id, "payment", {"cents": 5})
    task = run_task(stub, "ship", "shipped")
    assert json.loads(task.input_json)["deps"] == {"paid": {"cents": 5}}
    assert status(stub, execution_id)[0] == "COMPLETED"
    assert refused(lambda: send(stub, execution_id, "payment", 1))[0] is Code.FAILED_PRECONDITION


@pytest.mark.both_stores
def test_early_event_is_kept_and_each_event_is_used_once(stub: NexumServiceStub) -> None:
    nodes = {"a": node("EFFECT"), "one": node("EVENT", "a", event="e"), "two": node("EVENT", "one", event="e")}
    execution_id = began(stub, nodes)
    send(stub, execution_id, "e", "first")
    run_task(stub, "a", 1)
    assert status(stub, execution_id) == ("RUNNING", {"a": 1, "one": "first"})
    send(stub, execution_id, "e", "second")
    assert status(stub, execution_id) == ("COMPLETED", {"a": 1, "one": "first", "two": "second"})


def test_early_events_are_used_in_the_order_in_which_they_came(stub: NexumServiceStub) -> None:
    nodes = {"a": node("EFFECT"), "one": node("EVENT", "a", event="e"), "two": node("EVENT", "one", event="e")}
    execution_id = began(stub, nodes)
    send(stub, execution_id, "e", "first")
    send(stub, execution_id, "e", "second")
    run_task(stub, "a", 1)
    assert status(stub, execution_id) == ("COMPLETED", {"a": 1, "one": "first", "two": "second"})


def test_event_with_the_same_key_counts_once(stub: NexumServiceStub) -> None:
    nodes = {"one": node("EVENT", event="e"), "two": node("EVENT", "one", event="e")}
    execution_id = began(stub, nodes)
    for _ in range(3):
        send(stub, execution_id, "e", 1, key="k1")
    assert status(stub, execution_id) == ("RUNNING", {"one": 1})
    assert refused(lambda: send(stub, execution_id, "e", 2, key="k1"))[0] is Code.ALREADY_EXISTS
    send(stub, execution_id, "e", 2, key="k2")
    assert status(stub, execution_id)[0] == "COMPLETED"
    send(stub, execution_id, "e", 2, key="k2")  # accepted even after the execution's end


def test_event_that_no_node_waits_for_is_refused(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"one": node("EVENT", event="e")})
    code, words = refused(lambda: send(stub, execution_id, "other", 1))
    assert (code, "no EVENT node that waits for 'other'" in words) == (Code.NOT_FOUND, True)
    assert refused(lambda: send(stub, "exec-unknown", "e", 1))[0] is Code.NOT_FOUND


def test_event_for_the_task_of_an_item_is_refused(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"each": node("MAP"), "one": node("EVENT", event="e")})
    run_task(stub, "each", [1])
    (item,) = children(stub, execution_id)
    assert refused(lambda: send(stub, item.execution_id, "e", 1))[0] is Code.NOT_FOUND


def test_events_are_bounded_by_the_size_of_the_outputs(server: ServerThread) -> None:
    with connected(server.address, UNLIMITED) as stub:
        execution_id = began(stub, {"a": node("EFFECT"), "one": node("EVENT", "a", event="e")})
        for _ in range(4):
            send(stub, execution_id, "e", "x" * 15_000_000)
        code, words = refused(lambda: send(stub, execution_id, "e", "x" * 15_000_000))
    assert (code, "over the limit" in words) == (Code.RESOURCE_EXHAUSTED, True)


def test_map_with_too_large_results_fails_and_is_not_retried(server: ServerThread) -> None:
    with connected(server.address, UNLIMITED) as stub:
        execution_id = began(stub, {"each": node("MAP")})
        run_task(stub, "each", [1] * 5)
        for _ in range(5):
            complete(stub, poll(stub), json.dumps("x" * 15_000_000))
        answer = record(stub, execution_id)
        assert (answer.status, "over the limit" in answer.error) == ("FAILED", True)
        retry = pb.RetryRequest(execution_id=execution_id)
        code, words = refused(lambda: stub.RetryExecution(retry, timeout=DEADLINE))
        assert (code, "too large" in words) == (Code.FAILED_PRECONDITION, True)
        assert record(stub, execution_id).status == "FAILED"
        assert len(children(stub, execution_id)) == 5


def test_event_that_does_not_come_fails_the_execution(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"one": node("EVENT", event="e", timeout_seconds=0.1), "two": node("EFFECT", "one")})
    answer = ended(stub, execution_id)
    assert (answer.status, answer.error) == ("FAILED", "one: no event 'e' came within 0.1 s")


@pytest.mark.parametrize("in_time", [True, False])
def test_event_that_does_not_come_leads_to_another_node(stub: NexumServiceStub, in_time: bool) -> None:
    nodes = {
        "paid": node("EVENT", event="e", timeout_seconds=60 if in_time else 0.1, on_timeout="remind"),
        "remind": node("EFFECT", "paid"),
        "ship": node("EFFECT", "paid"),
        "pack": node("EFFECT", "ship"),
    }
    execution_id = began(stub, nodes)
    if in_time:
        send(stub, execution_id, "e", 1)
    for name in ("ship", "pack") if in_time else ("remind",):
        run_task(stub, name, name)
    assert status(stub, execution_id)[0] == "COMPLETED"
    skipped = {name for name, one in statuses(stub, execution_id).items() if one == "SKIPPED"}
    assert skipped == ({"remind"} if in_time else {"paid", "ship", "pack"})


# ---- Policies of a node ----------------------------------------------------------------------------------------------


def test_node_with_its_own_retry_policy(stub: NexumServiceStub) -> None:
    policy = {"max_attempts": 3, "first_delay_seconds": 0, "factor": 1}
    execution_id = began(stub, {"a": node("EFFECT", retry_policy=policy)})
    for attempt in (1, 2, 3):
        task = poll(stub, wait_ms=5000)
        assert task.attempt == attempt
        stub.FailTask(pb.FailRequest(task_id=task.task_id, error_message="no"), timeout=DEADLINE)
    assert record(stub, execution_id).error == "a: no (attempt 3 of 3)"


def test_attempt_that_takes_too_long_counts_as_failed(stub: NexumServiceStub) -> None:
    policy = {"max_attempts": 2, "first_delay_seconds": 0}
    execution_id = began(stub, {"a": node("EFFECT", timeout_seconds=0.1, retry_policy=policy)})
    first = poll(stub)
    second = poll(stub, wait_ms=10_000)
    assert (first.attempt, second.attempt) == (1, 2)
    code, words = refused(lambda: complete(stub, first))
    assert (code, "time limit of 0.1 s" in words or "handed out later" in words) == (Code.FAILED_PRECONDITION, True)
    answer = ended(stub, execution_id)
    assert answer.error == "a: the attempt took longer than its time limit of 0.1 s (attempt 2 of 2)"
    request = pb.GetExecutionRequest(execution_id=execution_id, with_attempts=True)
    attempts = stub.GetExecution(request, timeout=DEADLINE).nodes[0].attempts
    assert [one.outcome for one in attempts] == ["TIMED_OUT", "TIMED_OUT"]


# ---- Retry of an execution -------------------------------------------------------------------------------------------


def retry(stub: NexumServiceStub, execution_id: str) -> None:
    assert stub.RetryExecution(pb.RetryRequest(execution_id=execution_id), timeout=DEADLINE).ok


def fail(stub: NexumServiceStub, task: pb.PollResponse) -> None:
    stub.FailTask(pb.FailRequest(task_id=task.task_id, error_message="broke", final=True), timeout=DEADLINE)


@pytest.mark.both_stores
def test_retried_map_runs_only_the_items_without_a_result(stub: NexumServiceStub) -> None:
    execution_id = began(stub, {"each": node("MAP"), "sum": node("REDUCE", "each")})
    run_task(stub, "each", ["good", "bad", "unfinished"])
    complete(stub, poll(stub), '"good"')
    fail(stub, poll(stub))
    assert status(stub, execution_id)[0] == "FAILED"
    retry(stub, execution_id)
    assert statuses(stub, execution_id) == {"each": "WAITING", "sum": "PENDING"}
    again = {json.loads(task.map_item_json): task for task in (poll(stub), poll(stub))}
    assert set(again) == {"bad", "unfinished"}
    for item, task in again.items():
        complete(stub, task, json.dumps(item))
    run_task(stub, "sum", 3)
    assert status(stub, execution_id) == ("COMPLETED", {"each": ["good", "bad", "unfinished"], "sum": 3})
    assert len(children(stub, execution_id)) == 3


def test_retried_parent_continues_the_child_at_its_failed_node(stub: NexumServiceStub) -> None:
    register(stub, CHILD, workflow_id="child", version="c1")
    execution_id = began(stub, PARENT)
    run_task(stub, "sub", child_start())
    run_task(stub, "a", 1, version="c1")
    fail(stub, poll(stub, version="c1"))
    (child,) = children(stub, execution_id)
    code, words = refused(lambda: retry(stub, child.execution_id))
    assert (code, f"retry execution {execution_id}" in words) == (Code.FAILED_PRECONDITION, True)
    retry(stub, execution_id)
    run_task(stub, "b", 2, version="c1")
    run_task(stub, "after", 3)
    assert status(stub, execution_id) == ("COMPLETED", {"sub": 2, "after": 3})
    assert [one.execution_id for one in children(stub, execution_id)] == [child.execution_id]


def test_retried_rejection_waits_for_another_decision(stub: NexumServiceStub) -> None:
    nodes = {"boss": node("HUMAN_APPROVAL"), "wait": node("TIMER", delay_seconds=60), "each": node("MAP")}
    execution_id = began(stub, nodes)
    run_task(stub, "each", [1])
    reject(stub, execution_id)
    retry(stub, execution_id)
    assert statuses(stub, execution_id) == {"boss": "WAITING", "wait": "WAITING", "each": "WAITING"}
    assert pending(stub) == [(execution_id, "boss", "w")]
    assert poll(stub).map_item_json == "1"
    approve(stub, execution_id)
    assert statuses(stub, execution_id)["boss"] == "COMPLETED"
