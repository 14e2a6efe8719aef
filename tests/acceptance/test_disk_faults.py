"""The disk fails under the server: a write or an fsync kills the server, finds the disk full, or reports an I/O error.

strace injects each fault into one system call of a server process. The call is chosen from those of an undisturbed run.
Afterwards a new server has every acknowledged change, and the database is whole. DISK_FAULTS=40 tries 40 calls for
each kind of fault; DISK_FAULTS=all tries every call, which takes hours.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from harness import Process, nexum_server, running
from nexum_wire import DEADLINE, complete, connected, poll, record
from old_database import make_old_database

from nexum_engine.store import check_database
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="this machine has no strace to inject faults")

FAULTS = os.environ.get("DISK_FAULTS") or "1"
CALLS = ("pwrite64", "fdatasync") if FAULTS == "1" else ("pwrite64", "fdatasync", "fsync", "ftruncate")
"""The system calls that write and sync the file and its log, replace the file by a compact one, and empty the log."""
T = TypeVar("T")
KINDS = {"killed": "signal=SIGKILL", "full": "error=ENOSPC", "broken": "error=EIO"}
ONE = '{"nodes": {"a": {"type": "EFFECT"}}}'
ALL = json.dumps(
    {
        "nodes": {
            "a": {"type": "EFFECT"},
            "rest": {"type": "TIMER", "delay_seconds": 0.02, "dependencies": ["a"]},
            "boss": {"type": "HUMAN_APPROVAL", "dependencies": ["rest"]},
        }
    }
)


@dataclass
class Told:
    """The requests that the test made, and what the server has acknowledged."""

    started: dict[str, str] = field(default_factory=dict)
    """For each key: the id of its execution."""
    completed: dict[str, str] = field(default_factory=dict)
    """For each execution: the acknowledged output of node `a`."""
    cancelled: set[str] = field(default_factory=set)
    timed: set[str] = field(default_factory=set)
    """Executions whose record showed that the timer had ended."""
    approved: set[str] = field(default_factory=set)
    outputs: dict[str, str] = field(default_factory=dict)
    """For each execution: the output that was reported for node `a`, acknowledged or not."""
    prune_asked: bool = False
    pruned: bool = False


@contextmanager
def faulty_server(folder: Path, inject: str = "") -> Iterator[Process]:
    """Run a server under strace, which logs system calls to `folder`/calls and injects a fault into one of them.

    strace is not the server's parent, so the yielded process is the server itself.
    """
    arguments = ["-D", "-f", "-qq", "-o", str(folder / "calls"), "-e", f"trace={','.join(CALLS)}"]
    if inject:
        arguments += ["-e", f"inject={inject}"]
    if "signal=" not in inject:
        # Let strace stop the server only at these system calls, which takes half of the time. strace 6.1 doesn't send
        # signals then.
        arguments += ["--seccomp-bpf"]
    program = ["-m", "nexum_engine", "--listen", "127.0.0.1:0", "--database-url", f"sqlite:///{folder / 'nexum.db'}"]
    with running([*arguments, sys.executable, *program], cwd=folder, program="strace") as process:
        yield process


def attempt(call: Callable[..., T], request: object) -> T | None:
    """Return the server's answer, or None if the server did not acknowledge the call."""
    try:
        return call(request, timeout=DEADLINE)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.INTERNAL:
            raise
        return None


def work(stub: NexumServiceStub, told: Told) -> None:
    """Start executions, complete tasks, await timers, approve, cancel and prune. Note what the server acknowledges."""
    for name, ir in (("one", ONE), ("all", ALL)):
        workflow = pb.WorkflowIR(workflow_id=name, version_hash=name, ir_json=ir)
        if attempt(stub.RegisterWorkflow, workflow) is None:
            return
    for name in ("one", "all"):
        for number in range(3):
            key = f"{name}-{number}"
            start = pb.StartRequest(
                workflow_id=name, version_hash=name, input_json=json.dumps(key), idempotency_key=key
            )
            if (started := attempt(stub.StartExecution, start)) is not None:
                told.started[key] = started.execution_id
    for version in ("one", "all"):
        for _ in range(2):
            task = attempt(stub.PollTask, pb.PollRequest(worker_id="worker", version_hash=version))
            if task is None or not task.has_task:
                continue
            told.outputs[task.execution_id] = json.dumps("y" * 6000 + task.execution_id)
            done = pb.CompleteRequest(task_id=task.task_id, output_json=told.outputs[task.execution_id])
            if attempt(stub.CompleteTask, done) is not None:
                told.completed[task.execution_id] = done.output_json
    of_all = {execution_id for key, execution_id in told.started.items() if key.startswith("all")}
    for execution_id in sorted(of_all & told.completed.keys()):
        request = pb.GetExecutionRequest(execution_id=execution_id)
        # The timer has ended when the node after it waits for a person.
        while (found := attempt(stub.GetExecution, request)) is not None and found.nodes[2].status == "PENDING":
            time.sleep(0.01)
        if found is not None:
            told.timed.add(execution_id)
        decision = pb.ApproveRequest(execution_id=execution_id, node_id="boss", approver="Ann")
        if attempt(stub.ApproveTask, decision) is not None:
            told.approved.add(execution_id)
    last = told.started.get("one-2", "")
    if last and attempt(stub.CancelExecution, pb.CancelRequest(execution_id=last)) is not None:
        told.cancelled.add(last)
    told.prune_asked = True
    told.pruned = attempt(stub.Prune, pb.PruneRequest(older_than_ms=0)) is not None


def check(folder: Path, told: Told) -> None:
    """Check that a new server has everything that was acknowledged. Then check the database file."""
    with nexum_server(folder) as server, connected(server.address) as stub:
        for key, execution_id in told.started.items():
            try:
                one = record(stub, execution_id)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                may_be_pruned = execution_id in told.completed or execution_id in told.cancelled | told.approved
                assert told.prune_asked, f"{key} is lost"
                assert may_be_pruned or execution_id in told.outputs, f"{key} had not ended, and is lost"
                continue
            nodes = {node.node_id: node for node in one.nodes}
            assert json.loads(one.input_json) == key
            if execution_id in told.completed:
                assert nodes["a"].output_json == told.completed[execution_id]
            elif nodes["a"].status == "COMPLETED":  # carried out, but not acknowledged
                assert nodes["a"].output_json == told.outputs[execution_id]
            if execution_id in told.timed:
                assert nodes["rest"].status == "COMPLETED"
            if execution_id in told.approved:
                assert nodes["boss"].status == one.status == "COMPLETED"
            if execution_id in told.cancelled:
                assert one.status == "CANCELLED"
            is_ended = one.status in ("COMPLETED", "CANCELLED")
            assert not (told.pruned and is_ended and execution_id in told.completed and len(nodes) == 1), "not pruned"
        # A database that survived must also accept changes: run another workflow to its end.
        request = pb.WorkflowIR(workflow_id="after", version_hash="after", ir_json=ONE)
        stub.RegisterWorkflow(request, timeout=DEADLINE)
        begin = pb.StartRequest(workflow_id="after", version_hash="after", input_json="1", idempotency_key="after")
        execution_id = stub.StartExecution(begin, timeout=DEADLINE).execution_id
        complete(stub, poll(stub, version="after"), '"done"')
        assert record(stub, execution_id).status == "COMPLETED"
    checked = check_database(folder / "nexum.db")
    assert checked.findings == ()


def counts(folder: Path) -> dict[str, int]:
    """Return, for each system call, its highest count in one thread: strace numbers each thread's calls separately."""
    found: dict[tuple[str, str], int] = defaultdict(int)
    for line in (folder / "calls").read_text(encoding="utf-8", errors="replace").splitlines():
        if match := re.match(r"(\d+)\s+(\w+)\(", line):
            found[match[1], match[2]] += 1
    return {call: max((n for (_, name), n in found.items() if name == call), default=0) for call in CALLS}


def chosen(total: int, offset: float) -> list[int]:
    """Return the numbers of the calls to disturb, spread evenly from the first to the last. `offset` is below 1."""
    if FAULTS == "all" or int(FAULTS) >= total:
        return list(range(1, total + 1))
    return [2 + int((number + offset) * (total - 2) / int(FAULTS)) for number in range(int(FAULTS))]


def disturbed(folder: Path, inject: str, told: Told) -> bool:
    """Run the work on a server with a fault. Return whether the fault fired."""
    with faulty_server(folder, inject) as server:
        try:
            address = server.wait_for_address()
        except AssertionError:
            assert "Traceback" not in server.output, server.output
        else:
            try:
                with connected(address) as stub:
                    work(stub, told)
            except grpc.FutureTimeoutError:
                assert server.popen.poll() is not None
        server.terminate()
        server.wait()
        assert "Traceback" not in server.output, server.output
    log = (folder / "calls").read_text(encoding="utf-8", errors="replace")
    return "(INJECTED)" in log or "killed by SIGKILL" in log


@pytest.fixture(scope="module", params=["new", "migrated"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[str, int]]:
    """Run the work without a fault. Return whether its database is migrated, and how often each system call is made."""
    is_migrated, folder, told = request.param == "migrated", tmp_path_factory.mktemp("undisturbed"), Told()
    if is_migrated:
        make_old_database(folder / "nexum.db")
    assert not disturbed(folder, "", told)
    assert len(told.started) == 6
    assert len(told.approved) == 2
    assert told.pruned
    check(folder, told)
    return is_migrated, counts(folder)


@pytest.mark.timeout(100_000)
@pytest.mark.parametrize("kind", KINDS)
def test_acknowledged_changes_survive_a_failing_disk(
    tmp_path: Path, undisturbed: tuple[bool, dict[str, int]], kind: str
) -> None:
    is_migrated, totals = undisturbed
    for position, call in enumerate(CALLS):
        assert totals[call] > 0
        # The migration of an old database makes the first system calls of a run. So disturb these calls, too.
        for number in chosen(totals[call], 0 if is_migrated else (position + 1) / (len(CALLS) + 1)):
            folder, told = tmp_path / f"{call}-{number}", Told()
            folder.mkdir()
            if is_migrated:
                make_old_database(folder / "nexum.db")
            fired = disturbed(folder, f"{call}:{KINDS[kind]}:when={number}", told)
            # This run may make slightly fewer system calls than the undisturbed run, because its timing differs.
            assert fired or number > totals[call] - 4, f"{call} {number} of {totals[call]} was not disturbed"
            check(folder, told)
