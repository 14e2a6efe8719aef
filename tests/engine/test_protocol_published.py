"""The twelve published RPCs, as a client without this project's additions uses them."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness import free_port, nexum_server, running
from nexum_wire import (
    DEADLINE,
    UNLIMITED,
    complete,
    connected,
    output,
    poll,
    record,
    refused,
    register,
    say_large,
    start,
    status,
)
from server_thread import ServerThread

from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

Code = grpc.StatusCode
INTERNALS = re.compile(
    r"sqlite|SELECT|INSERT|Traceback|File \"|\.py\b|/home|/root|/tmp|object at 0x|asyncio", re.IGNORECASE
)


@pytest.fixture
def stub(server: ServerThread) -> Iterator[NexumServiceStub]:
    with connected(server.address) as connection:
        yield connection


# ---- The published behaviour -----------------------------------------------------------------------------------------


def test_execution_runs_from_registration_to_outputs(stub: NexumServiceStub) -> None:
    assert register(stub, {"a": [], "b": ["a"]}) == "NEW"
    execution_id = start(stub, '{"q": "é"}')
    first = poll(stub)
    assert (first.node_id, first.node_type, first.execution_id) == ("a", "EFFECT", execution_id)
    assert json.loads(first.input_json) == {"input": {"q": "é"}, "deps": {}}
    assert first.idempotency_key
    assert status(stub, execution_id) == ("RUNNING", {})
    complete(stub, first, '{"n": 1}')
    assert status(stub, execution_id) == ("RUNNING", {"a": {"n": 1}})
    second = poll(stub)
    assert json.loads(second.input_json) == {"input": {"q": "é"}, "deps": {"a": {"n": 1}}}
    complete(stub, second, '"done"')
    assert status(stub, execution_id) == ("COMPLETED", {"a": {"n": 1}, "b": "done"})
    assert not poll(stub).has_task


def test_poll_without_wait_answers_at_once(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    for version in ("v1", "never registered"):
        began = time.monotonic()
        assert not poll(stub, version=version).has_task
        assert time.monotonic() - began < 1


def test_equal_second_completion_is_acknowledged_and_different_one_refused(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    task = poll(stub)
    complete(stub, task, '{"x": 1, "y": 2}')
    complete(stub, task, '{"y":2,"x":1}')
    code, words = refused(lambda: complete(stub, task, '{"x": 2}'))
    assert code is Code.FAILED_PRECONDITION
    assert execution_id in words
    assert status(stub, execution_id)[1] == {"a": {"x": 1, "y": 2}}


def test_completion_without_an_output_is_recorded_as_null(stub: NexumServiceStub) -> None:
    register(stub, {"a": [], "b": ["a"]})
    execution_id = start(stub)
    first = poll(stub)
    complete(stub, first, "")
    complete(stub, first, "")
    second = poll(stub)
    assert json.loads(second.input_json)["deps"] == {"a": None}
    complete(stub, second, "")
    assert status(stub, execution_id) == ("COMPLETED", {"a": None, "b": None})


def test_failing_task_has_four_attempts(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    keys = set()
    for attempt in range(1, 5):
        task = poll(stub, wait_ms=20_000)
        keys.add(task.idempotency_key)
        assert task.attempt == attempt
        stub.FailTask(pb.FailRequest(task_id=task.task_id, error_message=f"no {attempt}"), timeout=DEADLINE)
    assert len(keys) == 1
    assert status(stub, execution_id)[0] == "FAILED"
    assert record(stub, execution_id).error == "a: no 4 (attempt 4 of 4)"


def test_compatibility_uses_the_published_words(stub: NexumServiceStub) -> None:
    assert register(stub, {"a": []}) == "NEW"
    assert register(stub, {"a": []}) == "IDENTICAL"
    assert register(stub, {"a": [], "b": ["a"]}, version="v2") == "SAFE"
    assert register(stub, {"b": []}, version="v3") == "BREAKING"
    start(stub, version="v2")
    answer = stub.ListWorkflowVersions(pb.ListVersionsRequest(workflow_id="w"), timeout=DEADLINE)
    assert [(one.version_hash, one.compatibility, one.active_executions) for one in answer.versions] == [
        ("v3", "BREAKING", 0),
        ("v2", "SAFE", 1),
        ("v1", "NEW", 0),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", one.registered_at) for one in answer.versions)


def test_executions_are_listed_newest_first_and_twenty_by_default(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    ids = [start(stub) for _ in range(25)]
    stub.CancelExecution(pb.CancelRequest(execution_id=ids[3]), timeout=DEADLINE)

    def listed(**filters: object) -> list[str]:
        request = pb.ListRequest(**filters)  # type: ignore[arg-type]
        return [one.execution_id for one in stub.ListExecutions(request, timeout=DEADLINE).executions]

    assert listed() == ids[:4:-1]
    assert listed(limit=-1) == ids[:4:-1]
    assert listed(limit=100) == ids[::-1]
    assert listed(limit=2) == ids[:-3:-1]
    assert listed(status="CANCELLED") == [ids[3]]
    assert listed(workflow_id="nowhere") == []
    one = stub.ListExecutions(pb.ListRequest(limit=1), timeout=DEADLINE).executions[0]
    assert (one.workflow_id, one.version_hash, one.status) == ("w", "v1", "RUNNING")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", one.created_at)


def test_cancelled_execution_refuses_results_and_accepts_second_cancel(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    task = poll(stub)
    for _ in range(2):
        assert stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=DEADLINE).ok
    code, words = refused(lambda: complete(stub, task))
    assert (code, "CANCELLED" in words) == (Code.FAILED_PRECONDITION, True)
    assert status(stub, execution_id) == ("CANCELLED", {})


def test_other_nodes_can_not_be_approved(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    assert list(stub.GetPendingApprovals(pb.EmptyRequest(), timeout=DEADLINE).items) == []
    for call, request in (
        (stub.ApproveTask, pb.ApproveRequest(execution_id=execution_id, node_id="a")),
        (stub.RejectTask, pb.RejectRequest(execution_id=execution_id, node_id="a")),
    ):
        code, words = refused(lambda call=call, request=request: call(request, timeout=DEADLINE))  # type: ignore[misc]
        assert code is Code.NOT_FOUND
        assert "is of type EFFECT: it does not wait for an approval" in words


def test_task_is_polled_by_version_also_after_server_is_killed(tmp_path: Path) -> None:
    with nexum_server(tmp_path) as first, connected(first.address) as before:
        register(before, {"a": [], "b": ["a"]}, version="sha256:abc")
        execution_id = start(before, version="sha256:abc")
        complete(before, poll(before, version="sha256:abc"), '"recorded"')
        first.process.kill()
    with nexum_server(tmp_path) as second, connected(second.address) as after:
        task = poll(after, version="sha256:abc")
        assert (task.execution_id, task.node_id) == (execution_id, "b")
        complete(after, task)
        assert status(after, execution_id) == ("COMPLETED", {"a": "recorded", "b": 1})


# ---- Bad input -------------------------------------------------------------------------------------------------------

LONG = "x" * 100_000
BAD: dict[str, tuple[Callable[[NexumServiceStub], object], grpc.StatusCode, str]] = {
    "no workflow id": (lambda s: register(s, {"a": []}, workflow_id=""), Code.INVALID_ARGUMENT, "workflow_id is empty"),
    "no version": (lambda s: register(s, {"a": []}, version=""), Code.INVALID_ARGUMENT, "version_hash is empty"),
    "a long id": (lambda s: register(s, {"a": []}, workflow_id=LONG), Code.INVALID_ARGUMENT, "the limit is 200"),
    "an IR that is not JSON": (lambda s: _register_ir(s, "{"), Code.INVALID_ARGUMENT, "ir_json is not valid JSON"),
    "an IR with NaN": (lambda s: _register_ir(s, '{"nodes":{"a":NaN}}'), Code.INVALID_ARGUMENT, "not valid JSON"),
    "an IR too deep": (lambda s: _register_ir(s, "[" * 100_000), Code.INVALID_ARGUMENT, "recursion limit"),
    "an IR without nodes": (lambda s: register(s, {}), Code.INVALID_ARGUMENT, "no nodes"),
    "a cycle": (lambda s: register(s, {"a": ["b"], "b": ["a"]}), Code.INVALID_ARGUMENT, "cycle"),
    "a long cycle": (
        lambda s: register(s, {f"{n}{'n' * 190}": [f"{(n + 1) % 900}{'n' * 190}"] for n in range(900)}),
        Code.INVALID_ARGUMENT,
        "cycle",
    ),
    "an unknown dependency": (lambda s: register(s, {"a": ["z"]}), Code.INVALID_ARGUMENT, "'z', which is not a node"),
    "a long unknown dependency": (lambda s: register(s, {"a": [LONG]}), Code.INVALID_ARGUMENT, "depends on"),
    "a type that is not run": (
        lambda s: _register_ir(s, '{"nodes":{"a":{"type":"SLEEP"}}}'),
        Code.INVALID_ARGUMENT,
        "node 'a' is of type 'SLEEP'",
    ),
    "another definition": (lambda s: register(s, {"b": []}), Code.FAILED_PRECONDITION, "needs a new version_hash"),
    "an unknown workflow": (lambda s: start(s, workflow_id="nowhere"), Code.NOT_FOUND, "'nowhere' is not registered"),
    "an unknown version": (lambda s: start(s, version="v9"), Code.NOT_FOUND, "version 'v9'"),
    "an empty workflow id": (lambda s: start(s, workflow_id=""), Code.INVALID_ARGUMENT, "workflow_id is empty"),
    "an empty version": (lambda s: start(s, version=""), Code.INVALID_ARGUMENT, "version_hash is empty"),
    "an input that is not JSON": (lambda s: start(s, "{"), Code.INVALID_ARGUMENT, "input_json is not valid JSON"),
    "an input with NaN": (lambda s: start(s, '{"x": NaN}'), Code.INVALID_ARGUMENT, "input_json is not valid JSON"),
    "an input too deep": (lambda s: start(s, "[" * 100_000 + "]" * 100_000), Code.INVALID_ARGUMENT, "recursion limit"),
    "a number too long": (lambda s: start(s, "9" * 10_000), Code.INVALID_ARGUMENT, "out of range"),
    "a key with a newline": (lambda s: start(s, idempotency_key="a\nb"), Code.INVALID_ARGUMENT, "unprintable"),
    "a negative wait at the start": (lambda s: start(s, wait_ms=-1), Code.INVALID_ARGUMENT, "wait_ms"),
    "a poll by nobody": (lambda s: poll(s, ""), Code.INVALID_ARGUMENT, "worker_id is empty"),
    "a poll for nothing": (lambda s: poll(s, version=""), Code.INVALID_ARGUMENT, "version_hash is empty"),
    "a negative wait": (lambda s: poll(s, wait_ms=-1), Code.INVALID_ARGUMENT, "wait_ms"),
    "a negative size": (lambda s: poll(s, max_task_bytes=-1), Code.INVALID_ARGUMENT, "max_task_bytes"),
    "a result of no task": (lambda s: complete(s, pb.PollResponse()), Code.INVALID_ARGUMENT, "task_id is empty"),
    "a result of an unknown task": (
        lambda s: complete(s, pb.PollResponse(task_id="task-x")),
        Code.NOT_FOUND,
        "no task 'task-x'",
    ),
    "a failure of an unknown task": (
        lambda s: s.FailTask(pb.FailRequest(task_id="task-x"), timeout=DEADLINE),
        Code.NOT_FOUND,
        "no task 'task-x'",
    ),
    "the status of nothing": (lambda s: status(s, ""), Code.INVALID_ARGUMENT, "execution_id is empty"),
    "the status of an unknown execution": (lambda s: status(s, "exec-x"), Code.NOT_FOUND, "no execution 'exec-x'"),
    "an unknown execution": (lambda s: record(s, "exec-x"), Code.NOT_FOUND, "no execution 'exec-x'"),
    "waiting for an unknown execution": (lambda s: record(s, "exec-x", wait_ms=9000), Code.NOT_FOUND, "'exec-x'"),
    "a negative wait for an end": (lambda s: record(s, "exec-x", wait_ms=-1), Code.INVALID_ARGUMENT, "wait_ms"),
    "cancelling an unknown execution": (
        lambda s: s.CancelExecution(pb.CancelRequest(execution_id="exec-x"), timeout=DEADLINE),
        Code.NOT_FOUND,
        "no execution 'exec-x'",
    ),
    "cancelling nothing": (
        lambda s: s.CancelExecution(pb.CancelRequest(), timeout=DEADLINE),
        Code.INVALID_ARGUMENT,
        "execution_id is empty",
    ),
    "a status that there is not": (
        lambda s: s.ListExecutions(pb.ListRequest(status=LONG), timeout=DEADLINE),
        Code.INVALID_ARGUMENT,
        "status 'xxx",
    ),
    "the versions of nothing": (
        lambda s: s.ListWorkflowVersions(pb.ListVersionsRequest(), timeout=DEADLINE),
        Code.INVALID_ARGUMENT,
        "workflow_id is empty",
    ),
    "approving what is unknown": (
        lambda s: s.ApproveTask(pb.ApproveRequest(execution_id="exec-x", node_id="a"), timeout=DEADLINE),
        Code.NOT_FOUND,
        "no execution 'exec-x'",
    ),
}


def _register_ir(stub: NexumServiceStub, ir_json: str) -> None:
    stub.RegisterWorkflow(pb.WorkflowIR(workflow_id="w2", version_hash="v1", ir_json=ir_json), timeout=DEADLINE)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NexumServiceStub]:
    """Yield a stub of one server for all refused requests: each request must leave the server unchanged."""
    with nexum_server(tmp_path_factory.mktemp("refusals")) as running, connected(running.address) as connection:
        register(connection, {"a": []})
        yield connection


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line_and_not_stored(shared: NexumServiceStub, name: str) -> None:
    call, expected, words = BAD[name]
    code, said = refused(lambda: call(shared))
    assert (code, words in said) == (expected, True), said
    assert len(said) < 1000
    assert "\n" not in said
    assert not INTERNALS.search(said)
    assert list(shared.ListExecutions(pb.ListRequest(), timeout=DEADLINE).executions) == []
    assert list(shared.ListWorkflowVersions(pb.ListVersionsRequest(workflow_id="w2"), timeout=DEADLINE).versions) == []


def test_bytes_that_are_not_utf8_are_refused(server: ServerThread, stub: NexumServiceStub) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call: Any = channel.unary_unary("/nexum.NexumService/StartExecution")
        for raw in (b"\x0a\x02\xff\xfe", b"\xff" * 50):
            refused(lambda raw=raw: call(raw, timeout=DEADLINE))  # type: ignore[misc]
        unknown: Any = channel.unary_unary("/nexum.NexumService/NoSuchCall")
        code, _ = refused(lambda: unknown(b"", timeout=DEADLINE))
        assert code is Code.UNIMPLEMENTED
    assert register(stub, {"a": []}) == "NEW"


def test_server_fault_is_answered_with_only_its_log_id(tmp_path: Path) -> None:
    program = (
        "import runpy\nfrom nexum_engine.store import executions\n"
        "def broken(*_, **__): raise RuntimeError('SELECT secret FROM /tmp/nexum.db')\n"
        "executions.workflow_versions = broken\n"
        "runpy.run_module('nexum_engine', run_name='__main__', alter_sys=True)"
    )
    address = f"127.0.0.1:{free_port()}"
    command = ["-c", program, "--listen", address, "--database-url", f"sqlite:///{tmp_path / 'nexum.db'}"]
    with running(command, cwd=tmp_path) as server, ExitStack() as connection:
        server.wait_for("Nexum engine")
        stub = connection.enter_context(connected(address))
        request = pb.ListVersionsRequest(workflow_id="w")
        code, words = refused(lambda: stub.ListWorkflowVersions(request, timeout=DEADLINE))
        assert code is Code.INTERNAL
        found = re.fullmatch(r"the server had an internal error; see its log under ([0-9a-f]{8})", words)
        assert found, words
        assert register(stub, {"a": []}) == "NEW"
        server.terminate()
        assert server.wait() == 0
    assert f"fault {found[1]}" in server.output
    assert "SELECT secret" in server.output


# ---- Sizes -----------------------------------------------------------------------------------------------------------

MEGABYTE = 1024 * 1024


def text_of(size: int) -> str:
    """Return a JSON text of exactly this size."""
    return '"' + "x" * (size - 2) + '"'


def test_result_above_16_megabytes_is_refused(server: ServerThread, stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    task = poll(stub)
    with connected(server.address, UNLIMITED) as large:
        code, words = refused(lambda: complete(large, task, text_of(16 * MEGABYTE + 1)))
        assert (code, "the limit is 16,777,216 bytes" in words) == (Code.RESOURCE_EXHAUSTED, True)
        code, _ = refused(lambda: complete(large, task, text_of(40 * MEGABYTE)))
        assert code is Code.RESOURCE_EXHAUSTED
        complete(large, task, text_of(16 * MEGABYTE))
    assert output(stub, execution_id, "a") == text_of(16 * MEGABYTE)


def left_out(size: int) -> dict[str, Any]:
    return {"__nexum_claim_check__": True, "size": size, "rpc": "GetOutput"}


def test_default_client_reads_an_execution_with_large_outputs(server: ServerThread, stub: NexumServiceStub) -> None:
    sizes = {"a": 3 * MEGABYTE, "b": 2 * MEGABYTE, "c": MEGABYTE, "d": 5 * MEGABYTE, "é": 10, "f": MEGABYTE}
    register(stub, {name: [] for name in sizes})
    execution_id = start(stub, text_of(MEGABYTE))
    with connected(server.address, UNLIMITED) as large:
        for _ in range(5):
            task = poll(stub)
            complete(large, task, text_of(sizes[task.node_id]))
    reason = "é" * 4000
    stub.FailTask(pb.FailRequest(task_id=poll(stub).task_id, error_message=reason, final=True))
    answer = stub.GetStatus(pb.StatusRequest(execution_id=execution_id), timeout=DEADLINE)
    outputs, found = json.loads(answer.completed_nodes_json), record(stub, execution_id)
    assert (answer.status, found.status) == ("FAILED", "FAILED")
    assert reason in answer.error
    assert reason in found.error
    # To keep the answer below 4 MB, the server leaves out the largest outputs.
    last = next(node.node_id for node in found.nodes if node.status == "FAILED")
    fits, room = set(), 4 * MEGABYTE - 40_000
    for name, size in sorted([*sizes.items(), ("", MEGABYTE)], key=lambda one: one[1]):
        if name != last and (room := room - size) > 0:
            fits.add(name)
    assert {"c", "f", "é"} - {last} < fits
    for node in found.nodes:
        if node.node_id != last:
            size = sizes[node.node_id]
            whole = node.node_id in fits
            assert (len(node.output_json), node.output_bytes) == ((size, 0) if whole else (0, size))
            assert outputs[node.node_id] == ("x" * (size - 2) if whole else left_out(size))
            assert output(stub, execution_id, node.node_id, length=1_500_000) == text_of(size)
    assert last not in outputs
    assert (bool(found.input_json), found.input_bytes) == (("" in fits), 0 if "" in fits else MEGABYTE)


def test_get_status_answers_what_a_default_client_can_receive(stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    execution_id = start(stub)
    complete(stub, poll(stub), text_of(4 * MEGABYTE - 4300))
    assert len(status(stub, execution_id)[1]["a"]) == 4 * MEGABYTE - 4302


def test_size_of_an_answer_counts_node_names(stub: NexumServiceStub) -> None:
    """If the names didn't count, the client's gRPC would refuse the answer, with an error that gives no advice."""
    names = [f"{n}{'é' * 199}" for n in range(9)]
    register(stub, {name: [] for name in names})
    execution_id = start(stub)
    for size in (4 * MEGABYTE - 4300, *[10] * 8):
        complete(stub, poll(stub), text_of(size))
    found, outputs = status(stub, execution_id)
    assert (found, list(outputs.values()).count("x" * 8)) == ("COMPLETED", 8)
    assert left_out(4 * MEGABYTE - 4300) in outputs.values()
    assert [node.output_bytes for node in record(stub, execution_id).nodes if node.output_bytes] == [4_190_004]


@pytest.mark.parametrize(
    ("execution", "node", "offset", "code", "words"),
    [
        ("", "b", 0, Code.NOT_FOUND, "has no output of node 'b': the node has not completed"),
        ("", "z", 0, Code.NOT_FOUND, "has no output of node 'z': it has no such node"),
        ("exec-9", "a", 0, Code.NOT_FOUND, "no execution 'exec-9'"),
        ("", "a", -1, Code.INVALID_ARGUMENT, "offset and length can't be negative"),
    ],
)
def test_part_of_missing_output_is_refused(
    stub: NexumServiceStub, execution: str, node: str, offset: int, code: Code, words: str
) -> None:
    register(stub, {"a": [], "b": []})
    execution_id = start(stub)
    complete(stub, poll(stub), '"out"')
    request = pb.GetOutputRequest(execution_id=execution or execution_id, node_id=node, offset=offset)
    found = refused(lambda: stub.GetOutput(request, timeout=DEADLINE))
    assert (found[0], words in found[1]) == (code, True)
    past = stub.GetOutput(pb.GetOutputRequest(execution_id=execution_id, node_id="a", offset=99), timeout=DEADLINE)
    assert (past.data, past.total_bytes) == (b"", 5)


def test_input_that_no_worker_can_receive_is_refused(server: ServerThread, stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    with connected(server.address, UNLIMITED) as large:
        for worker in (None, "small"):
            if worker is not None:
                assert not poll(stub, worker).has_task
            code, words = refused(lambda: start(large, text_of(5 * MEGABYTE), idempotency_key="k"))
            assert code is Code.RESOURCE_EXHAUSTED
            assert "the input is 5,242,880 bytes, but no worker" in words
            assert "more than 4,190,144:" in words
        assert list(stub.ListExecutions(pb.ListRequest(), timeout=DEADLINE).executions) == []
        say_large(stub)
        execution_id = start(large, text_of(5 * MEGABYTE), idempotency_key="k")
        # The worker that takes large tasks doesn't poll now, as if it were busy. A large input is still accepted.
        assert start(large, text_of(5 * MEGABYTE), idempotency_key="k2") != execution_id


def test_large_input_is_accepted_after_restart(tmp_path: Path) -> None:
    with nexum_server(tmp_path) as server, connected(server.address, UNLIMITED) as stub:
        register(stub, {"a": []})
        say_large(stub)
        execution_id = start(stub, text_of(5 * MEGABYTE), idempotency_key="k")
    with nexum_server(tmp_path) as server, connected(server.address, UNLIMITED) as stub:
        assert start(stub, text_of(5 * MEGABYTE), idempotency_key="k") == execution_id
        assert start(stub, text_of(5 * MEGABYTE)) != execution_id


def test_task_too_large_for_default_client_waits_for_larger_one(server: ServerThread, stub: NexumServiceStub) -> None:
    register(stub, {"a": []})
    say_large(stub)
    with connected(server.address, UNLIMITED) as large:
        execution_id = start(large, text_of(5 * MEGABYTE))
        for wait_ms in (0, 300):
            assert not poll(stub, "small", wait_ms=wait_ms).has_task
        node = record(large, execution_id).nodes[0]
        assert node.status == "READY"
        assert "more than worker small can receive (4,190,208)" in node.error
        assert len(node.attempts) == 0
        task = poll(large, "large", max_task_bytes=16 * MEGABYTE)
        assert len(task.input_json) > 5 * MEGABYTE
        complete(large, task)
        assert record(large, execution_id).status == "COMPLETED"


def test_default_client_receives_its_largest_task(stub: NexumServiceStub) -> None:
    register(stub, {"a": []}, workflow_id="é" * 200, version="é" * 200)
    start(stub, text_of(4_190_208 - 64), workflow_id="é" * 200, version="é" * 200, idempotency_key="é" * 200)
    assert poll(stub, version="é" * 200).has_task


# ---- Concurrency -----------------------------------------------------------------------------------------------------


def test_fifty_pollers_get_each_of_200_tasks_once(server: ServerThread) -> None:
    tasks, pollers = 200, 50
    handed_out: list[tuple[str, str]] = []
    guard = threading.Lock()
    all_polling = threading.Barrier(pollers + 1)

    def work(number: int) -> None:
        with connected(server.address) as stub:
            all_polling.wait(DEADLINE)
            while len(handed_out) < tasks:
                task = poll(stub, f"w{number}", wait_ms=1000)
                if task.has_task:
                    with guard:
                        handed_out.append((task.execution_id, f"w{number}"))
                    complete(stub, task, json.dumps(f"w{number}"))

    with connected(server.address) as stub, ThreadPoolExecutor(pollers) as pool:
        register(stub, {"a": []})
        working = [pool.submit(work, number) for number in range(pollers)]
        all_polling.wait(DEADLINE)
        started = [start(stub, str(n)) for n in range(tasks)]
        for one in working:
            one.result(timeout=60)
        by_execution = dict(handed_out)
        assert sorted(execution_id for execution_id, _ in handed_out) == sorted(started)
        for execution_id in started:
            answer = record(stub, execution_id)
            assert answer.status == "COMPLETED"
            assert [one.worker_id for one in answer.nodes[0].attempts] == [by_execution[execution_id]]
            assert json.loads(answer.nodes[0].output_json) == by_execution[execution_id]
    served = {worker for _, worker in handed_out}
    # On a busy machine, a few threads may come too late for the last tasks.
    assert len(served) >= pollers * 3 // 4, f"{pollers - len(served)} pollers got nothing"
