"""Tools in workers that a person has to approve: a question outlives every process, and a decision is for one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Server, nexum_server
from policies import asked_in, decide, nexum, paid, policy_caller, policy_worker, result
from processes import recorded

from nexum_engine.approvals import Approval, approval_workflow
from nexum_engine.client import NexumClient
from nexum_engine.owner import Owner
from nexum_engine.workflow import Workflow, workflow
from workflow import TOOL_CALL, ToolCallInput

LARGE = 990


# ---- Deciding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["pay", "pay_once_approved"])
def test_decision_that_was_made_while_nothing_ran_counts_once(tmp_path: Path, tool: str) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    gate.touch()
    call = {"log": str(log), **({"cents": LARGE} if tool == "pay" else {"gate": str(gate)})}
    with (
        nexum_server(tmp_path) as server,
        policy_worker(tmp_path, server.address) as worker,
        policy_caller(tmp_path, server.address, tool, call) as asking,
    ):
        line = asking.wait_for("waits for a person")
        shown = json.loads(line[line.index("{") : line.index("}") + 1])
        for process in (asking, worker, server.process):
            process.kill()
    assert paid(log) == []
    nexum(tmp_path, "approve", asked_in(line), "--by", "ann", "--database-url", harness.url_of(tmp_path))
    with nexum_server(tmp_path) as server, policy_worker(tmp_path, server.address):
        texts = [result(tmp_path, server.address, tool, call) for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("RESULT receipt for")
    assert len(paid(log)) == 1
    if tool == "pay":
        assert shown == {"log": str(log), "cents": LARGE, "to": "c-17"}
        assert {name: paid(log)[0][name] for name in ("cents", "to")} == {"cents": LARGE, "to": "c-17"}


def test_rejected_call_fails_with_the_reason_and_has_no_effect(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    call = {"log": str(log), "cents": LARGE}
    with policy_worker(tmp_path, server.address):
        with policy_caller(tmp_path, server.address, "pay", call) as asking:
            question = asked_in(asking.wait_for("waits for a person"))
            decide(server.address, "reject", question, "approval", approver="ann", reason="too much")
            assert asking.wait_for("ERROR") == "ERROR ToolCallFailed ann rejected this call: too much"
        again = result(tmp_path, server.address, "pay", call)
    assert again == "ERROR ToolCallFailed ann rejected this call: too much"
    assert paid(log) == []


def test_call_runs_with_the_edited_arguments_and_the_model_is_told(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    call = {"log": str(log), "cents": LARGE}
    edited = {"log": str(log), "cents": "500"}
    with policy_worker(tmp_path, server.address):
        with policy_caller(tmp_path, server.address, "pay", call) as asking:
            question = asked_in(asking.wait_for("waits for a person"))
            decide(server.address, "approve", question, "approval", approver="ann", answer=edited)
            assert asking.wait() == 0, asking.output
        told = result(tmp_path, server.address, "pay", call)
    assert told in asking.output
    note, receipt = told.splitlines()
    assert note.startswith("RESULT ann approved this call with other arguments: ")
    assert '"cents": 500, "to": "c-17"} instead of {' in note
    assert receipt.startswith("receipt for")
    assert [(one["cents"], one["to"]) for one in paid(log)] == [(500, "c-17")]


def test_wrong_edited_arguments_fail_the_call_before_its_effect(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    call = {"log": str(log), "cents": LARGE}
    with policy_worker(tmp_path, server.address), policy_caller(tmp_path, server.address, "pay", call) as asking:
        question = asked_in(asking.wait_for("waits for a person"))
        decide(server.address, "approve", question, "approval", answer={"cents": "many"})
        error = asking.wait_for("ERROR")
    assert "pay was called with wrong arguments" in error
    assert paid(log) == []


def test_call_that_nobody_decides_in_time_fails(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    with policy_worker(tmp_path, server.address):
        text = result(tmp_path, server.address, "pay_soon", {"log": str(log)})
    assert "ERROR ToolCallFailed this call was not approved: not decided within 0.3 s" in text
    assert paid(log) == []


def test_call_below_the_limit_asks_nobody(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    with policy_worker(tmp_path, server.address):
        assert result(tmp_path, server.address, "pay", {"log": str(log), "cents": 100}).startswith("RESULT receipt")
    (execution,) = recorded(tmp_path, server.address)
    assert execution["workflow_id"] == "tool-call"
    assert len(paid(log)) == 1


def test_calls_of_one_session_are_decided_one_by_one(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    calls = [{"log": str(log), "cents": cents} for cents in (200, 300, 400)]
    with policy_worker(tmp_path, server.address), policy_caller(tmp_path, server.address, "pay", *calls) as asking:
        lines = [asking.wait_for("waits for a person") for _ in calls]
        by_cents = {json.loads(line[line.index("{") : line.index("}") + 1])["cents"]: asked_in(line) for line in lines}
        decide(server.address, "approve", by_cents[300], "approval")
        asking.wait_for("RESULT receipt for {'cents': 300")
        decide(server.address, "reject", by_cents[400], "approval", reason="no")
        asking.wait_for("ERROR")
        decide(server.address, "approve", by_cents[200], "approval")
        assert asking.wait() == 0, asking.output
    assert [one["cents"] for one in paid(log)] == [300, 200]


# ---- A call that skips the question ----------------------------------------------------------------------------------


class Attack:
    """A program that submits a payment to the worker without asking, with the id of some execution as its approval."""

    def __init__(self, client: NexumClient, session_id: str, log: Path) -> None:
        self.client = client
        self.session_id = session_id
        self.log = log
        self.arguments = {"log": str(log), "cents": LARGE, "to": "c-17"}
        self.question = Approval.of(session_id, "", "pay", self.arguments)
        self.key = self.question.key("1")

    async def ask(self, question: Approval, key: str, asked: Workflow | None = None) -> str:
        asked = asked or approval_workflow()
        await self.client.register_workflow(asked)
        return (await self.client.start_execution(asked, question, idempotency_key=key)).execution_id

    async def approved(self, question: Approval, key: str) -> str:
        execution_id = await self.ask(question, key)
        await self.client.approve(execution_id, "approval", approver="ann")
        return execution_id

    async def submitted(self, approval: str, key: str = "", **changes: Any) -> str:
        """Submit the call; return why it failed, or "" if it completed."""
        call = ToolCallInput(tool_name="pay", tool_args={**self.arguments, **changes}, approval=approval)
        started = await self.client.start_execution(TOOL_CALL, call, idempotency_key=key or self.key)
        ended = (await self.client.get_execution(started.execution_id, wait=20)).execution
        assert ended.status.ended
        return ended.error


async def with_approval(attack: Attack) -> str:
    return await attack.submitted(await attack.approved(attack.question, attack.key))


async def without_approval(attack: Attack) -> str:
    return await attack.submitted("")


async def unknown_approval(attack: Attack) -> str:
    return await attack.submitted("exec-999-x")


async def pending_approval(attack: Attack) -> str:
    return await attack.submitted(await attack.ask(attack.question, attack.key))


async def rejected_approval(attack: Attack) -> str:
    execution_id = await attack.ask(attack.question, attack.key)
    await attack.client.reject(execution_id, "approval", approver="ann", reason="no")
    return await attack.submitted(execution_id)


async def replayed_approval(attack: Attack) -> str:
    execution_id = await attack.approved(attack.question, attack.key)
    assert await attack.submitted(execution_id) == ""
    attack.log.unlink()
    return await attack.submitted(execution_id, attack.question.key("2"))


async def approval_of_another_session(attack: Attack) -> str:
    other = Approval.of("another-session", "", "pay", attack.arguments)
    return await attack.submitted(await attack.approved(other, other.key("1")))


async def other_arguments(attack: Attack) -> str:
    return await attack.submitted(await attack.approved(attack.question, attack.key), cents=99_000)


async def another_tool(attack: Attack) -> str:
    return await attack.submitted(
        await attack.approved(Approval.of(attack.session_id, "", "web_search", attack.arguments), attack.key)
    )


async def digest_of_other_arguments(attack: Attack) -> str:
    lie = attack.question.model_copy(update={"digest": "0" * 64})
    return await attack.submitted(await attack.approved(lie, attack.key))


async def approval_without_a_person(attack: Attack) -> str:
    forged = workflow("tool-approval", input=Approval).effect("approval").build()
    await attack.client.register_workflow(forged)
    async with Owner(attack.client) as owner:
        await owner.record(forged, attack.question, {"approved": True}, idempotency_key=attack.key)
    (execution,) = await attack.client.list_executions(workflow_id="tool-approval", key_prefix=attack.key)
    return await attack.submitted(execution.execution_id)


ATTEMPTS = {
    with_approval: "",
    without_approval: "nobody was asked",
    unknown_approval: "asks no such question",
    pending_approval: "is RUNNING",
    rejected_approval: "is FAILED",
    replayed_approval: "is for another call",
    approval_of_another_session: "is for another call",
    other_arguments: "is about another tool or other arguments",
    another_tool: "is about another tool or other arguments",
    digest_of_other_arguments: "is about another tool or other arguments",
    approval_without_a_person: "asks no person",
}


async def test_worker_refuses_a_call_unless_a_person_approved_it(tmp_path: Path, server: Server) -> None:
    with policy_worker(tmp_path, server.address):
        async with NexumClient(server.address) as client:
            for attempt, reason in ATTEMPTS.items():
                attack = Attack(client, attempt.__name__, tmp_path / attempt.__name__)
                error = await attempt(attack)
                assert reason in error, (attempt.__name__, error)
                assert (error == "") == (reason == ""), (attempt.__name__, error)
                assert len(paid(attack.log)) == (0 if reason else 1), attempt.__name__
