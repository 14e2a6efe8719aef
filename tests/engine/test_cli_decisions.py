"""`nexum approvals`, `approve`, `reject` and `send`, and what `show` says of waiting nodes and started executions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Server, nexum_server
from nexum_wire import DEADLINE, complete, connected, poll, start, status
from processes import run_script

from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

NODES = {
    "each": {"type": "MAP"},
    "boss": {"type": "HUMAN_APPROVAL"},
    "paid": {"type": "EVENT", "event": "payment", "timeout_seconds": 3600},
}


@pytest.fixture
def stub(server: Server) -> Iterator[NexumServiceStub]:
    with connected(server.address) as connection:
        register(connection)
        yield connection


def register(stub: NexumServiceStub) -> None:
    request = pb.WorkflowIR(workflow_id="w", version_hash="v1", ir_json=json.dumps({"nodes": NODES}))
    stub.RegisterWorkflow(request, timeout=DEADLINE)


def nexum(folder: Path, *arguments: str, server: Server | None = None) -> tuple[int, str]:
    where = [] if server is None else ["--nexum", server.address]
    code, output = run_script(["-m", "nexum_engine", *arguments, *where], folder, {})
    assert code or max(map(len, output.splitlines())) <= 80, output
    return code, output


def test_person_approves_and_sends_events_in_a_terminal(tmp_path: Path, server: Server, stub: NexumServiceStub) -> None:
    execution_id = start(stub)
    code, output = nexum(tmp_path, "approvals", server=server)
    first, second = output.splitlines()
    assert (code, first, second.startswith("    of w, began to wait ")) == (0, f"{execution_id} boss", True)
    code, output = nexum(tmp_path, "approvals", "--json", server=server)
    assert (json.loads(output)[0]["node_id"], code) == ("boss", 0)
    complete(stub, poll(stub), "[1, 2, 3]")
    complete(stub, poll(stub))
    code, output = nexum(tmp_path, "show", execution_id, server=server)
    assert "  items    3: 1 COMPLETED, 2 RUNNING" in output.replace("2 RUNNING, 1 COMPLETED", "1 COMPLETED, 2 RUNNING")
    assert "node boss (HUMAN_APPROVAL) WAITING" in output
    assert "  waits    until " in output
    arguments = ("approve", execution_id, "boss", "--by", "Ann", "--comment", "fine")
    assert nexum(tmp_path, *arguments, server=server) == (0, f"boss of {execution_id} is approved")
    code, output = nexum(tmp_path, *arguments, server=server)
    assert (code, "it is COMPLETED" in output, len(output.splitlines())) == (1, True, 1)
    assert nexum(tmp_path, "approvals", server=server) == (0, "nothing waits for approval")
    for _ in range(2):
        sent = ("send", execution_id, "payment", '{"cents": 5}', "--key", "k1")
        assert nexum(tmp_path, *sent, server=server) == (0, f"sent payment to {execution_id}")
    outputs = status(stub, execution_id)[1]
    assert outputs["boss"].pop("decided_ms") > 0
    assert outputs == {"boss": {"approved": True, "approver": "Ann", "comment": "fine"}, "paid": {"cents": 5}}


@pytest.mark.sqlite
def test_person_rejects_without_a_server(tmp_path: Path) -> None:
    with nexum_server(tmp_path) as server, connected(server.address) as stub:
        register(stub)
        execution_id = start(stub)
    url = ["--database-url", f"sqlite:///{tmp_path / 'nexum.db'}"]
    code, output = nexum(tmp_path, "approvals", *url)
    assert (code, output.splitlines()[0]) == (0, f"{execution_id} boss")
    code, output = nexum(tmp_path, "reject", execution_id, "boss", "--by", "Bob", "--reason", "too much", *url)
    assert (code, output) == (0, f"boss of {execution_id} is rejected")
    code, output = nexum(tmp_path, "show", execution_id, *url)
    assert "error      boss: rejected by Bob: too much" in output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["approve", "exec-unknown", "boss"], 1, "no execution 'exec-unknown'"),
        (["send", "exec-unknown", "e"], 1, "no execution 'exec-unknown'"),
        (["send", "exec-unknown", "e", "not json"], 2, "a text needs quotes"),
        (["approve", "exec-unknown"], 2, "NODE"),
        (["reject"], 2, "EXECUTION"),
    ],
)
def test_wrong_decision_is_one_line(tmp_path: Path, server: Server, arguments: list[str], code: int, said: str) -> None:
    ended, output = run_script(["-m", "nexum_engine", *arguments, "--nexum", server.address], tmp_path, {})
    assert (ended, "Traceback" in output) == (code, False)
    assert said in output.splitlines()[-1]
