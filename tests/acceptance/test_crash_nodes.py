"""SIGKILLs of server and workers at random moments of executions with every node type. CRASH_KILLS=100 takes longer."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from harness import KILLED, ROOT, Process, nexum_server, running
from nexum_wire import connected
from programs.node_worker import CHILD, EVERY, ITEMS, TIMER_MS

from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

SEED = int(os.environ.get("CRASH_SEED") or 2719)
KILLS = int(os.environ.get("CRASH_KILLS") or 8)
ROUNDS = 5
"""How often this number of processes may be killed, until a kill hits a task."""
WORKERS = 3
PATIENCE = 60.0  # seconds
QUICKLY = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100))
T = TypeVar("T")


@dataclass(frozen=True)
class Effect:
    at_ms: int
    attempt: int
    execution_id: str
    node_id: str
    item: str
    key: str


def effects(log: Path) -> list[Effect]:
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        at_ms, attempt, *words = line.split(" ", 5)
        found.append(Effect(int(at_ms), int(attempt), *words))
    return found


def insist(call: Callable[..., T], request: Any) -> T:
    """Repeat a call until the server answers. If only the answer was lost, the server has carried out the call."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call(request, timeout=5)
        except grpc.RpcError as error:
            is_down = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            if not is_down or time.monotonic() > deadline:
                raise
        time.sleep(0.02)  # until the next server listens


def approve_all(stub: NexumServiceStub, over: threading.Event, approved: list[str]) -> None:
    """Approve what waits for a person, until `over` is set."""
    while not over.wait(0.05):
        for one in insist(stub.GetPendingApprovals, pb.EmptyRequest()).items:
            request = pb.ApproveRequest(execution_id=one.execution_id, node_id=one.node_id, approver="Ann")
            try:
                insist(stub.ApproveTask, request)
            except grpc.RpcError as error:
                # Accept this refusal: an earlier call may have approved the node, although its answer was lost.
                if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                    raise
            approved.append(one.execution_id)


def read(stub: NexumServiceStub, execution_id: str, wait_ms: int = 0) -> pb.GetExecutionResponse:
    request = pb.GetExecutionRequest(execution_id=execution_id, with_attempts=True, wait_ms=wait_ms)
    return insist(stub.GetExecution, request)


def children(stub: NexumServiceStub, execution_id: str) -> list[pb.GetExecutionResponse]:
    request = pb.ListRequest(parent_execution_id=execution_id, limit=1000)
    return [read(stub, one.execution_id) for one in insist(stub.ListExecutions, request).executions]


def cut_off(executions: Iterable[pb.GetExecutionResponse]) -> int:
    """Return how many attempts were cut off by a kill."""
    attempts = (attempt for one in executions for node in one.nodes for attempt in node.attempts)
    return sum(attempt.outcome in ("LOST", "INTERRUPTED") for attempt in attempts)


def check_timer(node: pb.NodeRecord, before: pb.NodeRecord) -> None:
    """Check that a timer ended, and not too early. The timer begins when the node before it ends."""
    waited_until = datetime.fromisoformat(json.loads(node.output_json)["waited_until"]).timestamp() * 1000
    assert round(waited_until) >= before.attempts[-1].ended_ms + TIMER_MS


@pytest.mark.timeout(120 + 10 * ROUNDS * KILLS)
def test_random_kills_lose_and_repeat_nothing_of_any_node_type(tmp_path: Path) -> None:
    print(f"CRASH_SEED={SEED}")
    choose = random.Random(SEED)
    log = tmp_path / "log"
    killed: dict[str, int] = defaultdict(int)
    started: dict[str, str] = {}
    approved: list[str] = []
    over = threading.Event()

    with ExitStack() as stack:
        server = stack.enter_context(nexum_server(tmp_path))
        stub = stack.enter_context(connected(server.address, QUICKLY))
        for built in (CHILD, EVERY):
            request = pb.WorkflowIR(
                workflow_id=built.workflow_id, version_hash=built.version_hash, ir_json=built.ir_json
            )
            insist(stub.RegisterWorkflow, request)

        def new_worker() -> Process:
            program = str(ROOT / "tests" / "programs" / "node_worker.py")
            worker: AbstractContextManager[Process] = running(
                [program, server.address, str(log)], cwd=tmp_path, forked=True
            )
            return stack.enter_context(worker)

        def start(key: str) -> None:
            request = pb.StartRequest(
                workflow_id=EVERY.workflow_id, version_hash=EVERY.version_hash, input_json="{}", idempotency_key=key
            )
            started[key] = insist(stub.StartExecution, request).execution_id
            event = pb.SendEventRequest(
                execution_id=started[key], name="payment", payload_json=json.dumps(key), idempotency_key="once"
            )
            insist(stub.SendEvent, event)

        workers = [new_worker() for _ in range(WORKERS)]
        for worker in workers:
            worker.wait_for("connected to")
        approver = threading.Thread(target=approve_all, args=(stub, over, approved))
        approver.start()
        try:
            for kill in range(ROUNDS * KILLS):
                start(f"k{kill}")
                # Each execution takes about a second. Kill a process at a random moment of this second.
                time.sleep(choose.uniform(0.1, 0.7))
                number = choose.randrange(WORKERS + 2)
                victim = server.process if number >= WORKERS else workers[number]
                assert victim.popen.poll() is None, f"kill {kill}: the process had ended\n{victim.output}"
                victim.kill()
                assert victim.popen.returncode in KILLED
                if number >= WORKERS:
                    killed["server"] += 1
                    server = stack.enter_context(nexum_server(tmp_path, port=server.port))
                else:
                    killed["worker"] += 1
                    workers[number] = new_worker()
                if (kill + 1) % KILLS == 0:
                    records = {key: read(stub, execution_id, 30_000) for key, execution_id in started.items()}
                    families = {one.execution_id: children(stub, one.execution_id) for one in records.values()}
                    if hits := cut_off([*records.values(), *chain.from_iterable(families.values())]):
                        break
        finally:
            over.set()
            approver.join()

    assert killed["server"] > 0
    assert killed["worker"] > 0
    assert hits > 0, "no kill hit a task"
    done = effects(log)
    for key, one in records.items():
        # Every execution has ended with the results of an undisturbed run.
        assert one.status == "COMPLETED", one
        nodes = {node.node_id: node for node in one.nodes}
        outputs = {name: json.loads(node.output_json) for name, node in nodes.items() if node.output_json}
        assert {name for name, node in nodes.items() if node.status == "SKIPPED"} == {"never"}
        assert outputs["each"] == [10 * number for number in range(ITEMS)]
        assert (outputs["sum"], outputs["paid"], outputs["sub"]) == (sum(outputs["each"]), key, "the child's end")
        assert outputs["report"] == ["boss", "paid", "sub"]
        assert one.execution_id in approved
        # The MAP node's items and the child execution were started once each.
        family = families[one.execution_id]
        items = [child for child in family if child.HasField("child_index")]
        assert sorted(child.child_index for child in items) == list(range(ITEMS))
        (child,) = [child for child in family if not child.HasField("child_index")]
        within = {node.node_id: node for node in child.nodes}
        check_timer(nodes["pause"], nodes["fetch"])
        check_timer(within["rest"], within["first"])
        # No effect happened after its result was recorded. No attempt had its effect twice. A second attempt was made
        # only if the first one was cut off or had failed.
        assert [(made.worker_id, made.outcome) for made in nodes["boss"].attempts] == [
            ("Ann", "COMPLETED")
        ]  # the approval is recorded once, although it may have been sent more than once
        with_task = [node for node in nodes.values() if node.attempts and node.node_id != "boss"]
        of_tasks = [(one.execution_id, node.node_id, "-", node) for node in with_task]
        of_tasks += [(one.execution_id, "each", str(item.child_index), item.nodes[0]) for item in items]
        of_tasks += [(child.execution_id, node.node_id, "-", node) for node in within.values() if node.attempts]
        assert len(of_tasks) == 6 + ITEMS + 2
        for execution_id, node_id, item, node in of_tasks:
            mine = [e for e in done if (e.execution_id, e.node_id, e.item) == (execution_id, node_id, item)]
            assert len({effect.key for effect in mine}) == 1
            assert len({effect.attempt for effect in mine}) == len(mine)
            outcomes = [attempt.outcome for attempt in node.attempts]
            fails = node_id == "fetch" or item == "0"
            assert outcomes[-1] == "COMPLETED"
            assert set(outcomes[:-1]) <= {"LOST", "INTERRUPTED", "FAILED" if fails else "LOST"}
            assert max(effect.at_ms for effect in mine) <= node.attempts[-1].ended_ms
    assert len({(e.execution_id, e.node_id, e.item) for e in done}) == len({e.key for e in done})
