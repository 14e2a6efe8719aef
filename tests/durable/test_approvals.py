"""Approvals of tool calls: an approval outlives every process, and permits one call only."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import DiGraphBuilder, GraphFlow
from autogen_core import CancellationToken
from autogen_core.tools import FunctionTool
from durable_agents import QUESTION, TIMEOUT, HasAddress, Offline, Scripted, agent, answer, is_after_a_tool, run
from harness import Process, environment, free_port, nexum_server, running
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread, server_thread

from durable_autogen import (
    Budget,
    CallRejected,
    DurableSession,
    Parked,
    Policy,
    durable_tool,
    fork_session,
    list_sessions,
)
from durable_autogen.autogen.fingerprints import call_fingerprint
from durable_autogen.record.terminal import Terminal
from nexum_engine.approvals import NODE, Approval, approval_workflow, how_to_decide, key_of
from nexum_engine.client import PAGE, NexumClient
from nexum_engine.connection import Connection
from nexum_engine.errors import Conflict, InvalidRequest
from nexum_engine.policy import call_digest
from nexum_engine.records import DeclaredTool
from nexum_engine.workflow import RetryPolicy

PROGRAM = """
import asyncio, sys
from autogen_agentchat.agents import AssistantAgent
from support.models.live import LiveModel

def charge(cents: int, customer: str = "c-1") -> str:
    "Charge a customer."
    with open("ledger", "a") as ledger:
        ledger.write(f"{customer} {cents}\\n")
    return f"charged {customer} {cents}"

async def main():
    model = LiveModel(vendor="test", model="m", base_url=sys.argv[1], api_key="k")
    clerk = AssistantAgent("clerk", model, tools=[charge], max_tool_iterations=5)
    result = await clerk.run(task="Charge 20000.")
    print("ANSWER", result.messages[-1].to_text())

asyncio.run(main())
"""
FAST = RetryPolicy(max_attempts=3, first_delay_seconds=0.01)
POLICIES = '[charge]\napproval = "always"\n'


def clerk_model(*calls: dict[str, Any]) -> Callable[[dict[str, Any]], Reply]:
    """Return a model's reply function: it first requests these calls of `charge`, then repeats the tool results."""

    def reply(body: dict[str, Any]) -> Reply:
        if is_after_a_tool(body):
            return Reply(" | ".join(one["content"] for one in body["messages"] if one["role"] == "tool"))
        return Reply("It is due.", [("charge", one) for one in calls])

    return reply


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "policies.toml").write_text(POLICIES)
    return tmp_path


@contextmanager
def script(folder: Path, model: OpenAIServer, *options: str, address: str = "") -> Iterator[Process]:
    """Run the program under `durable_autogen run`."""
    server = ("--nexum", address) if address else ()
    command = ["-m", "durable_autogen", "run", "--session", "s", "--policies", "policies.toml", *server, *options]
    with running([*command, "program.py", model.base_url], cwd=folder, forked=True) as process:
        yield process
    assert "Traceback" not in process.output, process.output


def nexum(folder: Path, *arguments: str) -> str:
    """Run a command of the engine in the folder; return its output."""
    with running(["-m", "nexum_engine", *arguments], cwd=folder, forked=True) as process:
        assert process.wait() == 0, process.output
    return process.output


def asked_in(line: str) -> str:
    """Return the execution id from a line in which a run says that it waits for a decision."""
    found = re.search(r"approve (\S+?)[, ]", line)
    assert found is not None, line
    return found.group(1)


def ledger(folder: Path) -> list[str]:
    path = folder / "ledger"
    return path.read_text().splitlines() if path.exists() else []


def test_approval_given_while_every_process_is_dead_lets_the_call_run_once(folder: Path) -> None:
    url = f"sqlite:///{folder / 'nexum.db'}"
    with OpenAIServer(clerk_model({"cents": 20000})) as model:
        with nexum_server(folder, database_url=url) as server:
            servers = f"127.0.0.1:1,{server.address}"
            with script(folder, model, address=servers) as killed:
                line = killed.wait_for("waiting for a decision")
                assert 'charge({"cents": 20000, "customer": "c-1"}) of clerk' in line  # customer has its default
                assert f"--nexum {servers}" in line  # the present server may be gone when a person decides
                killed.kill()
            server.process.kill()
        execution = asked_in(line)
        shown = nexum(folder, "approvals", "--database-url", url)
        for part in (execution, "charge", "20000", "c-1", "clerk", "It is due."):
            assert part in shown
        nexum(folder, "approve", execution, "--by", "ann", "--database-url", url)
        assert ledger(folder) == []
        with nexum_server(folder, database_url=url) as server:
            for _ in range(2):
                with script(folder, model, address=server.address) as resumed:
                    assert resumed.wait_for("ANSWER") == "ANSWER charged c-1 20000"
                    assert resumed.wait() == 0
                    assert "waiting" not in resumed.output
    assert ledger(folder) == ["c-1 20000"]
    assert len(model.requests) == 2


def test_parked_run_exits_with_75_and_goes_on_after_the_decision(folder: Path) -> None:
    with OpenAIServer(clerk_model({"cents": 20000})) as model:
        for _ in range(2):  # before the decision, each run parks
            with script(folder, model, "--park") as parked:
                line = parked.wait_for("waiting for a decision on charge")
                assert parked.wait() == 75
                assert parked.lines[-1] == "[Nexum] session s is parked: run the same command again after the decision"
                assert parked.output.count("waiting for a decision") == 1
        with running(["-m", "durable_autogen", "ls"], cwd=folder, forked=True) as listing:
            assert asked_in(line) in listing.wait_for("waits for a decision on charge")
        nexum(folder, "approve", asked_in(line), "--args", '{"cents": 7}', "--by", "ann")
        with script(folder, model, "--park") as resumed:
            resumed.wait_for("ANSWER (ann changed the arguments to")
            assert resumed.wait() == 0
            assert resumed.lines[-2:-1] == ["charged c-1 7"]
    assert ledger(folder) == ["c-1 7"]


PROMPT = "[Nexum] approve it? Type yes, or no, or no and a reason, such as: no, too expensive\r\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_person_at_the_terminal_is_asked(folder: Path) -> None:
    command = ["-m", "durable_autogen", "run", "--session", "s", "--policies", "policies.toml", "--approve"]
    with (
        OpenAIServer(clerk_model({"cents": 1}, {"cents": 2})) as model,
        at_a_terminal(folder, *command, "program.py", model.base_url) as terminal,
    ):
        answers = {"1": b"yes\n", "2": b"no, one is enough\n"}
        while answers:  # the two calls are made at the same time: either question may come first
            # PROMPT ends with a line break, so that the next line of a log begins on its own line.
            shown = until(terminal, PROMPT)
            asked = re.findall(r'\[Nexum\] charge\(\{"cents": (\d), "customer": "c-1"\}\) of clerk', shown)
            assert "reason: It is due." in shown
            if len(answers) == 2:
                os.write(terminal, b"sure, do it\n")
                until(terminal, f"[Nexum] 'sure, do it' is neither yes nor no\r\n{PROMPT}")
            os.write(terminal, answers.pop(asked[-1]))
        assert re.search(r"ANSWER charged c-1 1 \| .*rejected this call: one is enough", until(terminal, None))
    assert ledger(folder) == ["c-1 1"]


async def test_answer_at_the_terminal_waits_for_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop, port, asked = Shop(approval="always"), free_port(), asyncio.Event()

    async def ask(*_: object) -> tuple[bool, str]:
        asked.set()
        first.process.kill()
        return True, ""

    monkeypatch.setattr(Terminal, "is_there", lambda: True)
    monkeypatch.setattr(Terminal, "ask", ask)
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        with nexum_server(tmp_path, port=port) as first:
            work = asyncio.create_task(run(first, shop.clerk(model), approve=True))
            await asyncio.wait_for(asked.wait(), TIMEOUT)
        with nexum_server(tmp_path, port=port):
            assert (await work).messages[-1].to_text() == "charged c-1 5"


# Two questions. The first one is decided elsewhere, and then a person types two lines: the first line is read, and the
# second one still waits in the terminal when the second question comes.
TWO_QUESTIONS = """
import asyncio, select, sys
from durable_autogen.record.terminal import Terminal

async def main():
    terminal = Terminal()
    asking = asyncio.create_task(terminal.ask("first?"))
    while terminal._reading is None:
        await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait({asking})
    print("decided elsewhere", flush=True)
    while not terminal._reading.done():
        await asyncio.sleep(0.01)
    print("read", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        await asyncio.sleep(0.01)
    print("ANSWER", await terminal.ask("second?"))

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_line_that_was_typed_before_a_question_does_not_answer_it(folder: Path) -> None:
    with at_a_terminal(folder, "-c", TWO_QUESTIONS) as terminal:
        until(terminal, "decided elsewhere")
        os.write(terminal, b"yes\n")
        until(terminal, "read\r\n")
        os.write(terminal, b"yes\n")
        until(terminal, f"second?\r\n{PROMPT}")
        os.write(terminal, b"no\n")
        assert "ANSWER (False, '')" in until(terminal, None)


@contextmanager
def at_a_terminal(folder: Path, *command: str) -> Iterator[int]:
    """Run a Python command at a pseudo-terminal, and check its exit code; yield the person's end of the terminal."""
    import pty

    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment(), stdin=its_end, stdout=its_end, stderr=its_end
    )
    os.close(its_end)
    try:
        yield terminal
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
        os.close(terminal)


def until(terminal: int, text: str | None) -> str:
    """Return what a terminal shows up to `text`; without `text`, until its programs have ended."""
    shown = ""
    while text is None or text not in shown:
        assert select.select([terminal], [], [], 30)[0], shown
        try:
            part = os.read(terminal, 65536).decode()
        except OSError:  # Linux: no program has the terminal open any more
            part = ""
        if not part:
            assert text is None, shown
            break
        shown += part
    return shown


# ---- Without processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    """A server in a thread: it starts faster than a process."""
    with server_thread(tmp_path) as running:
        yield running


class Shop:
    """A shop: the tool `charge`, and the list of its charges."""

    def __init__(self, **policy: Any) -> None:
        self.charged: list[str] = []
        self.tool = durable_tool(self.charge, **policy)

    def charge(self, cents: int, customer: str = "c-1") -> str:
        """Charge a customer."""
        self.charged.append(f"{customer} {cents}")
        return f"charged {customer} {cents}"

    def clerk(self, model: OpenAIServer, name: str = "clerk") -> Callable[[], AssistantAgent]:
        return lambda: agent(model, name, [self.tool])


class Deciders:
    """People who decide each pending question with `decide`, as soon as it is asked."""

    def __init__(self, server: HasAddress, decide: Callable[[NexumClient, str, dict[str, Any]], Any]) -> None:
        self.server = server
        self.decide = decide
        self.asked: list[dict[str, Any]] = []

    async def __aenter__(self) -> Deciders:
        self.working = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.working.cancel()
        await asyncio.gather(self.working, return_exceptions=True)

    async def work(self) -> None:
        async with NexumClient(self.server.address) as client:
            seen: set[str] = set()
            while True:
                for one in await client.pending_approvals():
                    if one.execution_id not in seen:
                        seen.add(one.execution_id)
                        question = json.loads(one.input_json)
                        self.asked.append(question)
                        await self.decide(client, one.execution_id, question)
                await asyncio.sleep(0.01)


async def approves(client: NexumClient, execution: str, _: dict[str, Any]) -> None:
    await client.approve(execution, NODE, approver="ann")


async def rejects(client: NexumClient, execution: str, _: dict[str, Any]) -> None:
    await client.reject(execution, NODE, approver="ann", reason="too much")


async def test_question_shows_the_call_and_its_digest(server: ServerThread) -> None:
    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        async with Deciders(server, approves) as people:
            assert (await run(server, shop.clerk(model))).messages[-1].to_text() == "charged c-1 5"
    arguments = {"cents": 5, "customer": "c-1"}
    assert people.asked == [
        {
            "session": "s",
            "agent": "clerk",
            "tool": "charge",
            "arguments": arguments,
            "reason": "It is due.",
            "digest": call_digest("charge", arguments),
        }
    ]


async def test_model_reads_the_reason_of_a_rejection_and_the_run_continues(server: ServerThread) -> None:
    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        async with Deciders(server, rejects) as people:
            for _ in range(2):
                result = await run(server, shop.clerk(model))
                assert result.messages[-1].to_text() == "ann rejected this call: too much"
    assert (shop.charged, len(people.asked), len(model.requests)) == ([], 1, 2)


async def test_waiting_run_continues_after_its_server_was_killed(tmp_path: Path) -> None:
    shop = Shop(approval="always")
    url, port = f"sqlite:///{tmp_path / 'nexum.db'}", free_port()
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        with nexum_server(tmp_path, database_url=url, port=port) as killed:
            waiting = asyncio.ensure_future(run(killed, shop.clerk(model)))
            async with NexumClient(killed.address) as client:
                while not await client.pending_approvals():  # noqa: ASYNC110 - nothing sets an event
                    await asyncio.sleep(0.01)
            killed.process.kill()
        with nexum_server(tmp_path, database_url=url, port=port) as restarted:
            async with Deciders(restarted, approves):
                assert (await waiting).messages[-1].to_text() == "charged c-1 5"
    assert shop.charged == ["c-1 5"]


async def test_rejection_of_a_call_of_the_program_raises(server: ServerThread) -> None:
    shop = Shop(approval="always")
    async with Deciders(server, rejects), DurableSession("s", nexum=server.address):
        with pytest.raises(CallRejected, match=r"^ann rejected this call: too much$"):
            await shop.tool.run_json({"cents": 5}, CancellationToken())
    assert shop.charged == []


async def test_function_of_the_arguments_chooses_the_calls_to_approve(server: ServerThread) -> None:
    shop = Shop(approval=lambda cents, **_: cents > 10)
    with OpenAIServer(clerk_model({"cents": 10}, {"cents": 11})) as model:
        async with Deciders(server, approves) as people:
            await run(server, shop.clerk(model))
    assert [one["arguments"]["cents"] for one in people.asked] == [11]
    assert sorted(shop.charged) == ["c-1 10", "c-1 11"]


async def test_told_call_can_not_deceive_its_reader(server: ServerThread) -> None:
    shop, lines = Shop(approval="always", approval_timeout=1), list[str]()
    customer = "c-1\u202e\x1b[2J" + "x" * 400
    with OpenAIServer(clerk_model({"cents": 5, "customer": customer})) as model:
        await run(server, shop.clerk(model), logs=lines)
    (line,) = (line for line in lines if line.startswith("waiting"))
    assert 'charge({"cents": 5, "customer": "c-1\\u202e\\u001b[2Jxx' in line
    assert "xxx... (cut) of clerk: " in line


async def test_told_rejection_has_no_control_characters(server: ServerThread) -> None:
    async def rejects_in_red(client: NexumClient, execution: str, _: dict[str, Any]) -> None:
        await client.reject(execution, NODE, approver="ann", reason="\x1b[31mno")

    shop, lines = Shop(approval="always"), list[str]()
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        async with Deciders(server, rejects_in_red):
            result = await run(server, shop.clerk(model), logs=lines)
    assert result.messages[-1].to_text() == "ann rejected this call: \x1b[31mno"
    assert [line for line in lines if line.endswith("of clerk: ann rejected this call: \\u001b[31mno")]


async def test_told_edit_has_no_control_characters(server: ServerThread) -> None:
    async def reverses(client: NexumClient, execution: str, _: dict[str, Any]) -> None:
        await client.approve(execution, NODE, approver="ann", answer={"cents": 5, "customer": "\u202ec-1"})

    shop, lines = Shop(approval="always"), list[str]()
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        async with Deciders(server, reverses):
            await run(server, shop.clerk(model), logs=lines)
    assert shop.charged == ["\u202ec-1 5"]
    assert [line for line in lines if '{"cents": 5, "customer": "\\u202ec-1"}' in line]
    assert not any("\u202e" in line for line in lines)


async def test_wrong_arguments_are_never_asked_for_and_never_run(server: ServerThread) -> None:
    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": "many"})) as model:
        result = await run(server, shop.clerk(model))
    assert "valid integer" in result.messages[-1].to_text()
    assert shop.charged == []


async def test_call_runs_with_edited_arguments_and_the_model_is_told(server: ServerThread) -> None:
    async def edits(client: NexumClient, execution: str, _: dict[str, Any]) -> None:
        await client.approve(execution, NODE, approver="ann", answer={"cents": 3})

    shop = Shop(approval="always", effect="once")
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        async with Deciders(server, edits):
            for _ in range(2):
                result = await run(server, shop.clerk(model))
                said = '(ann changed the arguments to {"cents": 3, "customer": "c-1"})\ncharged c-1 3'
                assert result.messages[-1].to_text() == said
    assert shop.charged == ["c-1 3"]


@pytest.mark.parametrize("arguments", [{"cents": "many"}, {}, "5", [5]])
async def test_wrong_edited_arguments_are_never_run(server: ServerThread, arguments: Any) -> None:
    async def edits(client: NexumClient, execution: str, _: dict[str, Any]) -> None:
        await client.approve(execution, NODE, approver="ann", answer=arguments)

    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        async with Deciders(server, edits):
            result = await run(server, shop.clerk(model))
    assert result.messages[-1].to_text().startswith("ann changed the arguments, but they don't fit charge: ")
    assert shop.charged == []


async def test_several_calls_of_one_reply_are_decided_one_by_one(server: ServerThread) -> None:
    questions: list[tuple[str, int]] = []

    async def decides(client: NexumClient, execution: str, question: dict[str, Any]) -> None:
        questions.append((execution, question["arguments"]["cents"]))
        if len(questions) == 3:
            for one, cents in reversed(questions):
                if cents == 2:
                    await client.reject(one, NODE, approver="ann", reason="not two")
                else:
                    await client.approve(one, NODE, approver="ann")

    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": 1}, {"cents": 2}, {"cents": 3})) as model:
        async with Deciders(server, decides):
            result = await run(server, shop.clerk(model))
    said = "charged c-1 1 | ann rejected this call: not two | charged c-1 3"
    assert result.messages[-1].to_text() == said
    assert sorted(shop.charged) == ["c-1 1", "c-1 3"]


async def test_decision_counts_for_one_call_of_one_session_only(server: ServerThread) -> None:
    """Each equal call needs its own decision: in the same reply, in another session and in a fork."""
    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": 5}, {"cents": 5})) as model:
        async with Deciders(server, approves) as people:
            await run(server, shop.clerk(model))
            assert len(people.asked) == 2
            await run(server, shop.clerk(model), session="other")
            assert len(people.asked) == 4
            async with NexumClient(server.address) as client:
                await fork_session(client, "s", 1, "fork")
            await run(server, shop.clerk(model), session="fork")
            assert [one["session"] for one in people.asked] == ["s", "s", "other", "other", "fork", "fork"]


async def test_question_that_nobody_decides_in_time_is_rejected(server: ServerThread) -> None:
    shop = Shop(approval="always", approval_timeout=0.3)
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        result = await run(server, shop.clerk(model))
    assert result.messages[-1].to_text() == "this call was not approved: not decided within 0.3 s"
    assert shop.charged == []


async def test_first_of_two_deciders_wins(server: ServerThread) -> None:
    refused = asyncio.Event()

    async def both(client: NexumClient, execution: str, _: dict[str, Any]) -> None:
        await client.reject(execution, NODE, approver="ann", reason="no")
        with pytest.raises(Conflict, match="can't be decided any more"):
            await client.approve(execution, NODE, approver="bob")
        refused.set()

    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        async with Deciders(server, both):
            result = await run(server, shop.clerk(model))
            await refused.wait()
    assert result.messages[-1].to_text() == "ann rejected this call: no"
    assert shop.charged == []


async def test_other_branches_of_a_graph_work_on_before_the_run_parks(server: ServerThread) -> None:
    shop = Shop(approval="always")

    def note() -> str:
        """Note."""
        return "noted"

    def reply(body: dict[str, Any]) -> Reply:
        if is_after_a_tool(body) or not body.get("tools"):
            return answer("end")
        name = body["tools"][0]["function"]["name"]
        return Reply(calls=[(name, {"cents": 5} if name == "charge" else {})])

    def build() -> GraphFlow:
        graph = DiGraphBuilder()
        first, last = agent(model, "first"), agent(model, "last")
        clerk, notary = agent(model, "clerk", [shop.tool]), agent(model, "notary", [note])
        for one in (first, clerk, notary, last):
            graph.add_node(one)
        for one in (clerk, notary):
            graph.add_edge(first, one)
            graph.add_edge(one, last)
        return GraphFlow([first, clerk, notary, last], graph.build())

    with OpenAIServer(reply) as model:
        for _ in range(2):
            with pytest.raises(Parked, match=r"waiting for a decision on charge\(.*approve exec-"):
                await run(server, build, park=True)
            assert len(model.requests) == 4  # one reply of `first`, one of `clerk`, and two of `notary`
        async with NexumClient(server.address) as client:
            (question,) = await client.pending_approvals()
            (info,) = await list_sessions(client)
            execution, call = question.execution_id, 'charge({"cents":5,"customer":"c-1"})'
            assert info.questions == (f"waits for a decision on {call}: {how_to_decide(execution, client.address)}",)
            await client.approve(question.execution_id, NODE)
        await run(server, build, park=True)
        assert len(model.requests) == 6
    assert shop.charged == ["c-1 5"]


async def test_long_call_that_waits_is_listed(server: ServerThread) -> None:
    with OpenAIServer(clerk_model({"cents": 5, "customer": "x" * 20_000})) as model, pytest.raises(Parked):
        await run(server, Shop(approval="always").clerk(model), park=True)
    async with NexumClient(server.address) as client:
        (question,) = await client.pending_approvals()
        (info,) = await list_sessions(client)
    command = how_to_decide(question.execution_id, server.address)
    assert info.questions == (f"waits for a decision on charge(…): {command}",)


async def test_run_parks_when_all_calls_of_a_reply_wait(server: ServerThread) -> None:
    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": 1}, {"cents": 2})) as model:
        with pytest.raises(Parked, match=r"\"cents\": 1.*; waiting for a decision on charge\({\"cents\": 2"):
            await run(server, shop.clerk(model), park=True)
        async with Deciders(server, approves):
            await run(server, shop.clerk(model), park=True)
    assert sorted(shop.charged) == ["c-1 1", "c-1 2"]


async def test_questions_of_calls_that_the_program_gives_up_are_withdrawn(server: ServerThread) -> None:
    shop = Shop(approval="always")
    async with DurableSession("s", nexum=server.address), NexumClient(server.address) as client:
        calls = range(PAGE + 1)
        calling = asyncio.gather(*(shop.tool.run_json({"cents": cents}, CancellationToken()) for cents in calls))
        while len(await client.pending_approvals()) < len(calls):  # noqa: ASYNC110 - nothing sets an event
            await asyncio.sleep(0.01)
        calling.cancel()
        await asyncio.wait({calling})
    async with NexumClient(server.address) as client:
        assert await client.pending_approvals() == []


async def test_question_that_is_cancelled_while_the_run_waits_is_asked_again(server: ServerThread) -> None:
    shop, lines = Shop(approval="always"), list[str]()

    async def cancels_first(client: NexumClient, execution_id: str, question: dict[str, Any]) -> None:
        while not any(execution_id in line for line in lines):  # noqa: ASYNC110 - nothing sets an event
            await asyncio.sleep(0.01)
        if len(people.asked) == 1:
            await client.cancel_execution(execution_id)
        else:
            await approves(client, execution_id, question)

    async with Deciders(server, cancels_first) as people, DurableSession("s", nexum=server.address, tell=lines.append):
        assert await shop.tool.run_json({"cents": 1}, CancellationToken()) == "charged c-1 1"
    assert len(people.asked) == 2
    assert sum("waiting for a decision" in line for line in lines) == 2


async def test_parked_run_has_recorded_the_calls_that_the_program_gave_up(server: ServerThread) -> None:
    shop, begun = Shop(approval="always"), list[str]()

    async def look() -> str:
        begun.append("look")
        await asyncio.Event().wait()
        return ""

    async def program() -> None:
        async with DurableSession("s", nexum=server.address, park=True) as session:

            async def gives_up() -> None:
                with session.agent("looks"), pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(FunctionTool(look, "Look.").run_json({}, CancellationToken()), 0.1)

            await asyncio.gather(gives_up(), shop.tool.run_json({"cents": 1}, CancellationToken()))

    for _ in range(2):
        with pytest.raises(Parked):
            await program()
    assert begun == ["look"]


async def test_failure_that_the_program_handled_is_not_made_again_by_the_run_after_a_parked_one(
    server: ServerThread,
) -> None:
    shop, tried = Shop(approval="always"), list[str]()

    async def look() -> str:
        tried.append("look")
        async with NexumClient(server.address) as client:
            while not await client.pending_approvals():  # noqa: ASYNC110 - nothing sets an event
                await asyncio.sleep(0.01)
        raise Offline("no network")

    async def program() -> None:
        async with DurableSession("s", nexum=server.address, park=True) as session:

            async def handles() -> None:
                with session.agent("looks"), pytest.raises(Offline):
                    await FunctionTool(look, "Look.").run_json({}, CancellationToken())

            await asyncio.gather(handles(), shop.tool.run_json({"cents": 1}, CancellationToken()))

    for _ in range(3):
        with pytest.raises(Parked):
            await program()
    assert tried == ["look"]


async def test_questions_and_waits_of_an_earlier_run_are_withdrawn_when_a_run_ends_without_them(
    server: ServerThread,
) -> None:
    shop = Shop(approval="always")

    async def earlier() -> None:
        async with DurableSession("s", nexum=server.address, budget=Budget(model_calls=0), park=True) as session:
            await asyncio.gather(
                session.wait_for_event("payment"),
                shop.tool.run_json({"cents": 1}, CancellationToken()),
                Scripted([]).create(QUESTION),
            )

    async def left(client: NexumClient) -> Counter[str]:
        running = await client.list_executions(status="RUNNING", key_prefix="s")
        return Counter(one.workflow_id for one in running)

    async with NexumClient(server.address) as client:
        with pytest.raises(Parked):
            await earlier()
        assert (await left(client)).keys() >= {"tool-approval", "budget", "agent-sent-event"}
        async with DurableSession("s", nexum=server.address, on_drift="continue"):
            pass
        assert await left(client) == {}


async def test_question_of_another_kind_under_the_key_is_no_permission(server: ServerThread) -> None:
    """An approval for other arguments doesn't permit a call, although the approval has the call's key."""
    shop = Shop(approval="always")
    other = Approval.of("s", "", "charge", {"cents": 1, "customer": "c-1"})
    key = key_of("s", NODE, "/reply/0/tool/1", call_fingerprint("charge", {"cents": 5})["hash"])
    async with NexumClient(server.address) as client:
        await client.register_workflow(approval_workflow())
        started = await client.start_execution(approval_workflow(), other, idempotency_key=key)
        await client.approve(started.execution_id, NODE)
    with pytest.raises(Conflict, match="asks another question under the key"):
        async with DurableSession("s", nexum=server.address):
            await shop.tool.run_json({"cents": 5}, CancellationToken())
    assert shop.charged == []


async def test_error_of_the_approval_function_is_no_permission(server: ServerThread) -> None:
    shop, lines = Shop(approval=lambda dollars, **_: dollars > 5), list[str]()
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        result = await run(server, shop.clerk(model), tell=lines.append)
    text = result.messages[-1].to_text()
    assert text.startswith("the approval function of charge failed, so the call was not made: TypeError: ")
    assert "missing 1 required positional argument: 'dollars'" in text
    assert f"[Nexum] {text}" in lines
    assert shop.charged == []


async def test_policy_of_the_session_replaces_the_tools_own(server: ServerThread) -> None:
    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        result = await run(server, shop.clerk(model), policies={"charge": Policy()})
        assert result.messages[-1].to_text() == "charged c-1 5"


async def test_policy_has_no_effect_outside_a_session() -> None:
    shop = Shop(approval="always")
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        result = await shop.clerk(model)().run(task="Charge the customers.")
    assert result.messages[-1].to_text() == "charged c-1 5"


async def tools_of(client: NexumClient, count: int) -> list[DeclaredTool]:
    """Poll the server until it lists `count` tools; return the tools. The test's time limit ends the polling."""
    while len(tools := await client.tools()) != count:  # noqa: ASYNC110 - nothing sets an event
        await asyncio.sleep(0.02)
    return tools


async def test_server_lists_the_policies_of_a_run(server: ServerThread) -> None:
    async def look() -> str:
        """Look."""
        return "seen"

    policies = {"charge": Policy(approval="always", effect="once"), "model": Policy(timeout=9)}
    async with NexumClient(server.address) as client:
        async with DurableSession("s", nexum=server.address, policies=policies):
            assert await durable_tool(look, rate="9/s").run_json({}, CancellationToken()) == "seen"
            tools = await tools_of(client, 3)
        await tools_of(client, 0)  # the policies of an ended run are not listed
    assert [(one.name, json.loads(one.policy_json), one.session) for one in tools] == [
        ("charge", {"approval": "always", "effect": "once"}, "s"),
        ("look", {"rate": "9/s"}, "s"),
        ("model", {"timeout": 9.0}, "s"),
    ]


async def test_policies_of_unknown_tools_are_told_once(server: ServerThread) -> None:
    lines: list[str] = []
    shop = Shop()
    with OpenAIServer([Reply("nothing to do")]) as model:
        policies = {"charge": Policy(), "chrage": Policy(), "model": Policy(), "clerk": Policy()}
        await run(server, shop.clerk(model), logs=lines, policies=policies)
    assert [line for line in lines if "polic" in line] == [
        "policies for unknown tools: chrage. Check the names. Known: charge, clerk"
    ]


async def test_call_of_a_tool_whose_policy_has_a_mistyped_name_is_refused(server: ServerThread) -> None:
    shop = Shop()
    policies = {"chrage": Policy(approval="always")}
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        with pytest.raises(InvalidRequest, match="charge has no policy, and no tool is known yet for the policy of ch"):
            await run(server, lambda: agent(model, "clerk", [shop.charge]), policies=policies)
        assert shop.charged == []
        # Now charge has a policy, so chrage may be the name of a tool that is not known yet.
        await run(server, lambda: agent(model, "clerk", [shop.charge]), policies={**policies, "charge": Policy()})
    assert len(shop.charged) == 1


async def test_call_without_policy_costs_no_request(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []
    send = Connection.call

    async def counted(self: Connection, method: Any, request: Any, **more: Any) -> Any:
        requests.append(type(request).__name__)
        return await send(self, method, request, **more)

    monkeypatch.setattr(Connection, "call", counted)
    shop, policies = (
        Shop(),
        {"other": Policy(approval="always", effect="once"), "charge": Policy(timeout=9, retry=FAST)},
    )
    with OpenAIServer(clerk_model({"cents": 5})) as model:
        await run(server, shop.clerk(model), session="first")  # registers the workflows
        for session, given in (("s1", None), ("s2", policies)):
            requests.clear()
            await run(server, shop.clerk(model), session=session, policies=given)
            # Two requests list earlier runs and the record. Five start the run, the first event, two replies and the
            # tool call. One waits until somebody cancels the run.
            expected = {"ListRequest": 2, "StartRequest": 5, "CompleteRequest": 2, "GetExecutionRequest": 1}
            assert Counter(requests) == expected
