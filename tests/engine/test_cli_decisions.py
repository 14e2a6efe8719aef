"""`nexum approvals`, `approve`, `reject`, `unknown`, `resolve` and `send`, and what `show` says of nodes that wait."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import nexum_server
from nexum_wire import DEADLINE, complete, connected, poll, start, status
from processes import Command, InProcess
from server_thread import server_thread

from nexum_engine.__main__ import main
from nexum_engine.client import NexumClient
from nexum_engine.errors import ServerUnavailable
from nexum_engine.store import waits
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

NODES = {
    "each": {"type": "MAP"},
    "boss": {"type": "HUMAN_APPROVAL"},
    "paid": {"type": "EVENT", "event": "payment", "timeout_seconds": 3600},
}


@pytest.fixture
def stub(address: str) -> Iterator[NexumServiceStub]:
    with connected(address) as connection:
        register(connection)
        yield connection


def register(stub: NexumServiceStub, nodes: object = NODES) -> None:
    request = pb.WorkflowIR(workflow_id="w", version_hash="v1", ir_json=json.dumps({"nodes": nodes}))
    stub.RegisterWorkflow(request, timeout=DEADLINE)


def start_unknown(stub: NexumServiceStub, input_json: str = "{}") -> str:
    """Start an execution whose only effect becomes unknown."""
    register(stub, {"pay": {"type": "EFFECT", "effect": "once"}})
    execution_id = start(stub, input_json)
    request = pb.FailRequest(task_id=poll(stub).task_id, error_message="the bank did not answer", unknown=True)
    stub.FailTask(request, timeout=DEADLINE)
    return execution_id


def of(nexum: Command, *where: str) -> Command:
    """Return the command `nexum` with the option that says which server or database it asks."""

    def run(*arguments: str) -> tuple[int, str]:
        code, output = nexum(*arguments, *where)
        assert code or max(map(len, output.splitlines())) <= 80, output
        return code, output

    return run


@pytest.fixture
def terminal(address: str, nexum: Command) -> Command:
    return of(nexum, "--nexum", address)


def test_person_approves_and_sends_events_in_a_terminal(terminal: Command, stub: NexumServiceStub) -> None:
    execution_id = start(stub)
    code, output = terminal("approvals")
    first, second = output.splitlines()
    assert (code, first, second.startswith("    of w, began to wait ")) == (0, f"{execution_id} boss", True)
    code, output = terminal("approvals", "--json")
    assert (json.loads(output)[0]["node_id"], code) == ("boss", 0)
    complete(stub, poll(stub), "[1, 2, 3]")
    complete(stub, poll(stub))
    code, output = terminal("show", execution_id)
    assert "  items    3: 1 COMPLETED, 2 RUNNING" in output.replace("2 RUNNING, 1 COMPLETED", "1 COMPLETED, 2 RUNNING")
    assert "node boss (HUMAN_APPROVAL) WAITING" in output
    assert "  waits    until " in output
    arguments = ("approve", execution_id, "boss", "--by", "Ann", "--comment", "fine")
    assert terminal(*arguments) == (0, f"boss of {execution_id} is approved")
    assert terminal(*arguments) == (0, "already done: Ann approved boss 0 s ago")
    assert terminal("approvals") == (0, "nothing waits for approval")
    for _ in range(2):
        sent = ("send", execution_id, "payment", '{"cents": 5}', "--key", "k1")
        assert terminal(*sent) == (0, f"sent payment to {execution_id}")
    outputs = status(stub, execution_id)[1]
    assert outputs["boss"].pop("decided_ms") > 0
    assert outputs == {"boss": {"approved": True, "approver": "Ann", "comment": "fine"}, "paid": {"cents": 5}}


def test_approvals_show_the_whole_call_and_the_answer_is_stored(address: str, terminal: Command) -> None:
    call = {
        "session": "order-7",
        "tool": "charge",
        "arguments": {"cents": 990, "note": f"two  spaces {'x' * 2000}\u202e"},
        "reason": "",
        "digest": "ab" * 32,
    }
    with connected(address) as stub:
        register(stub, {"approval": {"type": "HUMAN_APPROVAL", "timeout_seconds": 3600}})
        execution_id = start(stub, json.dumps(call))
        code, output = terminal("approvals")
        shown = "".join(line[15:] for line in output.splitlines()[4:] if line.startswith(("    arguments", " " * 15)))
        assert shown == json.dumps(call["arguments"])  # whole, with its spaces, and with the control character escaped
        assert "    tool       charge" in output.splitlines()
        assert "reason" not in output
        assert f"    digest     {'ab' * 32}" in output.splitlines()
        answer = ("approve", execution_id, "--by", "Ann", "--args", '{"cents": 5}')
        assert terminal(*answer) == (0, f"approval of {execution_id} is approved")
        assert status(stub, execution_id)[1]["approval"]["answer"] == {"cents": 5}
    code, output = terminal("show", execution_id)
    assert code == 0
    assert "  decided 1  COMPLETED" in output
    assert "             by Ann" in output.splitlines()


@pytest.mark.parametrize(("command", "status_after"), [("approve", "COMPLETED"), ("reject", "FAILED")])
def test_all_calls_of_a_session_are_decided_together(
    address: str, terminal: Command, command: str, status_after: str
) -> None:
    with connected(address) as stub:
        register(stub, {"approval": {"type": "HUMAN_APPROVAL"}})
        asked = [
            start(stub, json.dumps({"session": session, about: "x" * size}))
            for session, about, size in (
                ("s", "tool", 1),
                ("other", "tool", 1),
                ("s", "tool", 200_000),
                ("s", "budget", 1),
            )
        ]
        code, output = terminal(command, "--session", "s")
        done = {"approve": "approved", "reject": "rejected"}[command]
        assert (code, output) == (0, "\n".join(f"approval of {one} is {done}" for one in (asked[0], asked[2])))
        assert [status(stub, one)[0] for one in asked] == [status_after, "RUNNING", status_after, "RUNNING"]
        assert terminal(command, "--session", "s") == (1, "error: no call of session s waits for approval")


MORE = "(only the 2 that have waited the longest are listed)"


def test_list_of_approvals_says_that_more_nodes_wait(
    terminal: Command, stub: NexumServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "MAX_WAITING", 2)
    start(stub)
    assert MORE not in terminal("approvals")[1]
    start(stub)
    assert terminal("approvals")[1].endswith(f"\n{MORE}")
    listed, _, note = terminal("approvals", "--json")[1].rpartition("\n")
    assert (len(json.loads(listed)), note) == (2, MORE)
    start(stub, json.dumps({"session": "s", "tool": "charge"}))
    code, output = terminal("approve", "--session", "s")
    assert (code, output) == (1, f"error: no call of session s waits for approval {MORE}")


def test_list_of_unknown_effects_says_that_more_nodes_wait(
    address: str, terminal: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "MAX_WAITING", 2)
    with connected(address) as stub:
        for n in range(2):
            start_unknown(stub, json.dumps(n))
    assert terminal("unknown")[1].endswith(f"\n{MORE}")
    assert terminal("unknown", "--json")[1].endswith(f"]\n{MORE}")


def test_decision_about_a_session_continues_after_a_refusal(
    address: str, terminal: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    approve = NexumClient.approve

    async def after_another_person(
        client: NexumClient, execution_id: str, node_id: str, *, approver: str, comment: str, answer: object
    ) -> None:
        if execution_id == asked[1]:
            await client.reject(execution_id, node_id, approver="Bob", reason="")
        await approve(client, execution_id, node_id, approver=approver, comment=comment, answer=answer)

    with connected(address) as stub:
        register(stub, {"approval": {"type": "HUMAN_APPROVAL"}})
        asked = [start(stub, json.dumps({"session": "s", "tool": f"charge {n}"})) for n in range(3)]
        monkeypatch.setattr(NexumClient, "approve", after_another_person)
        code, output = terminal("approve", "--session", "s")
        assert code == 1
        *done, refused = output.splitlines()
        assert done == [f"approval of {one} is approved" for one in (asked[0], asked[2])]
        assert refused.startswith(f"error: approval of {asked[1]} is not approved: ")
        assert [status(stub, one)[0] for one in asked] == ["COMPLETED", "FAILED", "COMPLETED"]


def test_rejection_stays_on_record_after_a_retry(address: str, terminal: Command) -> None:
    with connected(address) as stub:
        register(stub, {"boss": {"type": "HUMAN_APPROVAL"}})
        execution_id = start(stub)
    rejected = ("reject", execution_id, "--by", "Bob", "--reason", "too much")
    assert terminal(*rejected) == (0, f"boss of {execution_id} is rejected")
    for _ in range(2):
        lines = terminal("show", execution_id)[1].splitlines()
        decision = next(number for number, line in enumerate(lines) if line.startswith("  decided 1  FAILED"))
        assert lines[decision + 1 : decision + 3] == ["             by Bob", "             too much"]
        terminal("retry", execution_id)
    assert terminal("approve", execution_id, "--by", "Ann")[0] == 0
    lines = terminal("show", execution_id)[1].splitlines()
    assert [line[:20] for line in lines if line.startswith("  decided")] == [
        "  decided 1  FAILED ",
        "  decided 2  COMPLET",
    ]


@pytest.mark.parametrize("uses_server", [True, pytest.param(False, marks=pytest.mark.sqlite)])
def test_person_resolves_an_unknown_effect(tmp_path: Path, uses_server: bool, nexum: Command) -> None:
    with nexum_server(tmp_path) as server, connected(server.address) as stub:
        execution_id, other, third = start_unknown(stub, '{"tool": "charge"}'), start_unknown(stub), start_unknown(stub)
        if uses_server:
            resolve(of(nexum, "--nexum", server.address), execution_id, other, third)
    if not uses_server:
        resolve(of(nexum, "--database-url", f"sqlite:///{tmp_path / 'nexum.db'}"), execution_id, other, third)


def resolve(terminal: Command, execution_id: str, other: str, third: str) -> None:
    code, output = terminal("resolve", third, "--result", "null", "--attempt", "3")
    assert (code, "attempt 3 is over, and now attempt 1 is in doubt" in output) == (1, True)
    assert terminal("resolve", third, "--result", "null", "--attempt", "1") == (0, f"pay of {third} is COMPLETED")
    code, output = terminal("unknown")
    lines = output.splitlines()
    assert (code, lines[0], lines[2]) == (0, f"{execution_id} pay", "    tool       charge")
    assert lines[5:7] == ["    heartbeat  none", "               the bank did not answer"]
    code, output = terminal("unknown", "--json")
    assert [(one["execution_id"], one["attempt"]) for one in json.loads(output)] == [(execution_id, 1), (other, 1)]
    code, output = terminal("show", execution_id)
    assert "  waits    for a person: its effect is UNKNOWN (nexum resolve)" in output.splitlines()
    arguments = ("resolve", execution_id, "--result", '{"receipt": 7}', "--by", "Ann")
    assert terminal(*arguments) == (0, f"pay of {execution_id} is COMPLETED")
    assert terminal(*arguments) == (0, "already done: Ann resolved pay 0 s ago")
    code, output = terminal("resolve", execution_id, "--result", '{"receipt": 8}', "--by", "Bob")
    assert (code, "its effect: it is COMPLETED; Ann resolved pay 0 s ago" in output) == (1, True)
    code, output = terminal("show", execution_id)
    assert "  decided 2  COMPLETED" in output
    assert '  output   {"receipt":7}' in output.splitlines()
    assert terminal("resolve", other, "--failed", "by hand", "--by", "Bob")[0] == 0
    assert "error      pay: by hand" in terminal("show", other)[1].splitlines()
    assert terminal("unknown") == (0, "no effect is unknown")


def test_node_must_be_named_if_several_wait(address: str, terminal: Command) -> None:
    with connected(address) as stub:
        register(stub, {"a": {"type": "HUMAN_APPROVAL"}, "b": {"type": "HUMAN_APPROVAL"}})
        execution_id = start(stub)
    code, output = terminal("approve", execution_id)
    assert (code, output) == (1, f"error: several nodes of execution {execution_id} wait: name one of a, b")
    assert terminal("approve", execution_id, "a", "--by", "Ann")[0] == 0
    # Without a name, this may be the first command again, whose answer was lost.
    code, output = terminal("approve", execution_id)
    assert (code, output) == (1, "error: Ann approved a 0 s ago. Now b waits: name the node, if you mean b")
    assert terminal("approve", execution_id, "b") == (0, f"b of {execution_id} is approved")


def test_repeated_decision_names_the_one_that_counts(address: str, terminal: Command) -> None:
    with connected(address) as stub:
        register(stub, {"boss": {"type": "HUMAN_APPROVAL"}})
        approved, rejected, retried = start(stub), start(stub), start(stub)
        assert terminal("approve", approved, "--by", "Ann", "--args", "1")[0] == 0
        assert terminal("reject", rejected, "boss", "--by", "Ann", "--reason", "no")[0] == 0
        for node in ([], ["boss"]):
            done = "already done: Ann approved boss 0 s ago"
            assert terminal("approve", approved, *node, "--by", "Bob", "--args", "1") == (0, done)
            done = "already done: Ann rejected boss 0 s ago: no"
            assert terminal("reject", rejected, *node, "--by", "Bob") == (0, done)
            for other in (["reject", approved], ["approve", approved], ["approve", approved, "--args", "true"]):
                code, output = terminal(*other[:2], *node, *other[2:])
                assert (code, output.endswith("; Ann approved boss 0 s ago")) == (1, True)
            code, output = terminal("approve", rejected, *node)
            assert (code, output.endswith("; Ann rejected boss 0 s ago: no")) == (1, True)
        for command, after in (("reject", 0), ("retry", 0), ("reject", 0), ("reject", 0), ("retry", 0), ("approve", 0)):
            assert terminal(command, retried)[0] == after
        assert status(stub, retried)[0] == "COMPLETED"


def test_repeated_decision_about_an_effect_is_about_its_attempt(
    address: str, terminal: Command, nexum: Command
) -> None:
    with connected(address) as stub:
        execution_id, failed = start_unknown(stub), start_unknown(stub)
        assert terminal("resolve", failed, "--failed", "by hand", "--by", "Ann")[0] == 0
        done = "already done: Ann resolved pay 0 s ago: by hand"
        assert terminal("resolve", failed, "--failed", "by hand", "--by", "Bob") == (0, done)
        for other in (["--not-done"], ["--result", "1"], ["--failed", "by hand", "--attempt", "2"]):
            code, output = terminal("resolve", failed, *other)
            assert (code, output.endswith("; Ann resolved pay 0 s ago: by hand")) == (1, True)
        not_done = ("resolve", execution_id, "pay", "--not-done", "--attempt", "1", "--by", "Ann")
        assert nexum(*not_done, "--nexum", address)[0] == 0
        assert terminal(*not_done) == (0, "already done: Ann resolved pay 0 s ago: the effect has not happened")
        code, output = terminal("resolve", execution_id, "--failed", "by hand")
        assert (code, output.endswith("; Ann resolved pay 0 s ago: the effect has not happened")) == (1, True)
        request = pb.FailRequest(task_id=poll(stub).task_id, error_message="no answer again", unknown=True)
        stub.FailTask(request, timeout=DEADLINE)
        code, output = terminal(*not_done)
        assert (code, "now attempt 3 is in doubt" in output) == (1, True)


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("method", "command", "said"),
    [
        ("approve", ["approve"], "already done: Ann approved boss 0 s ago"),
        ("reject", ["reject"], "already done: Ann rejected boss 0 s ago"),
        ("resolve", ["resolve", "--result", "1"], "already done: Ann resolved pay 0 s ago"),
        ("cancel_execution", ["cancel"], "already done: {} was cancelled by Ann 0 s ago"),
        ("retry_execution", ["retry"], "{} is RUNNING: there is nothing to retry"),
    ],
    ids=["approve", "reject", "resolve", "cancel", "retry"],
)
def test_command_succeeds_although_the_server_ends_before_it_answers(
    tmp_path: Path,
    in_process: InProcess,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    command: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'nexum.db'}")
    on_server = getattr(NexumClient, method)
    with ExitStack() as stack:
        server = stack.enter_context(server_thread(tmp_path))
        with connected(server.address) as stub:
            if method == "resolve":
                execution_id = start_unknown(stub)
            else:
                register(stub, {"boss": {"type": "HUMAN_APPROVAL"}})
                execution_id = start(stub)
            if method == "retry_execution":
                stub.RejectTask(pb.RejectRequest(execution_id=execution_id, node_id="boss"), timeout=DEADLINE)

        async def answer_is_lost(*args: Any, **options: Any) -> None:
            await on_server(*args, **options)
            stack.close()
            raise ServerUnavailable("the server ended before it answered")

        monkeypatch.setattr(NexumClient, method, answer_is_lost)
        by = [] if method == "retry_execution" else ["--by", "Ann"]
        assert in_process(main, *command, execution_id, *by) == (0, said.format(execution_id))


@pytest.mark.sqlite
def test_person_rejects_without_a_server(tmp_path: Path, nexum: Command) -> None:
    with nexum_server(tmp_path) as server, connected(server.address) as stub:
        register(stub)
        execution_id = start(stub)
    terminal = of(nexum, "--database-url", f"sqlite:///{tmp_path / 'nexum.db'}")
    code, output = terminal("approvals")
    assert (code, output.splitlines()[0]) == (0, f"{execution_id} boss")
    code, output = terminal("reject", execution_id, "boss", "--by", "Bob", "--reason", "too much")
    assert (code, output) == (0, f"boss of {execution_id} is rejected")
    code, output = terminal("show", execution_id)
    assert "error      boss: rejected by Bob: too much" in output


@pytest.mark.sqlite
def test_event_counts_once_although_the_server_ends_before_it_answers(
    tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'nexum.db'}")
    first = {"type": "EVENT", "event": "payment"}
    sent, send_event = [], NexumClient.send_event
    with ExitStack() as stack:
        server = stack.enter_context(server_thread(tmp_path))
        with connected(server.address) as stub:
            register(stub, {"first": first, "second": {**first, "dependencies": ["first"]}})
            execution_id = start(stub)

        async def send_and_end(*args: Any, **options: Any) -> None:
            await send_event(*args, **options)
            sent.append(args)
            stack.close()
            raise ServerUnavailable("the server ended before it answered")

        monkeypatch.setattr(NexumClient, "send_event", send_and_end)
        assert in_process(main, "send", execution_id, "payment") == (0, f"sent payment to {execution_id}")
    assert len(sent) == 1
    _, output = in_process(main, "show", execution_id, "--json")
    nodes = json.loads(output)["nodes"]
    assert {node["node_id"]: node["status"] for node in nodes} == {"first": "COMPLETED", "second": "WAITING"}


def test_error_of_a_lost_answer_has_the_key_of_the_event(
    address: str, terminal: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(address) as stub:
        register(stub, {"first": {"type": "EVENT", "event": "e"}, "second": {"type": "EVENT", "event": "e"}})
        execution_id, send_event = start(stub), NexumClient.send_event

    async def answer_is_lost(*args: Any, **options: Any) -> None:
        await send_event(*args, **options)
        raise ServerUnavailable("the server ended before it answered")

    with monkeypatch.context() as patched:
        patched.setattr(NexumClient, "send_event", answer_is_lost)
        code, output = terminal("send", execution_id, "e", "1")
        assert terminal("send", execution_id, "e", "1", "--key", "mine")[1].endswith("ended before it answered")
    before, _, rest = output.partition(". To send the event again, give it the key ")
    assert (code, before) == (2, "error: the server ended before it answered")
    key = rest.partition(" (--key)")[0]
    for again in (key, "mine"):
        assert terminal("send", execution_id, "e", "1", "--key", again) == (0, f"sent e to {execution_id}")
    with connected(address) as stub:
        assert status(stub, execution_id)[:2] == ("COMPLETED", {"first": 1, "second": 1})


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["approve", "exec-unknown", "boss"], 1, "no execution 'exec-unknown'"),
        (["send", "exec-unknown", "e"], 1, "no execution 'exec-unknown'"),
        (["send", "exec-unknown", "e", "not json"], 2, "a text needs quotes"),
        (["approve", "exec-unknown"], 1, "no execution 'exec-unknown'"),
        (["resolve", "exec-unknown", "--not-done"], 1, "no execution 'exec-unknown'"),
        (["resolve", "exec-unknown"], 2, "one of the arguments --result --not-done --failed is required"),
        (["resolve", "exec-unknown", "a", "--result", "1", "--not-done"], 2, "not allowed with argument --result"),
        (["resolve", "exec-unknown", "a", "--failed", ""], 1, "failed needs a reason"),
        (["reject"], 1, "give either an EXECUTION or --session"),
        (["approve", "exec-1", "--session", "s"], 1, "give either an EXECUTION or --session"),
        (["approve", "exec-unknown", "--args", "null"], 2, "the answer can't be null"),
        (["approve", "--session", "s", "--args", "{}"], 1, "--args are the arguments of one call"),
    ],
)
def test_wrong_decision_is_one_line(terminal: Command, arguments: list[str], code: int, said: str) -> None:
    ended, output = terminal(*arguments)
    assert (ended, "Traceback" in output) == (code, False)
    assert said in output.splitlines()[-1]
