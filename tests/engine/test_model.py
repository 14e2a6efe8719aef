"""Random operations on random workflows of all node types, on the engine and on a small model of it, side by side.

By default this takes seconds. With MODEL_MINUTES=10, it takes ten minutes, and each run has new random operations. With
MODEL_SHRINK=1, hypothesis looks for the shortest sequence of operations that fails. This takes minutes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar

import grpc
import pytest
from engine_model import SERVER_SIDE, Model, Node, Run, kind_of, same, specs_in
from harness import Server, nexum_server
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from nexum_wire import DEADLINE, connected

from nexum_engine.clock import ManualClock
from nexum_engine.errors import NexumError
from nexum_engine.records import NodeStatus
from nexum_engine.store import executions, leases, listing, open_store, reading, retry, tasks, waits
from nexum_engine.store.base import Kind
from nexum_engine.store.db import Db, load_queries
from nexum_engine.store.sqlite import SqliteStore
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub
from nexum_engine.wire.status import error_of
from nexum_engine.workflow import parse_ir

MINUTES = float(os.environ.get("MODEL_MINUTES") or 0)
SHRINKS = bool(os.environ.get("MODEL_SHRINK"))
T = TypeVar("T")
Specs = Mapping[str, Mapping[str, Any]]

VALUES: list[Any] = [None, True, 1, 1.0, -0.5, "a", "é\n", [], {}, [1, [2]], {"b": {"c": None}}]
TEXTS = ["{", "NaN", "[1", ""]
WORKERS = {"w1": True, "w2": True, "w3": False}
"""The workers, and whether each has a stream of heartbeats."""
MAX_RUNS = 40
LEFT = ("READY", "RUNNING", "WAITING")
FOLLOWING = {
    "PENDING": ("READY", "WAITING", "SKIPPED", "CANCELLED"),
    # If the latest attempt reports late, the report counts as if the node were RUNNING.
    "READY": ("RUNNING", "WAITING", "COMPLETED", "FAILED", "CANCELLED"),
    "RUNNING": ("READY", "WAITING", "COMPLETED", "FAILED", "CANCELLED"),
    "WAITING": ("READY", "RUNNING", "COMPLETED", "SKIPPED", "FAILED", "CANCELLED"),
    "COMPLETED": (),
    "SKIPPED": (),
    # If the execution is retried, its FAILED and CANCELLED nodes begin again.
    "FAILED": ("PENDING", "READY", "WAITING", "SKIPPED"),
    "CANCELLED": ("PENDING", "READY", "WAITING", "SKIPPED"),
}
"""The statuses that can follow a node's status: see docs/architecture.md."""
State = tuple[dict[str, Any], set[tuple[str, str]], set[tuple[str, str]]]
"""The executions with their children, the nodes that wait for an approval, and the nodes with an unknown effect."""


# ---- Workflows -----------------------------------------------------------------------------------------------------


def some_of(choose: Random, options: Sequence[T], most: int) -> list[T]:
    return choose.sample(options, choose.randint(0, min(most, len(options))))


KINDS = (
    "EFFECT",
    "EFFECT",
    "COMPUTE",
    "MAP",
    "REDUCE",
    "SUBWORKFLOW",
    "SUBWORKFLOW",
    "TIMER",
    "HUMAN_APPROVAL",
    "EVENT",
)
DECIDED = ("EFFECT", "EFFECT", "HUMAN_APPROVAL")
"""The types of nodes about which a person may decide."""


def new_workflow(
    choose: Random, kinds: Sequence[str], seconds: Sequence[float], policies: Sequence[Mapping[str, Any]]
) -> Specs:
    """Return a random workflow of one to six nodes of the types `kinds`. Its delays and timeouts are from `seconds`."""
    names = choose.sample(["n0", "n1", "n2", "n3", "n4", "n5"], choose.randint(1, 6))
    nodes: dict[str, dict[str, Any]] = {}
    for position, name in enumerate(names):
        earlier, later = names[:position], names[position + 1 :]
        kind = choose.choice([*kinds, *(["ROUTER", "ROUTER"] if later and kinds is KINDS else [])])
        node: dict[str, Any] = {"type": kind, "dependencies": some_of(choose, earlier, 2)}
        if kind == "ROUTER":
            targets = [choose.choice(later), *some_of(choose, later, 2)]
            node["routes"] = [{"condition": "", "target": target} for target in targets]
        elif kind == "REDUCE" and (maps := [one for one in earlier if nodes[one]["type"] == "MAP"]):
            node["mapNodeId"] = choose.choice(maps)
        elif kind == "TIMER":
            node["delay_seconds"] = choose.choice([0, *seconds])
        elif kind == "EVENT":
            node["event"] = choose.choice(["e", "f"])
            if choose.random() < 0.5:
                node["timeout_seconds"] = choose.choice(seconds)
                if later and choose.random() < 0.7:
                    node["on_timeout"] = choose.choice(later)
        elif kind == "HUMAN_APPROVAL" and choose.random() < 0.3:
            node["timeout_seconds"] = choose.choice(seconds)
        elif kind == "EFFECT" and choose.random() < (0.3 if kinds is KINDS else 0.9):
            node["effect"] = "once"
            if choose.random() < 0.5:
                node["reconcile"] = True
        if kind not in SERVER_SIDE:
            if policy := choose.choice(policies):
                node["retry_policy"] = policy
            if choose.random() < 0.2:
                node["timeout_seconds"] = choose.choice(seconds)
        nodes[name] = node
    return {name: nodes[name] for name in choose.sample(names, len(names))}


# ---- The engine, behind its store or behind a server -----------------------------------------------------------------


class HandedOut(Protocol):
    """A task as a worker gets it: a record of the store, or a message of the server."""

    task_id: str
    execution_id: str
    node_id: str
    node_type: str
    version_hash: str
    attempt: int
    idempotency_key: str
    input_json: str
    progress_json: str
    map_index: int
    map_total: int
    map_item_json: str
    must_reconcile: bool


class Engine(Protocol):
    def register(self, workflow: str, version: str, ir_json: str) -> None: ...
    def start(self, workflow: str, version: str, input_json: str, key: str) -> tuple[str, bool, str]: ...
    def claim(self, worker: str, versions: tuple[str, ...]) -> HandedOut | None: ...
    def complete(self, task_id: str, output_json: str) -> None: ...
    def fail(self, task_id: str, error: str, final: bool, unknown: bool) -> None: ...
    def approve(self, execution_id: str, node_id: str, approver: str, comment: str, answer_json: str) -> None: ...
    def reject(self, execution_id: str, node_id: str, approver: str, reason: str) -> None: ...
    def resolve(self, execution_id: str, node_id: str, by: str, decision: str, text: str, attempt: int) -> None: ...
    def send(self, execution_id: str, name: str, payload_json: str, key: str) -> None: ...
    def cancel(self, execution_id: str) -> None: ...
    def retry(self, execution_id: str) -> None: ...
    def state(self, roots: list[str]) -> State: ...
    def restart(self) -> None: ...


class StoreEngine:
    """The transitions of a store, on a clock that stands still until the test moves it."""

    def __init__(self, url: str, clock: ManualClock) -> None:
        self._clock = clock
        self._url = url
        self._loop = asyncio.new_event_loop()
        self.swept_until = clock.now_ms()
        self.next_ms: int | None = None
        self._open()

    def _open(self) -> None:
        self._store = store = self._loop.run_until_complete(open_store(self._url, self._clock))
        self.run(leases.restart, 1500, 60_000)
        self._records_changes = isinstance(store, SqliteStore)
        if isinstance(store, SqliteStore):
            # Don't wait for the disk: no test here cuts the power.
            store._database.connection.execute("PRAGMA synchronous = OFF")
            self.run(self._record_changes)

    @staticmethod
    def _record_changes(db: Db) -> None:
        """Note each change of a node's status from now on."""
        connection = db._connection  # type: ignore[attr-defined]
        connection.execute("CREATE TEMP TABLE changes (node INTEGER, old TEXT, new TEXT)")
        connection.execute(
            "CREATE TEMP TRIGGER change AFTER UPDATE OF status ON nodes WHEN old.status <> new.status "
            "BEGIN INSERT INTO changes VALUES (old.node, old.status, new.status); END"
        )

    def run(self, transition: Callable[..., T], *args: Any, **options: Any) -> T:
        """Run a transition in this thread: a hand-over to the store's thread takes longer than most transitions."""
        (outcome,) = self._store._run_batch([lambda db: transition(db, *args, **options)], Kind.TOGETHER)
        if isinstance(outcome, BaseException):
            raise outcome
        answer: T = outcome
        return answer

    def close(self) -> None:
        if isinstance(self._store, SqliteStore):
            connection = self._store._database.connection
            for query in load_queries("checks.sql").values():
                assert [row["what"] for row in connection.execute(query)] == []
        self._loop.run_until_complete(self._store.close())
        self._loop.close()

    def restart(self) -> None:
        self._loop.run_until_complete(self._store.close())
        self._open()

    def register(self, workflow: str, version: str, ir_json: str) -> None:
        self.run(executions.register_workflow, workflow, version, ir_json)

    def start(self, workflow: str, version: str, input_json: str, key: str) -> tuple[str, bool, str]:
        started = self.run(executions.start_execution, workflow, version, input_json, key)
        return started.execution_id, started.existing, started.status.value

    def claim(self, worker: str, versions: tuple[str, ...]) -> HandedOut | None:
        streamed = WORKERS[worker]
        lease = 30_000 if streamed else 60_000
        return self.run(tasks.claim, worker, versions, 2**40, lease, streamed).task  # type: ignore[return-value]

    def complete(self, task_id: str, output_json: str) -> None:
        self.run(tasks.complete_task, task_id, output_json)

    def fail(self, task_id: str, error: str, final: bool, unknown: bool) -> None:
        self.run(tasks.fail_task, task_id, error, final, unknown)

    def approve(self, execution_id: str, node_id: str, approver: str, comment: str, answer_json: str) -> None:
        self.run(waits.approve, execution_id, node_id, approver, comment, answer_json)

    def reject(self, execution_id: str, node_id: str, approver: str, reason: str) -> None:
        self.run(waits.reject, execution_id, node_id, approver, reason)

    def resolve(self, execution_id: str, node_id: str, by: str, decision: str, text: str, attempt: int) -> None:
        self.run(
            waits.resolve,
            execution_id,
            node_id,
            by,
            output_json=text if decision == "done" else None,
            not_done=decision == "not done",
            failed=text,
            attempt=attempt,
        )

    def send(self, execution_id: str, name: str, payload_json: str, key: str) -> None:
        self.run(waits.send_event, execution_id, name, payload_json, key)

    def cancel(self, execution_id: str) -> None:
        self.run(executions.cancel_execution, execution_id)

    def retry(self, execution_id: str) -> None:
        self.run(retry.retry_execution, execution_id)

    def sweep(self) -> None:
        """Sweep until nothing is due, as the server does."""
        while True:
            until = self._clock.now_ms()
            swept = self.run(leases.sweep, self.swept_until)
            self.swept_until, self.next_ms = until, swept.next_ms
            if swept.next_ms is None or swept.next_ms > until:
                return

    def state(self, roots: list[str]) -> State:
        """Check that all status changes are allowed."""

        def read(db: Db) -> State:
            def one(execution_id: str) -> dict[str, Any]:
                children = listing.list_executions(db, "", "", 1000, parent=execution_id)
                execution = reading.get_execution(db, execution_id, True)
                return {"execution": execution, "children": [one(child.execution_id) for child in reversed(children)]}

            pending = {(found.execution_id, found.node_id) for found in waits.pending_approvals(db)}
            unknown = {(found.execution_id, found.node_id) for found in waits.unknown_nodes(db)}
            found = {root: one(root) for root in roots}, pending, unknown
            if not self._records_changes:
                return found
            connection = db._connection  # type: ignore[attr-defined]
            for old, new in connection.execute("SELECT old, new FROM changes"):
                assert new in FOLLOWING[old], f"{old} -> {new}"
            connection.execute("DELETE FROM changes")
            return found

        return self.run(read)


def answered(call: Callable[[Any], T], request: Any) -> T:
    try:
        return call(request, timeout=DEADLINE)  # type: ignore[call-arg]
    except grpc.RpcError as error:
        raise error_of(error, "the server") from None


class ServerEngine:
    """A server process, called with a plain stub. A restart kills the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._port = 0
        self.kills = 0
        self._begin()

    def _begin(self) -> None:
        self._server: Server = self._stack.enter_context(nexum_server(self._folder, port=self._port))
        self._port = self._server.port
        self._stub: NexumServiceStub = self._stack.enter_context(connected(self._server.address))

    def restart(self) -> None:
        self._server.process.kill()
        self._stack.close()
        self.kills += 1
        self._begin()

    def close(self) -> None:
        self._stack.close()

    def register(self, workflow: str, version: str, ir_json: str) -> None:
        request = pb.WorkflowIR(workflow_id=workflow, version_hash=version, ir_json=ir_json)
        answered(self._stub.RegisterWorkflow, request)

    def start(self, workflow: str, version: str, input_json: str, key: str) -> tuple[str, bool, str]:
        request = pb.StartRequest(
            workflow_id=workflow, version_hash=version, input_json=input_json, idempotency_key=key
        )
        answer = answered(self._stub.StartExecution, request)
        return answer.execution_id, answer.existing, answer.status

    def claim(self, worker: str, versions: tuple[str, ...]) -> HandedOut | None:
        request = pb.PollRequest(
            worker_id=worker, version_hash=versions[0], more_version_hashes=versions[1:], max_task_bytes=2**40
        )
        task = answered(self._stub.PollTask, request)
        return task if task.has_task else None

    def complete(self, task_id: str, output_json: str) -> None:
        answered(self._stub.CompleteTask, pb.CompleteRequest(task_id=task_id, output_json=output_json))

    def fail(self, task_id: str, error: str, final: bool, unknown: bool) -> None:
        request = pb.FailRequest(task_id=task_id, error_message=error, final=final, unknown=unknown)
        answered(self._stub.FailTask, request)

    def approve(self, execution_id: str, node_id: str, approver: str, comment: str, answer_json: str) -> None:
        request = pb.ApproveRequest(
            execution_id=execution_id, node_id=node_id, approver=approver, comment=comment, answer_json=answer_json
        )
        answered(self._stub.ApproveTask, request)

    def reject(self, execution_id: str, node_id: str, approver: str, reason: str) -> None:
        request = pb.RejectRequest(execution_id=execution_id, node_id=node_id, approver=approver, reason=reason)
        answered(self._stub.RejectTask, request)

    def resolve(self, execution_id: str, node_id: str, by: str, decision: str, text: str, attempt: int) -> None:
        request = pb.ResolveRequest(execution_id=execution_id, node_id=node_id, resolved_by=by, attempt=attempt)
        if decision == "done":
            request.output_json = text
        elif decision == "not done":
            request.not_done = True
        else:
            request.failed = text
        answered(self._stub.ResolveNode, request)

    def send(self, execution_id: str, name: str, payload_json: str, key: str) -> None:
        request = pb.SendEventRequest(
            execution_id=execution_id, name=name, payload_json=payload_json, idempotency_key=key
        )
        answered(self._stub.SendEvent, request)

    def cancel(self, execution_id: str) -> None:
        answered(self._stub.CancelExecution, pb.CancelRequest(execution_id=execution_id))

    def retry(self, execution_id: str) -> None:
        answered(self._stub.RetryExecution, pb.RetryRequest(execution_id=execution_id))

    def _waiting(self, call: Callable[[Any], Any]) -> set[tuple[str, str]]:
        return {(one.execution_id, one.node_id) for one in answered(call, pb.EmptyRequest()).items}

    def state(self, roots: list[str]) -> State:
        def one(execution_id: str) -> dict[str, Any]:
            request = pb.GetExecutionRequest(execution_id=execution_id, with_attempts=True)
            execution = answered(self._stub.GetExecution, request)
            found = [one(child.execution_id) for child in children(execution_id)]
            return {"execution": execution, "children": found}

        def children(execution_id: str) -> list[Any]:
            request = pb.ListRequest(parent_execution_id=execution_id, limit=1000)
            return list(reversed(answered(self._stub.ListExecutions, request).executions))

        pending, unknown = self._waiting(self._stub.GetPendingApprovals), self._waiting(self._stub.GetUnknown)
        return {root: one(root) for root in roots}, pending, unknown


# ---- Both, side by side ----------------------------------------------------------------------------------------------


class BothEngines(RuleBasedStateMachine):
    """Each rule does the same to the engine and to the model. After each rule, both must be in the same state."""

    engine: Engine
    model: Model
    seconds: tuple[float, ...]
    policies: tuple[Mapping[str, Any], ...]
    prefix = ""
    empty_report = ""
    """What an empty report means to the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.identity_of: dict[str, object] = {}
        self.key_of: dict[object, str] = {}
        self.numbers = itertools.count()
        self.reports: list[tuple[str, str]] = []

    def both(self, on_engine: Callable[[], T], on_model: Callable[[], object]) -> T | None:
        """Do something to the engine and to the model. Return the engine's answer; None if both refuse it."""
        expected: type[NexumError] | None = None
        try:
            on_model()
        except NexumError as error:
            expected = kind_of(error)
        answer, refusal = None, None
        try:
            answer = on_engine()
        except NexumError as error:
            refusal = error
        assert (refusal and kind_of(refusal)) is expected, f"engine: {refusal!r}, model: {expected}"
        return answer

    def pick(self, options: Collection[T], label: str) -> T:
        chosen = self.choose.choice(list(options))
        note(f"    {label}: {chosen!r}")
        return chosen

    # ---- Workflows and executions

    def some_version(self) -> tuple[str, ...]:
        return tuple(version for versions in self.model.versions.values() for version in versions)

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.choose = Random(seed)
        self.kinds = self.pick([KINDS, DECIDED], "types")
        for _ in range(3):
            self.register()
        for _ in range(3):
            self.start()

    @precondition(lambda self: len(self.model.definitions) < 6)
    @rule()
    def register(self) -> None:
        workflow = self.prefix + self.pick(["a", "b", "c"], "workflow")
        version = f"{self.prefix}v{next(self.numbers)}"
        specs = new_workflow(self.choose, self.kinds, self.seconds, self.policies)
        note(f"    {version}: {specs}")
        ir_json = json.dumps({"nodes": specs})
        self.engine.register(workflow, version, ir_json)
        self.model.register(workflow, version, specs_in(list(parse_ir(ir_json)), specs))

    @precondition(lambda self: len(self.model.runs) < MAX_RUNS)
    @rule()
    def start(self) -> None:
        workflow = self.pick([*self.model.versions, "nowhere"], "workflow")
        version = self.pick(self.model.versions.get(workflow, ["v0"]), "version")
        given = self.pick(VALUES, "input")
        key = self.pick(["", "", "", "k1", "k2"], "key")
        found: list[tuple[Run, bool]] = []
        answer = self.both(
            lambda: self.engine.start(workflow, version, json.dumps(given), key),
            lambda: found.append(self.model.start(workflow, version, given, key)),
        )
        if answer is not None:
            ((run, existing),) = found
            assert answer[1:] == (existing, run.status)
            assert run.id in ("", answer[0])
            run.id = answer[0]

    @rule()
    def cancel(self) -> None:
        # Seldom cancel an execution that runs: otherwise, later operations would find less to do.
        ids = [run.id for run in self.model.runs if run.status != "RUNNING" or self.choose.random() < 0.05]
        execution_id = self.pick([*ids, "exec-1-000000000000000000000000"], "execution")
        self.both(lambda: self.engine.cancel(execution_id), lambda: self.model.cancel(execution_id))

    @precondition(lambda self: any(run.status == "FAILED" for run in self.model.runs))
    @rule()
    def retry(self) -> None:
        failed = [run.id for run in self.model.runs if run.status == "FAILED" and run.parent is None]
        execution_id = self.pick([*failed, *failed, *(run.id for run in self.model.runs)], "execution")
        self.both(lambda: self.engine.retry(execution_id), lambda: self.model.retry(execution_id))

    # ---- Tasks

    def claim_task(self) -> HandedOut | None:
        worker = self.pick(WORKERS, "worker")
        versions = self.some_version()
        if self.choose.random() < 0.3:
            versions = tuple(self.choose.sample(versions, 2))
        task = self.engine.claim(worker, versions)
        may_get = self.model.tasks(versions)
        if task is None:
            assert not may_get
            return None
        (node,) = [one for one in may_get if self.is_task_of(one, task)]
        attempt = self.model.hand_out(node, worker, task.task_id, WORKERS[worker])
        assert attempt.number == task.attempt
        assert (task.node_type, task.version_hash) == (node.kind, node.run.version)
        assert same(self.model.task_input(node), json.loads(task.input_json))
        assert task.must_reconcile == node.must_reconcile
        assert same(node.progress, json.loads(task.progress_json or "null"))
        if node.kind == "MAP_SUBTASK":
            assert node.run.parent is not None
            assert same(node.run.input, json.loads(task.map_item_json))
            assert task.map_total == len(node.run.parent.children)
        self.check_key(node, task.idempotency_key)
        return task

    def is_task_of(self, node: Node, task: HandedOut) -> bool:
        if node.kind != "MAP_SUBTASK":
            found = (task.node_type, task.execution_id, task.node_id)
            return found == (node.kind, node.run.id, node.name)
        assert node.run.parent is not None
        item = (task.node_type, task.execution_id, task.node_id, task.map_index)
        return item == ("MAP_SUBTASK", node.run.parent.run.id, node.run.parent.name, node.run.index)

    def check_key(self, node: Node, key: str) -> None:
        """Check that all attempts of a node have the same key, and that no other node has this key.

        If a FAILED execution is started again, its nodes keep their keys.
        """
        run = node.run if node.run.parent is None or node.run.index is None else node.run.parent.run
        identity = (run.workflow, run.key, node.name) if run.key else (run.id, node.name)
        assert self.identity_of.setdefault(key, identity) == identity
        assert self.key_of.setdefault(identity, key) == key

    @rule()
    def claim(self) -> None:
        self.claim_task()

    def fitting(self, node: Node) -> object:
        if node.kind == "ROUTER":
            return {"routed_to": self.pick(sorted(node.targets), "target")}
        if node.kind == "MAP":
            return [self.pick(VALUES, "item") for _ in range(self.choose.choice([0, 1, 2, 2, 3]))]
        if node.kind == "SUBWORKFLOW":
            start: dict[str, object] = {"subWorkflowId": self.pick(self.model.versions, "workflow")}
            if self.choose.random() < 0.5:
                start["childInput"] = self.pick(VALUES, "input")
            return start
        return self.pick(VALUES, "output")

    def complete_task(self, task_id: str, text: str) -> None:
        if self.model.attempts[task_id].node.kind in ("MAP", "SUBWORKFLOW") and len(self.model.runs) >= MAX_RUNS:
            return
        self.reports.append((task_id, text))
        means = text or self.empty_report
        self.both(lambda: self.engine.complete(task_id, text), lambda: self.model.complete(task_id, means))

    def work(self) -> None:
        """Take a task and report a result that is valid for its node."""
        if (task := self.claim_task()) is not None:
            node = self.model.attempts[task.task_id].node
            self.complete_task(task.task_id, json.dumps(self.fitting(node)))

    @invariant()
    def carry_on(self) -> None:
        """After each rule, run operations that let executions continue: most of the rules' operations are refused."""
        for _ in range(self.choose.randint(0, 5)):
            self.compare_all()
            self.choose.choice(self.useful())()
        self.compare_all()

    def useful(self) -> list[Callable[[], None]]:
        """Return the operations that let executions continue."""
        useful = [self.work, self.work, self.work, self.work, self.claim, self.send, self.report_late]
        if self.held():
            useful += [self.complete, self.fail_held]
        if self.model.pending_approvals():
            useful.append(self.approve)
        if self.model.unknown_nodes():
            useful.append(self.resolve)
        if len(self.model.runs) < MAX_RUNS:
            useful.append(self.start)
        return useful

    def report_late(self) -> None:
        """Report a valid result for an attempt that has ended, if its node has not ended."""
        over = [one for one in self.model.attempts.values() if one.outcome != "RUNNING" and one.node.status in LEFT]
        if over:
            attempt = self.pick(over, "attempt")
            self.complete_task(attempt.task_id, json.dumps(self.fitting(attempt.node)))

    def approve(self) -> None:
        self.decide_about(*self.pick(sorted(self.model.pending_approvals()), "node"), True)

    def resolve(self) -> None:
        decision = self.pick(["done", "not done", "not done", "failed"], "decision")
        run_id, name = self.pick(sorted(self.model.unknown_nodes()), "node")
        in_doubt = len(self.model.run(run_id).nodes[name].attempts)
        self.resolve_node(run_id, name, decision, self.pick([in_doubt, in_doubt, 0], "attempt"))

    def resolve_node(self, run_id: str, name: str, decision: str, attempt: int) -> None:
        text = self.pick(["1", "[]", "{"], "result") if decision == "done" else ""
        self.both(
            lambda: self.engine.resolve(run_id, name, "Cas", decision, text or "lost", attempt),
            lambda: self.model.resolve(run_id, name, "Cas", decision, text, attempt),
        )

    def fail_held(self) -> None:
        self.fail_task(self.pick(self.held(), "task"), "oh", final=False, unknown=self.choose.random() < 0.2)

    def held(self) -> list[str]:
        return [attempt.task_id for attempt in self.model.running()]

    @precondition(lambda self: self.held())
    @rule()
    def complete(self) -> None:
        task_id = self.pick(self.held(), "task")
        self.complete_task(task_id, json.dumps(self.fitting(self.model.attempts[task_id].node)))

    @precondition(lambda self: self.model.attempts)
    @rule()
    def report_anything(self) -> None:
        task_id = self.pick(self.model.attempts, "task")
        wrong = [{"routed_to": "n9"}, {"routed_to": ["n0"]}, {"subWorkflowId": "nowhere"}, {"subWorkflowId": 1}]
        text = self.pick([*TEXTS, *map(json.dumps, [*VALUES, *wrong])], "output")
        self.complete_task(task_id, text)

    @precondition(lambda self: self.reports)
    @rule()
    def repeat_report(self) -> None:
        self.complete_task(*self.pick(self.reports, "report"))

    @precondition(lambda self: self.model.attempts)
    @rule(
        error=st.sampled_from(["oh", "no"]),
        final=st.sampled_from([False, False, False, True]),
        unknown=st.sampled_from([False, False, True]),
    )
    def fail(self, error: str, final: bool, unknown: bool) -> None:
        self.fail_task(self.pick([*self.held(), *self.model.attempts], "task"), error, final, unknown)

    def fail_task(self, task_id: str, error: str, final: bool, unknown: bool) -> None:
        self.both(
            lambda: self.engine.fail(task_id, error, final, unknown),
            lambda: self.model.fail(task_id, error, final, unknown),
        )

    @rule()
    def report_unknown_task(self) -> None:
        task_id = "task-1000-000000000000000000000000"
        self.both(lambda: self.engine.complete(task_id, "1"), lambda: self.model.complete(task_id, "1"))
        self.both(
            lambda: self.engine.fail(task_id, "no", False, True), lambda: self.model.fail(task_id, "no", False, True)
        )

    # ---- What comes from outside

    @precondition(lambda self: self.model.pending_approvals())
    @rule()
    def reject(self) -> None:
        self.decide_about(*self.pick(sorted(self.model.pending_approvals()), "node"), False)

    @rule(approves=st.booleans())
    def decide_anything(self, approves: bool) -> None:
        run_id = self.pick([*(run.id for run in self.model.runs), "exec-unknown"], "execution")
        self.decide_about(run_id, self.pick(["n0", "n1", "n2", "n3"], "node"), approves)

    @rule(decision=st.sampled_from(["done", "not done", "failed"]))
    def resolve_anything(self, decision: str) -> None:
        run_id = self.pick([*(run.id for run in self.model.runs), "exec-unknown"], "execution")
        name = self.pick(["n0", "n1", "n2", "n3"], "node")
        self.resolve_node(run_id, name, decision, self.pick([0, 1, 2, 3], "attempt"))

    def decide_about(self, run_id: str, name: str, approves: bool) -> None:
        if approves:
            answer = self.pick(VALUES, "answer")
            self.both(
                lambda: self.engine.approve(run_id, name, "Ann", "fine", "" if answer is None else json.dumps(answer)),
                lambda: self.model.approve(run_id, name, "Ann", "fine", answer),
            )
        else:
            self.both(
                lambda: self.engine.reject(run_id, name, "Bob", "too much"),
                lambda: self.model.reject(run_id, name, "Bob"),
            )

    @rule()
    def send(self) -> None:
        listening = [
            run.id
            for run in self.model.runs
            if run.status == "RUNNING" and any(node.kind == "EVENT" for node in run.nodes.values())
        ]
        others = [*(run.id for run in self.model.runs), "exec-unknown"]
        run_id = self.pick(listening if listening and self.choose.random() < 0.8 else others, "execution")
        name = self.pick(["e", "e", "f", "g"], "name")
        payload = self.pick(VALUES, "payload")
        key = self.pick(["", "", "k1", "k2"], "key")
        self.both(
            lambda: self.engine.send(run_id, name, json.dumps(payload), key),
            lambda: self.model.send(run_id, name, payload, key),
        )

    @rule()
    def restart(self) -> None:
        self.engine.restart()
        self.model.restart()

    # ---- The comparison

    def compare_all(self) -> None:
        """Compare all executions. Give each new execution of the model the id that the engine gave it."""
        roots = [run for run in self.model.runs if run.parent is None]
        found, pending, unknown = self.engine.state([run.id for run in roots])
        for run in roots:
            self.compare(run, found[run.id])
        ids = {run.id for run in self.model.runs}
        assert {one for one in pending if one[0] in ids} == self.model.pending_approvals()
        assert {one for one in unknown if one[0] in ids} == self.model.unknown_nodes()

    def compare(self, run: Run, found: Mapping[str, Any]) -> None:
        execution = found["execution"]
        run.id = execution.execution_id
        assert execution.status == run.status
        assert (execution.workflow_id, execution.version_hash) == (run.workflow, run.version)
        assert same(run.input, json.loads(execution.input_json))
        assert execution.error.startswith(f"{run.error}: ") if run.error else not execution.error
        assert bool(execution.ended_ms) == (run.status != "RUNNING")
        nodes = {node.node_id: node for node in execution.nodes}
        statuses = {name: NodeStatus(node.status).value for name, node in nodes.items()}
        assert statuses == {node.name: node.status for node in run.nodes.values()}
        for node in run.nodes.values():
            self.compare_node(node, nodes[node.name])
        children = sorted(
            (child for node in run.nodes.values() for child in node.children), key=lambda child: child.number
        )
        assert len(children) == len(found["children"])
        for child, one in zip(children, found["children"], strict=True):
            assert child.parent is not None
            record = one["execution"]
            assert (record.parent_execution_id, record.parent_node_id) == (run.id, child.parent.name)
            self.compare(child, one)

    def compare_node(self, node: Node, found: Any) -> None:
        assert found.node_type == node.kind
        if node.status == "COMPLETED":
            assert same(node.output, json.loads(found.output_json)), (node.output, found.output_json)
        else:
            assert not found.output_json
        if node.status == "FAILED":
            assert found.error
        outcomes = [getattr(one.outcome, "value", one.outcome) for one in found.attempts]
        assert outcomes == [attempt.outcome for attempt in node.attempts]
        assert [one.worker_id for one in found.attempts] == [attempt.worker for attempt in node.attempts]


class WithStore(BothEngines):
    """The rules, run on the engine's transitions, and rules that move the clock. A subclass makes the databases."""

    seconds = (0.25, 2, 45)
    policies = ({}, {}, {"max_attempts": 2, "first_delay_seconds": 0.5}, {"first_delay_seconds": 3, "factor": 1.5})
    engine: StoreEngine

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.engine = StoreEngine(self.new_database(), self.clock)
        self.model = Model(self.clock.now_ms())

    def new_database(self) -> str:
        raise NotImplementedError

    def teardown(self) -> None:
        self.engine.close()

    def useful(self) -> list[Callable[[], None]]:
        return [*super().useful(), self.wait, self.sweep, self.lose_worker, self.lose_worker]

    def lose_worker(self) -> None:
        """Take a task, and lose its worker before it reports."""
        task = self.claim_task()
        if task is not None:
            attempt = self.model.attempts[task.task_id]
            self.disconnect(attempt.worker)
            self.move_clock(1 if attempt.streamed else 61)
            self.sweep()

    @rule(seconds=st.sampled_from([0.001, 3, 60, 3600]))
    def restart_with_the_clock_set_back(self, seconds: float) -> None:
        self.move_clock(-seconds)
        self.engine.swept_until = self.clock.now_ms()
        self.restart()

    def wait(self) -> None:
        self.move_clock(self.pick([0.001, 0.25, 1, 2, 8], "seconds"))

    @rule(seconds=st.sampled_from([0.001, 0.25, 1, 2, 8, 31, 61]))
    def move_clock(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.now = self.clock.now_ms()

    @rule()
    def sweep(self) -> None:
        self.engine.sweep()
        self.model.sweep()
        due = [
            node.due
            for node in self.model.nodes()
            if node.due is not None
            and (
                node.status in ("RUNNING", "WAITING")
                or (node.status == "READY" and node.attempts and node.due > self.model.now)
            )
        ]
        assert self.engine.next_ms == min(due, default=None)

    @rule(worker=st.sampled_from(sorted(WORKERS)))
    def beat(self, worker: str) -> None:
        named = some_of(self.choose, list(self.model.attempts), 5)
        note(f"    tasks: {named}")
        progress = {one: self.pick(VALUES, "progress") for one in named[:1]}
        texts = {task_id: json.dumps(value) for task_id, value in progress.items()}
        renewed = self.engine.run(leases.renew, worker, tuple(named), 30_000, texts)
        assert set(renewed.lost) == self.model.beat(worker, named, progress)

    @rule(worker=st.sampled_from(sorted(WORKERS)))
    def disconnect(self, worker: str) -> None:
        self.engine.run(leases.disconnect, worker, 1000)
        self.model.disconnect(worker)

    @precondition(lambda self: self.held())
    @rule()
    def release(self) -> None:
        task_id = self.pick([*self.held(), *self.model.attempts], "task")
        self.engine.run(tasks.release, task_id, "the call was cancelled")
        self.model.release(task_id)

    @precondition(lambda self: self.held())
    @rule()
    def lose(self) -> None:
        """Report a task as lost, as if it had never arrived at its worker."""
        old = [one for one in self.model.running() if one.started + 1000 <= self.model.now]
        if old:
            attempt = self.pick(old, "attempt")
            self.engine.run(leases.lose, attempt.worker, frozenset([attempt.task_id]))
            self.model.lose(attempt, "LOST", may_have_begun=False)

    def compare_node(self, node: Node, found: Any) -> None:
        super().compare_node(node, found)
        assert found.due_ms == (node.due if node.status == "WAITING" else None)
        assert same(node.progress, json.loads(found.progress_json or "null"))


class WithServer(BothEngines):
    """The rules, run on a server process, which a restart kills. Its clock can't be moved, so no rule waits."""

    seconds = (10_000,)
    empty_report = "null"  # the published TypeScript SDK sends no output for a handler that returns nothing
    policies = ({"first_delay_seconds": 0}, {"first_delay_seconds": 0, "max_attempts": 2})
    engine: ServerEngine
    number = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"x{next(self.number)}-"
        self.model = Model(0, knows_time=False)


def check(machine: type[BothEngines], examples: int, steps: int) -> None:
    """Run `examples` sequences of up to `steps` random operations. Repeat this until MODEL_MINUTES are over."""
    deadline = time.monotonic() + 60 * MINUTES
    chosen = settings(
        max_examples=examples,
        stateful_step_count=2 * steps if MINUTES else steps,
        deadline=None,
        database=None,
        phases=[Phase.generate, *([Phase.shrink] if SHRINKS else [])],
        report_multiple_bugs=False,
        derandomize=not MINUTES,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    while True:
        run_state_machine_as_test(machine, settings=chosen)
        if time.monotonic() >= deadline:
            return


@pytest.mark.both_stores
@pytest.mark.timeout(120 + 90 * MINUTES)
def test_store_does_what_the_model_does(new_database: Callable[[], str]) -> None:
    class WithThisStore(WithStore):
        def new_database(self) -> str:
            return new_database()

    # Each operation takes longer on PostgreSQL.
    check(WithThisStore, examples=60 if new_database().startswith("sqlite") else 10, steps=20)


@pytest.mark.timeout(120 + 90 * MINUTES)
def test_server_does_what_the_model_does(tmp_path: Path) -> None:
    engine = ServerEngine(tmp_path)

    class WithThisServer(WithServer):
        def __init__(self) -> None:
            super().__init__()
            self.engine = engine

    try:
        check(WithThisServer, examples=5, steps=12)
    finally:
        engine.close()
    assert engine.kills > 0
