"""Effects that happen only once: kills, reconciliation, people who find out, retries, time limits and forks."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken, FunctionCall
from autogen_core.tools import BaseTool, FunctionTool, StaticWorkbench, ToolOverride, ToolResult
from durable_agents import QUESTION, TIMEOUT, Scripted, bench
from harness import Process, Server, free_port, logged, nexum_server, running
from pydantic import BaseModel, Field, SecretStr
from server_thread import ServerThread, server_thread

from durable_autogen import (
    NOT_DONE,
    CallFailed,
    DriftError,
    DurableSession,
    Parked,
    Policy,
    SessionBusy,
    call_id,
    durable_tool,
    fork_session,
    list_sessions,
)
from durable_autogen.errors import NotDurable
from durable_autogen.record.attempts import TookTooLong, retry_after
from durable_autogen.record.effects import EffectInput, Effects
from nexum_engine.approvals import how_to_resolve
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest, UnknownEffect
from nexum_engine.owner import Owner
from nexum_engine.records import ExecutionStatus, Task
from nexum_engine.workflow import RetryPolicy, workflow

PROGRAM = """
import asyncio, logging, os, signal, sys
from autogen_core import CancellationToken
from durable_autogen import DurableSession, NOT_DONE, Parked, call_id, durable_tool
from durable_autogen.record.effects import Effects
from durable_autogen.record.journal import Journal
from nexum_engine.owner import Owner

logging.basicConfig(format="%(message)s")
die = os.environ.get("DIE", "")

def entries():
    return open("ledger").read().split() if os.path.exists("ledger") else []

async def stop_here(place):
    if die == place:
        print("AT", place, flush=True)
        await asyncio.Event().wait()

async def charge(cents: int) -> str:
    "Charge."
    await stop_here("before")
    with open("ledger", "a") as ledger:
        ledger.write(call_id() + "\\n")
    await stop_here("after")
    return f"receipt {len(entries())}"

def look_up(arguments, key):
    assert arguments == {"cents": 990}
    if "broken" in sys.argv:
        raise OSError("the shop is closed")
    return "receipt found" if key in entries() else NOT_DONE

start = Effects.start
async def start_and_stop(effects, *args):
    global die
    started = await start(effects, *args)
    if die == "suspended":
        die = ""
        print("AT suspended", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    return started
Effects.start = start_and_stop

write = Journal._write
async def stop_and_write(journal, event):
    if event.kind.value == "tool":
        await stop_here("recorded")
    return await write(journal, event)
Journal._write = stop_and_write

async def main():
    more = {"reconcile": look_up} if "reconcile" in sys.argv else {}
    tool = durable_tool(charge, effect="once", **more)
    async with DurableSession("s", park="park" in sys.argv):
        calling = asyncio.ensure_future(tool.run_json({"cents": 990}, CancellationToken()))
        if "give-up" in sys.argv:
            async def give_up(owner, task):
                calling.cancel()
                await asyncio.Event().wait()
            Owner.may_begin = give_up
            await asyncio.wait({calling})
            print("GAVE UP", calling.cancelled())
        else:
            print("GOT", await calling)

try:
    asyncio.run(main())
except Parked as parked:
    print("PARKED", parked)
"""


@contextmanager
def program(folder: Path, *arguments: str, die: str = "") -> Iterator[Process]:
    """Run the program. With `die`, kill it when it reaches that point."""
    with running(["program.py", *arguments], cwd=folder, env={"DIE": die}, forked=True) as process:
        if die:
            process.wait_for(f"AT {die}")
            process.kill()
        yield process


def got(folder: Path, *arguments: str) -> str:
    """Run the program to its end; return the text that it printed after GOT."""
    with program(folder, *arguments) as process:
        line = process.wait_for("GOT")
        assert process.wait() == 0
    return line.removeprefix("GOT ")


def ledger(folder: Path) -> list[str]:
    path = folder / "ledger"
    return path.read_text().split() if path.exists() else []


def command(line: str) -> list[str]:
    """Return the command that a waiting run names in `line`."""
    found = re.search(r"python (-m nexum_engine resolve .+) --result JSON, or --not-done, or --failed REASON", line)
    assert found is not None, line
    return found[1].split()


def resolve(folder: Path, line: str, *how: str) -> None:
    """Run the command that a waiting run names in `line`, with the options `how`."""
    with running([*command(line), *how, "--by", "ann"], cwd=folder, forked=True) as process:
        assert process.wait() == 0, process.output


@pytest.mark.parametrize(
    ("how", "result", "effects"),
    [
        (("--result", '"receipt 7"'), "receipt 7", 1),
        (("--not-done",), "receipt 2", 2),  # the person was wrong: only then does an effect happen twice
    ],
)
def test_effect_of_killed_run_is_unknown_until_a_person_resolves_it(
    folder: Path, how: tuple[str, ...], result: str, effects: int
) -> None:
    with program(folder, die="after"):
        pass
    with program(folder) as waiting:
        line = waiting.wait_for("may or may not have happened")
        assert 'charge({"cents": 990}) of the program may' in line
        assert len(ledger(folder)) == 1
        resolve(folder, line, *how)
        assert waiting.wait_for("GOT") == f"GOT {result}"
        assert waiting.wait() == 0
    assert len(ledger(folder)) == effects
    (call,) = set(ledger(folder))
    assert call.startswith("s//reply/0/tool/1/")


def test_second_decision_about_a_dead_run_does_not_count_for_the_next_run(folder: Path) -> None:
    with program(folder, die="after"):
        pass
    with program(folder, "park") as parked:
        line = parked.wait_for("PARKED")
        assert parked.wait() == 0
    resolve(folder, line, "--not-done")
    with program(folder, die="after"):
        pass
    with program(folder, "park") as parked:
        later = parked.wait_for("PARKED")
        assert parked.wait() == 0
    with running([*command(line), "--not-done"], cwd=folder, forked=True) as second:
        assert second.wait() == 1
        assert "attempt 1 is over, and now attempt 3 is in doubt" in second.output
    resolve(folder, later, "--result", '"receipt 2"')
    assert got(folder) == "receipt 2"
    assert len(ledger(folder)) == 2


def test_effect_resolved_as_failed_while_nothing_runs_is_not_made_again(folder: Path) -> None:
    with program(folder, die="after"):
        pass
    with program(folder, "park") as parked:
        line = parked.wait_for("PARKED")
        assert parked.wait() == 0
    resolve(folder, line, "--failed", "the bank said no")
    with program(folder) as failing:
        failing.wait_for("CallFailed: charge has failed, and is not called again, because its effect is once: ")
        assert failing.lines[-1].endswith("the bank said no")
        assert failing.wait() == 1
    assert len(ledger(folder)) == 1


@pytest.mark.parametrize(("die", "result"), [("after", "receipt found"), ("before", "receipt 1")])
def test_reconcile_decides_whether_the_call_is_made_again(folder: Path, die: str, result: str) -> None:
    with program(folder, "reconcile", die=die):
        pass
    assert got(folder, "reconcile") == result
    assert len(ledger(folder)) == 1


@pytest.mark.parametrize(("place", "result"), [("after", "receipt found"), ("before", "receipt 1")])
def test_reconcile_decides_about_a_call_that_ctrl_c_cancelled(folder: Path, place: str, result: str) -> None:
    with running(["program.py", "reconcile"], cwd=folder, env={"DIE": place}, forked=True) as cancelled:
        cancelled.wait_for(f"AT {place}")
        cancelled.interrupt()
        assert cancelled.wait() != 0
    assert got(folder, "reconcile") == result
    assert len(ledger(folder)) == 1


def test_effect_of_killed_run_is_not_cancelled_if_the_next_run_gives_its_call_up(folder: Path) -> None:
    with program(folder, "reconcile", die="after"):
        pass
    with program(folder, "reconcile", "give-up") as giving_up:
        giving_up.wait_for("GAVE UP True")
        assert giving_up.wait() == 0
    with running(["-m", "nexum_engine", "ps", "--all"], cwd=folder, forked=True) as ps:
        assert ps.wait() == 0
    (effect,) = (line for line in ps.lines if "tool-effect" in line)
    assert "CANCELLED" not in effect


@pytest.mark.parametrize("ends", ["killed", "cancelled"])
def test_person_decides_if_reconcile_raises(folder: Path, ends: str) -> None:
    with running(["program.py", "reconcile"], cwd=folder, env={"DIE": "after"}, forked=True) as first:
        first.wait_for("AT after")
        if ends == "killed":
            first.kill()
        else:
            first.interrupt()
            first.wait()
    with program(folder, "reconcile", "broken") as waiting:
        line = waiting.wait_for("may or may not have happened")
        assert "reconcile can't tell: OSError: the shop is closed" in waiting.output
        resolve(folder, line, "--result", '"receipt 7"')
        assert waiting.wait_for("GOT") == "GOT receipt 7"
        assert waiting.wait() == 0
    assert len(ledger(folder)) == 1


def test_recorded_effect_is_found_if_the_run_dies_before_it_records_its_call(folder: Path) -> None:
    with program(folder, die="recorded"):
        pass
    assert got(folder) == "receipt 1"
    assert len(ledger(folder)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_run_that_was_suspended_asks_before_it_begins_an_effect(folder: Path) -> None:
    with nexum_server(folder, lease=1) as server:
        env = {"DIE": "suspended", "NEXUM_ADDRESS": server.address}
        with running(["program.py"], cwd=folder, env=env, forked=True) as suspended:
            suspended.wait_for("AT suspended")
            asyncio.run(resolve_unknown(server.address, "receipt 7"))
            suspended.popen.send_signal(signal.SIGCONT)
            assert suspended.wait_for("GOT") == "GOT receipt 7"
            assert suspended.wait() == 0
    assert ledger(folder) == []


async def resolve_unknown(address: str, result: str) -> None:
    """Wait until the server counts an effect as unknown; resolve it with a result."""
    async with NexumClient(address) as client:
        while not (unknown := await client.unknown()):  # noqa: ASYNC110 - nothing sets an event
            await asyncio.sleep(0.05)
        await client.resolve(unknown[0].execution_id, unknown[0].node_id, output=result)


# ---- Without processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    """A server in a thread: it starts faster than a process."""
    with server_thread(tmp_path) as running:
        yield running


class Target:
    """The outside world: a tool that acts on it, and the ids of the calls that had an effect."""

    def __init__(self, *errors: BaseException, **policy: Any) -> None:
        self.errors = list(errors)
        self.done: list[str] = []
        self.tool = durable_tool(self.charge, **policy)

    async def charge(self, cents: int = 990) -> str:
        """Charge."""
        self.done.append(call_id())
        if self.errors:
            raise self.errors.pop(0)
        return f"receipt {len(self.done)}"

    async def call(self, cents: int = 990) -> Any:
        return await self.tool.run_json({"cents": cents}, CancellationToken())

    async def result(self, cents: int = 990) -> ToolResult:
        return await bench([self.tool]).call_tool("charge", {"cents": cents})


FAST = RetryPolicy(max_attempts=3, first_delay_seconds=0.01)


class Refused(Exception):
    """A failure that a retry can't fix."""


def test_durable_tool_shows_the_fields_of_policy_as_parameters() -> None:
    shown = inspect.signature(durable_tool).parameters
    assert list(shown) == ["tool", *Policy.model_fields]
    assert shown["effect"].default == "idempotent"


async def test_once_tool_that_raises_is_not_called_again(server: ServerThread) -> None:
    target = Target(OSError("no answer"), effect="once")
    for error, text in (
        (OSError, "^no answer$"),
        (CallFailed, "is not called again, because its effect is once: no answer"),
    ):
        with pytest.raises(error, match=text):
            async with DurableSession("s", nexum=server.address):
                await target.call()
    assert len(target.done) == 1


async def test_error_result_of_once_tool_is_recorded_as_result(server: ServerThread) -> None:
    target = Target(OSError("no answer"), effect="once")
    for _ in range(2):
        async with DurableSession("s", nexum=server.address):
            result = await target.result()
            assert (result.is_error, result.to_text()) == (True, "no answer")
    assert len(target.done) == 1


@pytest.mark.parametrize("effect", ["once", "idempotent"])
async def test_failed_attempts_are_retried_with_one_call_id(server: ServerThread, effect: str) -> None:
    target = Target(OSError("1"), OSError("2"), effect=effect, retry=FAST)
    lines: list[str] = []
    with logged(lines):
        async with DurableSession("s", nexum=server.address):
            assert (await target.result()).to_text() == "receipt 3"
    assert len(set(target.done)) == 1
    assert [line for line in lines if "retrying" in line] == [
        "charge failed (attempt 1), retrying in 0.01 s: 1",
        "charge failed (attempt 2), retrying in 0.02 s: 2",
    ]


async def test_final_errors_are_not_retried(server: ServerThread) -> None:
    target = Target(OSError("1"), Refused("no"), retry=FAST, final=(Refused,))
    async with DurableSession("s", nexum=server.address):
        assert (await target.result()).to_text() == "no"
    assert len(target.done) == 2


async def test_last_error_is_the_result_after_all_attempts(server: ServerThread) -> None:
    target = Target(*(OSError(str(n)) for n in range(1, 9)), retry=FAST)
    async with DurableSession("s", nexum=server.address):
        assert (await target.result()).to_text() == "3"
        with pytest.raises(OSError, match=r"^6$"):
            await target.call()


class Slow:
    """A tool whose first attempt takes too long."""

    def __init__(self, **policy: Any) -> None:
        self.attempts = 0
        self.tool = durable_tool(self.look, timeout=0.2, **policy)

    async def look(self) -> str:
        """Look."""
        self.attempts += 1
        if self.attempts == 1:
            await asyncio.Event().wait()
        return "seen"


async def test_attempt_ends_at_its_time_limit_and_is_retried(server: ServerThread) -> None:
    slow = Slow(retry=FAST)
    async with DurableSession("s", nexum=server.address):
        assert await slow.tool.run_json({}, CancellationToken()) == "seen"
    slow = Slow()
    async with DurableSession("s2", nexum=server.address):
        with pytest.raises(TookTooLong, match=r"^look took longer than its time limit of 0.2 s$"):
            await slow.tool.run_json({}, CancellationToken())


async def test_time_limit_leaves_a_once_effect_unknown(server: ServerThread) -> None:
    slow = Slow(effect="once", retry=FAST)
    with pytest.raises(Parked, match=r"may or may not have happened .*time limit of 0.2 s"):
        async with DurableSession("s", nexum=server.address, park=True):
            await slow.tool.run_json({}, CancellationToken())
    assert slow.attempts == 1


@dataclass(repr=False)
class Receipt:
    """A result that can't be written: its number is never set."""

    number: str = field(init=False)


async def test_once_effect_is_unknown_if_its_result_can_not_be_written(server: ServerThread) -> None:
    done: list[str] = []

    async def charge() -> Receipt:
        """Charge."""
        done.append(call_id())
        return Receipt()

    for _ in range(2):
        with pytest.raises(Parked, match=r"may or may not have happened .*no attribute 'number'"):
            async with DurableSession("s", nexum=server.address, park=True):
                await durable_tool(charge, effect="once").run_json({}, CancellationToken())
    assert len(done) == 1


async def test_tool_may_say_that_its_effect_is_unknown(server: ServerThread) -> None:
    for session, reconcile, text in (
        ("s1", None, r"may or may not have happened \(the line broke\)"),
        ("s2", lambda arguments, key: NOT_DONE, r"may or may not have happened \(the line broke\)"),
    ):
        target = Target(UnknownEffect("the line broke"), effect="once", reconcile=reconcile)
        with pytest.raises(Parked, match=text):
            async with DurableSession(session, nexum=server.address, park=True):
                await target.result()
        assert len(target.done) == 1
    async with NexumClient(server.address) as client:
        shown = {text for one in await list_sessions(client) for text in one.questions}
        words = 'may or may not have called charge({"cents":990}). '
        hints = {how_to_resolve(one.execution_id, one.attempt, client.address) for one in await client.unknown()}
        assert shown == {words + hint for hint in hints}
    target = Target(UnknownEffect("the line broke"), effect="once", reconcile=lambda arguments, key: "receipt found")
    async with DurableSession("s3", nexum=server.address, park=True):
        assert (await target.result()).to_text() == "receipt found"


async def test_once_call_that_the_program_gives_up_is_unknown(server: ServerThread) -> None:
    begun = asyncio.Event()

    async def charge() -> str:
        """Charge."""
        begun.set()
        await asyncio.Event().wait()
        return "never"

    tool = durable_tool(charge, effect="once")
    async with DurableSession("s", nexum=server.address):
        calling = asyncio.ensure_future(tool.run_json({}, CancellationToken()))
        await begun.wait()
        calling.cancel()
        await asyncio.wait({calling})
    async with NexumClient(server.address) as client:
        (unknown,) = await client.unknown()
    assert unknown.error == "the program gave the call up"


@pytest.mark.parametrize("ends", ["the call", "the run"])
@pytest.mark.parametrize("moment", ["start", "may_begin"])
@pytest.mark.parametrize("reconcile", [None, lambda arguments, key: NOT_DONE])
async def test_once_call_that_is_cancelled_before_it_began_needs_no_person(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch, moment: str, ends: str, reconcile: Any
) -> None:
    target = Target(effect="once", reconcile=reconcile)
    original, hold, held = getattr(Owner, moment), asyncio.Event(), asyncio.Event()

    async def held_back(self: Owner, *args: Any, **options: Any) -> Any:
        answer = await original(self, *args, **options)
        if moment == "may_begin" or args[0].workflow_id == "tool-effect":
            held.set()
            await hold.wait()
        return answer

    async def run() -> None:
        async with DurableSession("s", nexum=server.address):
            calling = asyncio.ensure_future(target.call())
            if ends == "the call":
                await held.wait()
                calling.cancel()
                await asyncio.wait({calling})
            else:
                await calling

    monkeypatch.setattr(Owner, moment, held_back)
    running = asyncio.ensure_future(run())
    await held.wait()
    if ends == "the run":
        running.cancel()
    for _ in range(20):  # turns of the loop, in which the cancellation reaches the recording
        await asyncio.sleep(0)
    hold.set()
    await asyncio.wait({running})
    assert running.cancelled() == (ends == "the run")
    monkeypatch.undo()
    async with NexumClient(server.address) as client:
        assert await client.unknown() == []
        assert target.done == []
        if ends == "the run":
            async with DurableSession("s", nexum=server.address):
                await target.call()
            assert len(target.done) == 1
        (effect,) = await client.list_executions(workflow_id="tool-effect")
    assert effect.status.value == ("COMPLETED" if ends == "the run" else "CANCELLED")


async def test_result_of_once_call_is_recorded_if_program_gives_it_up_meanwhile(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(effect="once")
    recording, go_on = asyncio.Event(), asyncio.Event()
    complete = Effects.complete

    async def complete_later(effects: Effects, task: Task, output: Mapping[str, Any]) -> None:
        recording.set()
        await go_on.wait()
        await complete(effects, task, output)

    monkeypatch.setattr(Effects, "complete", complete_later)
    async with DurableSession("s", nexum=server.address):
        calling = asyncio.ensure_future(target.call())
        await recording.wait()
        calling.cancel()
        for _ in range(20):  # turns of the loop, in which the cancellation reaches the recording
            await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait({calling})
    async with NexumClient(server.address) as client:
        assert await client.unknown() == []
        assert [one.status.value for one in await client.list_executions(workflow_id="tool-effect")] == ["COMPLETED"]
    assert len(target.done) == 1


async def test_tool_with_a_policy_can_not_be_called_inside_another_tool(server: ServerThread) -> None:
    target = Target(effect="once")

    async def pay_twice() -> str:
        """Pay."""
        return f"{await target.call()} {await target.call()}"

    async with DurableSession("s", nexum=server.address):
        result = await bench([pay_twice]).call_tool("pay_twice", {})
        assert result.is_error
        assert "charge has a policy, so it can't be called inside another tool" in result.to_text()
    assert target.done == []


async def test_policy_applies_to_a_tool_that_its_workbench_renames(server: ServerThread) -> None:
    target = Target()
    renamed = StaticWorkbench([target.tool], {"charge": ToolOverride(name="pay")})
    async with DurableSession("s", nexum=server.address, policies={"charge": Policy(effect="once")}):
        assert (await renamed.call_tool("pay", {"cents": 1})).to_text() == "receipt 1"
    async with NexumClient(server.address) as client:
        assert [one.status.value for one in await client.list_executions(workflow_id="tool-effect")] == ["COMPLETED"]


async def test_changed_program_is_warned_of_effects_that_it_may_repeat(server: ServerThread) -> None:
    target = Target(effect="once")
    lines: list[str] = []
    async with DurableSession("s", nexum=server.address):
        await target.call(1)
        await target.call(2)
    with logged(lines):
        async with DurableSession("s", nexum=server.address, on_drift="continue"):
            await target.call(1)
            await target.call(3)
    told = "the dropped events have 1 call(s) whose effect must happen only once, and this program may make such calls "
    assert f'{told}again: charge({{"cents":2}})' in lines


class Busy(Exception):
    """A model's server is busy."""

    retry_after = 0.2


async def test_model_calls_are_retried_and_limited_by_their_policy(server: ServerThread) -> None:
    happened: list[str] = []

    async def hangs() -> str:
        await asyncio.Event().wait()
        return "never"

    async def fails() -> str:
        raise Busy("wait")

    model = Scripted(happened, fails, hangs, "hello", name="m")
    lines: list[str] = []
    with logged(lines):
        policies = {"model": Policy(timeout=0.001), "Scripted": Policy(timeout=0.2, retry=FAST)}
        async with DurableSession("s", nexum=server.address, policies=policies):
            assert (await model.create(QUESTION)).content == "hello"
    assert [line for line in lines if "retrying" in line] == [
        "reply 1 of the program failed (attempt 1), retrying in 0.2 s: wait",
        "reply 1 of the program failed (attempt 2), retrying in 0.02 s: reply 1 of the program took longer than its "
        "time limit of 0.2 s",
    ]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after-ms": "700", "retry-after": "7"}, 0.7),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "-7"}, 0),
        ({}, 0),
    ],
)
def test_retry_after_of_a_response_is_read(headers: dict[str, str], seconds: float) -> None:
    class Response:
        pass

    error, response = Exception(), Response()
    response.headers = headers  # type: ignore[attr-defined]
    error.response = response  # type: ignore[attr-defined]
    assert retry_after(error) == seconds


@pytest.mark.parametrize("policy", [{"approval": "always"}, {"effect": "once"}])
async def test_model_can_not_have_the_policy_of_a_tool(server: ServerThread, policy: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="a model's policy has only retry, final, timeout, heartbeat, rate"):
        async with DurableSession("s", nexum=server.address, policies={"model": Policy(**policy)}):
            pass


# ---- Forks -----------------------------------------------------------------------------------------------------------


async def two_charges(server: ServerThread, session: str, target: Target) -> list[str]:
    async with DurableSession(session, nexum=server.address):
        return [await target.call(), await target.call(), await target.call(1)]


async def test_fork_before_an_effect_is_refused_by_default(server: ServerThread) -> None:
    target = Target(effect="once")
    await two_charges(server, "s", target)
    async with NexumClient(server.address) as client:
        await fork_session(client, "s", 3, "all")
        with pytest.raises(InvalidRequest, match=r"after call 1, session s has made 2 call.*charge\(.*990.*, cha"):
            await fork_session(client, "s", 1, "f")


async def test_fork_reuses_the_results_of_equal_calls_once(server: ServerThread) -> None:
    target = Target(effect="once")
    await two_charges(server, "s", target)
    async with NexumClient(server.address) as client:
        for _ in range(2):  # the same fork again
            await fork_session(client, "s", 0, "f", effects="reuse")
        for _ in range(2):
            async with DurableSession("f", nexum=server.address):
                found = [await target.call(1), await target.call(), await target.call(), await target.call()]
            assert found == ["receipt 3", "receipt 1", "receipt 2", "receipt 4"]
        # A fork of the fork reuses the results that the fork had reused, and the result of the fork's own call (4).
        await fork_session(client, "f", 1, "g", effects="reuse")
        async with DurableSession("g", nexum=server.address):
            found = [await target.call(1)] + [await target.call() for _ in range(4)]
        assert found == ["receipt 3", "receipt 1", "receipt 2", "receipt 4", "receipt 5"]


async def test_fork_reuses_the_result_of_an_equal_call_of_another_tool_object(server: ServerThread) -> None:
    target = Target(effect="once")
    await two_charges(server, "s", target)
    async with NexumClient(server.address) as client:
        await fork_session(client, "s", 0, "f", effects="reuse")
    async with DurableSession("f", nexum=server.address):
        # The changed program makes a tool for each call.
        tools = [durable_tool(target.charge, effect="once") for _ in range(2)]
        found = [await tool.run_json({"cents": 990}, CancellationToken()) for tool in tools]
    assert found == ["receipt 1", "receipt 2"]


async def test_fork_makes_the_calls_again_on_request(server: ServerThread) -> None:
    target = Target(effect="once")
    await two_charges(server, "s", target)
    async with NexumClient(server.address) as client:
        await fork_session(client, "s", 0, "f", effects="again")
    assert await two_charges(server, "f", target) == ["receipt 4", "receipt 5", "receipt 6"]


async def test_fork_lists_the_effects_that_workers_have_and_can_not_reuse_them(server: ServerThread) -> None:
    card = workflow("card").effect("charge", once=True).build()
    keys = iter(("{}", "s:0a1b:{}", "s:approval/card/{}/2c3d"))  # as in docs/your-own-agent.md, and in submit_task.py
    async with NexumClient(server.address) as client:
        await client.register_workflow(card)

        async def submit(cents: int) -> str:
            key = next(keys).format(call_id())
            return (await client.start_execution(card, {"cents": cents}, idempotency_key=key)).execution_id

        tool = FunctionTool(submit, "Submit a charge.")
        async with DurableSession("s", nexum=server.address):
            begun = [await tool.run_json({"cents": cents}, CancellationToken()) for cents in (10, 20, 30)]
        await fork_session(client, "s", 3, "all")
        for count in range(3):
            listed = ", ".join(f'card {{"cents":{10 * n + 10}}} ({begun[n]})' for n in range(count, 3))
            with pytest.raises(InvalidRequest) as refused:
                await fork_session(client, "s", count, "refused")
            assert f"has made {3 - count} call(s) whose effect must happen only once: {listed}. Make" in str(
                refused.value
            )
            with pytest.raises(InvalidRequest, match="the result of a worker's call can't be reused"):
                await fork_session(client, "s", count, "refused", effects="reuse")
        await fork_session(client, "s", 0, "again", effects="again")


async def one_charge(server: ServerThread, target: Target) -> None:
    async with DurableSession("s", nexum=server.address, park=True):
        await Scripted([]).create(QUESTION)
        await target.call()


async def test_error_that_names_a_file_whose_name_is_not_utf8_is_recorded(server: ServerThread) -> None:
    target = Target(FileNotFoundError("no such file: caf\udce9"), effect="once")
    with pytest.raises(FileNotFoundError, match="caf"):
        await one_charge(server, target)
    with pytest.raises(CallFailed, match="no such file: caf"):
        await one_charge(server, target)
    assert len(target.done) == 1


async def test_answer_of_reconcile_does_not_count_after_another_run_has_taken_over(server: ServerThread) -> None:
    asked, may_answer = asyncio.Event(), asyncio.Event()
    is_slow = False

    async def look_up(arguments: Any, key: str) -> Any:
        if is_slow and not asked.is_set():
            asked.set()
            await may_answer.wait()
        return NOT_DONE

    target = Target(UnknownEffect("no answer"), UnknownEffect("no answer"), effect="once", reconcile=look_up)
    with pytest.raises(Parked):
        await one_charge(server, target)
    is_slow = True

    async def suspended() -> None:
        async with DurableSession("s", nexum=server.address, park=True) as session:
            await session.recorder.journal.owner.__aexit__()  # no heartbeats: the process is suspended
            await Scripted([]).create(QUESTION)
            await target.call()

    first = asyncio.create_task(suspended())
    await asked.wait()
    with pytest.raises(Parked):
        await one_charge(server, target)
    assert len(target.done) == 2
    may_answer.set()
    with pytest.raises(SessionBusy):
        await first
    async with NexumClient(server.address) as client:
        assert len(await client.unknown()) == 1


async def test_answer_of_reconcile_waits_for_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, killed, resolve = free_port(), asyncio.Event(), NexumClient.resolve
    receipts: list[str] = []
    target = Target(UnknownEffect("no answer"), effect="once", reconcile=lambda arguments, key: receipts.pop())

    async def without_server(*args: Any, **options: Any) -> None:
        first.process.kill()
        killed.set()
        await resolve(*args, **options)

    async def charge(server: Server) -> Any:
        async with DurableSession("s", nexum=server.address, park=True):
            return await target.call()

    with nexum_server(tmp_path, port=port) as first:
        with pytest.raises(Parked):
            await charge(first)
        receipts.append("receipt 7")
        monkeypatch.setattr(NexumClient, "resolve", without_server)
        working = asyncio.create_task(charge(first))
        await asyncio.wait_for(killed.wait(), TIMEOUT)
    with nexum_server(tmp_path, port=port):
        assert await asyncio.wait_for(working, TIMEOUT) == "receipt 7"
    assert len(target.done) == 1


async def test_fork_can_not_reuse_an_unknown_effect(server: ServerThread) -> None:
    target = Target(UnknownEffect("the line broke"), effect="once")
    with pytest.raises(Parked):
        await one_charge(server, target)
    async with NexumClient(server.address) as client:
        (unknown,) = await client.unknown()
        with pytest.raises(InvalidRequest) as refused:
            await fork_session(client, "s", 0, "f", effects="reuse")
        assert str(refused.value).endswith(
            f"may or may not have happened. {how_to_resolve(unknown.execution_id, 1, server.address)}"
        )


async def test_fork_makes_a_call_that_a_person_has_resolved_as_not_done(server: ServerThread) -> None:
    target = Target(UnknownEffect("the line broke"), effect="once")
    with pytest.raises(Parked):
        await one_charge(server, target)
    async with NexumClient(server.address) as client:
        (unknown,) = await client.unknown()
        await client.resolve(unknown.execution_id, unknown.node_id, not_done=True)
        for effects in ("refuse", "reuse"):
            await fork_session(client, "s", 0, effects, effects=effects)
            async with DurableSession(effects, nexum=server.address):
                await Scripted([]).create(QUESTION)
                await target.call()
    assert len(target.done) == 3


async def test_call_resolved_as_not_done_that_nobody_makes_any_more_is_cancelled(server: ServerThread) -> None:
    target = Target(UnknownEffect("the line broke"), effect="once")
    with pytest.raises(Parked):
        await one_charge(server, target)
    async with NexumClient(server.address) as client:
        (unknown,) = await client.unknown()
        await client.resolve(unknown.execution_id, unknown.node_id, not_done=True)
        async with DurableSession("s", nexum=server.address, on_drift="continue"):
            await Scripted([]).create(QUESTION)
        assert await client.get_status(unknown.execution_id) is ExecutionStatus.CANCELLED
        assert (await client.prune(0, session="s")).sessions == 1
    assert len(target.done) == 1


async def test_given_up_call_of_a_finished_session_is_cancelled_after_it_was_resolved_as_not_done(
    server: ServerThread,
) -> None:
    async def hang(cents: int) -> str:
        await asyncio.Event().wait()
        return ""

    async def give_up() -> None:
        async with DurableSession("s", nexum=server.address):
            tool = durable_tool(hang, effect="once")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(tool.run_json({"cents": 5}, CancellationToken()), 0.5)

    await give_up()
    async with NexumClient(server.address) as client:
        (unknown,) = await client.unknown()
        await client.resolve(unknown.execution_id, unknown.node_id, not_done=True)
        await give_up()
        assert await client.get_status(unknown.execution_id) is ExecutionStatus.CANCELLED


async def test_fork_can_not_reuse_an_effect_that_is_under_way(server: ServerThread) -> None:
    target, begun = Target(effect="once"), asyncio.Event()

    async def hang(cents: int) -> str:
        begun.set()
        await asyncio.Event().wait()
        return ""

    target.tool = durable_tool(hang, effect="once")
    running = asyncio.ensure_future(one_charge(server, target))
    await begun.wait()
    async with NexumClient(server.address) as client:
        with pytest.raises(InvalidRequest, match=r"may or may not have happened\. Let the session continue first"):
            await fork_session(client, "s", 0, "f", effects="reuse")
    running.cancel()
    await asyncio.wait({running})


class Order(BaseModel):
    cents: int
    reference: str = Field(default_factory=lambda: uuid4().hex)
    """A default that differs in each run: each validation makes a new id."""


class Pay(BaseTool[Order, Any]):
    """A tool that pays. The first payment happens, but its result is lost."""

    def __init__(self) -> None:
        super().__init__(Order, str, "pay", "Pay.")
        self.paid: list[str] = []

    async def run(self, args: Order, cancellation_token: CancellationToken) -> str:
        self.paid.append(args.reference)
        if len(self.paid) == 1:
            raise UnknownEffect("the line is dead")
        return args.reference


async def parked(server: ServerThread, tool: Pay, cents: int = 5, **more: Any) -> str:
    """Run a program that calls the tool, until the run parks; return the id of the waiting execution."""
    with pytest.raises(Parked) as waits:
        async with DurableSession("s", nexum=server.address, park=True, **more):
            await tool.run_json({"cents": cents}, CancellationToken())
    found = re.search(r"exec-\S+", str(waits.value))
    assert found is not None
    return found[0]


async def test_effect_is_the_same_one_if_its_default_changes_with_each_run(server: ServerThread) -> None:
    tool = Pay()
    durable_tool(tool, effect="once")
    first = await parked(server, tool)
    assert await parked(server, tool) == first
    assert len(tool.paid) == 1
    async with NexumClient(server.address) as client:
        await client.resolve(first, "effect", not_done=True)
    async with DurableSession("s", nexum=server.address):
        reference = await tool.run_json({"cents": 5}, CancellationToken())
    assert tool.paid == [reference, reference]


async def test_default_that_a_person_has_seen_is_the_one_that_runs(server: ServerThread) -> None:
    tool = Pay()
    tool.paid.append("")
    durable_tool(tool, approval="always")
    first = await parked(server, tool)
    assert await parked(server, tool) == first
    async with NexumClient(server.address) as client:
        (question,) = await client.pending_approvals()
        await client.approve(first, "approval")
    async with DurableSession("s", nexum=server.address):
        reference = await tool.run_json({"cents": 5}, CancellationToken())
    assert reference in question.input_json


async def test_arguments_that_json_does_not_hold_are_refused(server: ServerThread) -> None:
    seen: list[str] = []

    class Login(BaseModel):
        password: SecretStr

    class LogIn(BaseTool[Login, Any]):
        """A tool whose argument is a SecretStr: JSON gets asterisks instead of the value."""

        def __init__(self) -> None:
            super().__init__(Login, str, "log_in", "Log in.")

        async def run(self, args: Login, cancellation_token: CancellationToken) -> str:
            seen.append(args.password.get_secret_value())
            return "in"

    async with DurableSession("s", nexum=server.address, policies={"log_in": Policy(effect="once")}):
        with pytest.raises(NotDurable, match="a SecretStr, for instance"):
            await LogIn().run_json({"password": "1234"}, CancellationToken())
    async with DurableSession("t", nexum=server.address, policies={"log_in": Policy(retry=RetryPolicy())}):
        assert await LogIn().run_json({"password": "1234"}, CancellationToken()) == "in"
    assert seen == ["1234"]


@pytest.mark.parametrize("policy", [Policy(effect="once"), Policy(approval="always")], ids=["once", "approval"])
async def test_model_call_with_a_lone_surrogate_fails(server: ServerThread, policy: Policy) -> None:
    """If the run ended with an error instead, each further run would replay the reply, and end with this error."""
    happened: list[str] = []

    def note(text: str) -> str:
        happened.append("note")
        return "noted"

    for _ in range(2):
        asks = [FunctionCall(id="1", name="note", arguments=json.dumps({"text": "\ud800"}))]
        async with DurableSession("s", nexum=server.address, policies={"note": policy}):
            result = await AssistantAgent("a", Scripted(happened, asks), tools=[note]).run(task="Q")
        assert "the arguments of note can't be written as JSON" in result.messages[-1].to_text()
    assert happened == ["model"]


async def test_policy_of_a_name_that_is_not_text_is_refused(server: ServerThread) -> None:
    with pytest.raises(InvalidRequest, match="is not text in UTF-8"):
        async with DurableSession("s", nexum=server.address, policies={"\ud800": Policy()}):
            pass


async def test_other_call_in_the_place_of_an_unknown_one_is_drift(server: ServerThread) -> None:
    tool = Pay()
    durable_tool(tool, effect="once")
    await parked(server, tool)
    with pytest.raises(DriftError, match=r'an earlier run has begun pay\(\{"cents":5'):
        async with DurableSession("s", nexum=server.address):
            await tool.run_json({"cents": 6}, CancellationToken())
    assert len(tool.paid) == 1
    lines: list[str] = []
    with logged(lines):
        async with DurableSession("s", nexum=server.address, on_drift="continue"):
            await tool.run_json({"cents": 6}, CancellationToken())
    assert any("an earlier run has begun" in line for line in lines)
    assert len(tool.paid) == 2


@pytest.mark.parametrize("on_drift", ["stop", "continue"])
async def test_equal_call_of_another_version_is_not_made_again(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch, on_drift: Literal["stop", "continue"]
) -> None:
    target = Target(UnknownEffect("the line is dead"), effect="once")
    with monkeypatch.context() as other_version:
        other_version.setattr(
            "durable_autogen.record.guard.EffectInput", lambda **fields: EffectInput(**{**fields, "digest": "other"})
        )
        with pytest.raises(Parked):
            async with DurableSession("s", nexum=server.address, park=True):
                await target.call()
    with pytest.raises(Parked):
        async with DurableSession("s", nexum=server.address, park=True, on_drift=on_drift):
            await target.call()
    assert len(target.done) == 1


@pytest.mark.parametrize("given", [{"result": "receipt 7"}, {"result": [1]}, None, {"recorded_result": {"a": 1}}])
async def test_result_that_a_person_gives_may_be_any_json(server: ServerThread, given: Any) -> None:
    target = Target(UnknownEffect("the line is dead"), effect="once")
    with pytest.raises(Parked) as waits:
        async with DurableSession("s", nexum=server.address, park=True):
            await target.result()
    found = re.search(r"exec-\S+", str(waits.value))
    assert found is not None
    async with NexumClient(server.address) as client:
        await client.resolve(found[0], "effect", output=given)
    for _ in range(2):
        async with DurableSession("s", nexum=server.address):
            result = await target.result()
        # Only a recorded result has this name: a person may copy it from there.
        shown = given["recorded_result"] if isinstance(given, dict) and "recorded_result" in given else given
        assert result.to_text() == ("None" if given is None else json.dumps(shown))


async def test_fork_refuses_a_later_effect_that_has_failed(server: ServerThread) -> None:
    target = Target(OSError("no answer"), effect="once")
    with pytest.raises(OSError, match="no answer"):
        async with DurableSession("s", nexum=server.address):
            await target.call()
    async with NexumClient(server.address) as client:
        with pytest.raises(InvalidRequest, match=r"charge\(\{\"cents\":990\}\) \(failed\)\. Reuse"):
            await fork_session(client, "s", 0, "refused")
        await fork_session(client, "s", 0, "reused", effects="reuse")
    async with DurableSession("reused", nexum=server.address):
        await target.call()
    assert len(target.done) == 2
