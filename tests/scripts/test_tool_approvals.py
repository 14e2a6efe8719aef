"""Tools in workers that a person has to approve: a question outlives every process, and a decision is for one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Process, nexum_server
from policies import asked_in, decide, paid, parking_run, policy_caller, policy_worker, results
from processes import run_script
from server_thread import ServerThread

from nexum_engine.approvals import approval_workflow
from nexum_engine.client import NexumClient
from nexum_engine.owner import Owner
from nexum_engine.workflow import Workflow, workflow
from support.approvals import Question
from workflow import OFFLINE_TOOL_CALL, TOOL_CALL, ToolCallInput

LARGE = 990


def questions(caller: Process, count: int) -> dict[int, str]:
    """Wait until the caller has asked about `count` payments; return each question's execution id, by its cents."""
    lines = [caller.wait_for("waiting for a decision on") for _ in range(count)]
    return {shown_in(line)["cents"]: asked_in(line) for line in lines}


def shown_in(line: str) -> dict[str, Any]:
    """Return the arguments that the line about a question shows."""
    shown: dict[str, Any] = json.loads(line[line.index("{") : line.index("}") + 1])
    return shown


def test_decision_that_was_made_while_nothing_ran_counts_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    call = ("pay_once_approved", {"log": str(log), "cents": LARGE})
    with (
        nexum_server(tmp_path) as server,
        policy_worker(tmp_path, server.address) as worker,
        policy_caller(tmp_path, server.address, call) as asking,
    ):
        line = asking.wait_for("waiting for a decision on")
        for process in (asking, worker, server.process):
            process.kill()
    assert shown_in(line) == {"log": str(log), "cents": LARGE, "to": "c-17"}
    assert paid(log) == []
    decision = ["approve", asked_in(line), "--by", "ann", "--database-url", harness.url_of(tmp_path)]
    assert run_script(["-m", "nexum_engine", *decision], tmp_path, forked=True)[0] == 0
    with nexum_server(tmp_path) as server, policy_worker(tmp_path, server.address):
        for _ in range(2):
            with policy_caller(tmp_path, server.address, call) as again:
                assert results(again) == [f"receipt for {LARGE}"]
    assert [(one["cents"], one["to"]) for one in paid(log)] == [(LARGE, "c-17")]


def test_each_call_gets_its_own_decision_also_in_a_second_run(tmp_path: Path, server: ServerThread) -> None:
    log = tmp_path / "log"
    approved, rejected, edited, badly_edited, small = 500, 501, 502, 503, 100
    cents = (approved, rejected, edited, badly_edited, small)
    calls = [("pay", {"log": str(log), "cents": one}) for one in cents] + [("pay_soon", {"log": str(log)})]
    with policy_worker(tmp_path, server.address):
        with policy_caller(tmp_path, server.address, *calls) as asking:
            asked = questions(asking, len(cents) - 1)
            answers = {edited: {"log": str(log), "cents": "7"}, badly_edited: {"cents": "many"}}
            for one in (approved, edited, badly_edited):
                answer = answers.get(one)
                decide(server.address, "approve", asked[one], "approval", approver="ann", answer=answer)
            decide(server.address, "reject", asked[rejected], "approval", approver="ann", reason="too much")
            first = results(asking)
        for file in tmp_path.glob(".session-*.json"):
            file.unlink()
        with policy_caller(tmp_path, server.address, *calls) as again:
            assert results(again) == first
    assert first[0] == f"receipt for {approved}"
    assert first[1] == "ERROR ann rejected this call: too much"
    changed = json.dumps({"log": str(log), "cents": 7, "to": "c-17"})
    assert first[2] == f"(ann changed the arguments to {changed})\nreceipt for 7"
    assert "pay was called with wrong arguments: log is missing; cents: " in first[3]
    assert first[4] == f"receipt for {small}"
    assert first[5] == "ERROR this call was not approved: not decided within 0.3 s"
    assert sorted(one["cents"] for one in paid(log)) == [7, small, approved]


def test_durable_run_parks_while_a_workers_tool_waits_for_an_approval(tmp_path: Path, server: ServerThread) -> None:
    log = tmp_path / "log"
    call = ("pay", {"log": str(log), "cents": LARGE})
    with policy_worker(tmp_path, server.address):
        for _ in range(2):  # before the decision, each run parks
            with parking_run(tmp_path, server.address, call) as parked:
                line = parked.wait_for("session s is parked, run it again after the decision: waiting for a decision")
                assert parked.wait() == 75
        assert paid(log) == []
        decide(server.address, "approve", asked_in(line), "approval", approver="ann")
        with parking_run(tmp_path, server.address, call) as resumed:
            assert resumed.wait_for("RESULT") == f"RESULT receipt for {LARGE}"
            assert resumed.wait() == 0
    assert len(paid(log)) == 1


@pytest.mark.parametrize("asks_first", [True, False])
def test_once_tool_runs_once_if_its_approval_changes_and_the_session_file_is_lost(
    tmp_path: Path, server: ServerThread, monkeypatch: pytest.MonkeyPatch, asks_first: bool
) -> None:
    log = tmp_path / "log"
    call = ("pay_once_or_ask", {"log": str(log), "cents": LARGE})
    for asks in (asks_first, not asks_first):
        if asks:
            monkeypatch.delenv("PAY_FREELY", raising=False)
        else:
            monkeypatch.setenv("PAY_FREELY", "1")
        with (
            policy_worker(tmp_path, server.address),
            policy_caller(tmp_path, server.address, call) as caller,
        ):
            if asks and asks_first:
                asked = asked_in(caller.wait_for("waiting for a decision on"))
                decide(server.address, "approve", asked, "approval", approver="ann")
            assert results(caller) == [f"receipt for {LARGE}"]
        for file in tmp_path.glob(".session-*.json"):
            file.unlink()
    assert len(paid(log)) == 1


# ---- A call that skips the question ----------------------------------------------------------------------------------


class Attack:
    """A program that submits a payment to the worker, and itself chooses which execution it names as the approval."""

    def __init__(self, client: NexumClient, session_id: str, log: Path) -> None:
        self.client = client
        self.session_id = session_id
        self.log = log
        self.arguments = {"log": str(log), "cents": LARGE, "to": "c-17"}
        self.question = Question.about("pay", self.arguments, session_id, TOOL_CALL.workflow_id)
        self.key = self.question.key("1")

    async def ask(self, question: Question, key: str, asked: Workflow | None = None) -> str:
        asked = asked or approval_workflow()
        await self.client.register_workflow(asked)
        return (await self.client.start_execution(asked, question, idempotency_key=key)).execution_id

    async def approved(self, question: Question, key: str) -> str:
        execution_id = await self.ask(question, key)
        await self.client.approve(execution_id, "approval", approver="ann")
        return execution_id

    async def submitted(self, approval: str, key: str = "", workflow: Workflow = TOOL_CALL, **changes: Any) -> str:
        """Submit the call; return why it failed, or "" if it completed."""
        call = ToolCallInput(tool_name="pay", tool_args={**self.arguments, **changes}, approval=approval)
        started = await self.client.start_execution(workflow, call, idempotency_key=key or self.key)
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


async def replayed_approval_in_another_workflow(attack: Attack) -> str:
    execution_id = await attack.approved(attack.question, attack.key)
    return await attack.submitted(execution_id, workflow=OFFLINE_TOOL_CALL)


async def approval_of_another_session(attack: Attack) -> str:
    other = Question.about("pay", attack.arguments, "another-session", TOOL_CALL.workflow_id)
    return await attack.submitted(await attack.approved(other, other.key("1")))


async def question_that_names_another_session(attack: Attack) -> str:
    other = Question.about("pay", attack.arguments, "another-session", TOOL_CALL.workflow_id)
    return await attack.submitted(await attack.approved(other, attack.key))


async def other_arguments(attack: Attack) -> str:
    return await attack.submitted(await attack.approved(attack.question, attack.key), cents=99_000)


async def another_tool(attack: Attack) -> str:
    other = Question.about("web_search", attack.arguments, attack.session_id, TOOL_CALL.workflow_id)
    return await attack.submitted(await attack.approved(other, attack.key))


async def digest_of_other_arguments(attack: Attack) -> str:
    lie = attack.question.model_copy(update={"digest": "0" * 64})
    return await attack.submitted(await attack.approved(lie, attack.key))


async def approval_without_a_person(attack: Attack) -> str:
    forged = workflow("tool-approval", input=Question).effect("approval").build()
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
    replayed_approval_in_another_workflow: "is for another call",
    approval_of_another_session: "is for another call",
    question_that_names_another_session: "is for another call",
    other_arguments: "is about another tool or other arguments",
    another_tool: "is about another tool or other arguments",
    digest_of_other_arguments: "is about another tool or other arguments",
    approval_without_a_person: "asks no person",
}


async def test_worker_refuses_a_call_unless_a_person_approved_it(tmp_path: Path, server: ServerThread) -> None:
    with policy_worker(tmp_path, server.address):
        async with NexumClient(server.address) as client:
            for attempt, reason in ATTEMPTS.items():
                attack = Attack(client, attempt.__name__, tmp_path / attempt.__name__)
                error = await attempt(attack)
                assert reason in error, (attempt.__name__, error)
                assert (error == "") == (reason == ""), (attempt.__name__, error)
                assert len(paid(attack.log)) == (0 if reason else 1), attempt.__name__
