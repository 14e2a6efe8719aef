"""Drift, forks, and calls that are cancelled while their results are recorded."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import Team
from autogen_agentchat.conditions import ExternalTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from durable_agents import TIMEOUT, Scripted, agent, answer, client, named, run, texts
from harness import logged
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import DriftError, DurableSession, fork_session, list_sessions
from durable_autogen.autogen.differences import fingerprint_differences
from durable_autogen.autogen.fingerprints import fingerprint_of
from durable_autogen.record.journal import Journal
from durable_autogen.record.recorder import OnDrift
from nexum_engine.client import NexumClient
from nexum_engine.errors import NexumError
from nexum_engine.owner import Owner
from support.models import ModelFailed

# ---- Drift -----------------------------------------------------------------------------------------------------------


@pytest.mark.every_python
async def test_fewer_calls_raise_drift_error_although_call_was_in_flight(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.1)
    loop = asyncio.get_running_loop()
    asked, hold = asyncio.Event(), threading.Event()
    lines: list[str] = []

    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "b" and not hold.is_set():
            loop.call_soon_threadsafe(asked.set)
            hold.wait(TIMEOUT)
        return answer(body["model"])

    async def program(*names: str, on_drift: OnDrift = "stop") -> str:
        with logged(lines):
            return await session_of(*names, on_drift=on_drift)

    async def session_of(*names: str, on_drift: OnDrift) -> str:
        async with DurableSession("s", nexum=server.address, on_drift=on_drift):
            if names[0] == "a":
                await asyncio.sleep(0.2)  # the replay waits twice as long in addition, and reports that it waits
            results = [await agent(model, name).run(task="Q") for name in names]
            return texts(results[-1])[-1]

    with OpenAIServer(reply) as model:
        first = asyncio.create_task(program("a", "b"))
        await asyncio.wait_for(asked.wait(), TIMEOUT)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        hold.set()
        with pytest.raises(DriftError, match=r"is next on record, but this run asks for reply 1 of b"):
            await asyncio.wait_for(program("b"), TIMEOUT)
        assert any(line.startswith("reply 1 of a is next on record: waiting up to ") for line in lines)
        said = await asyncio.wait_for(program("b", on_drift="continue"), TIMEOUT)
        assert await asyncio.wait_for(program("b"), TIMEOUT) == said


async def test_drift_error_does_not_repeat_the_same_beginning_of_a_message(server: ServerThread) -> None:
    begins = "The page in the browser has a long text, and only somewhere after its beginning comes the time: "

    async def program(now: str) -> None:
        async with DurableSession("s", nexum=server.address):
            await Scripted([]).create([UserMessage(content=begins + now, source="surfer")])

    await program("16:02")
    with pytest.raises(DriftError, match=r"number 1 on: it begins with 'The page .*' \(.*\) as before, but differs"):
        await program("16:03")


async def test_replay_does_not_wait_for_given_up_call(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.3)

    async def program(*, more: bool) -> str:
        async with DurableSession("s", nexum=server.address):
            if more:
                other = named(client(model), "b")
                with pytest.raises((asyncio.TimeoutError, TimeoutError)):
                    await asyncio.wait_for(other.create([UserMessage(content="Q", source="user")]), 0.1)
                await asyncio.sleep(1)  # the program's own work: longer than DRIFT_PATIENCE
            result = await named(client(model), "a").create([UserMessage(content="Q", source="user")])
            return str(result.content)

    with OpenAIServer(lambda _: answer("yes")) as model:
        assert await program(more=False) == await program(more=True)


# ---- Forks -----------------------------------------------------------------------------------------------------------


def said_by_the_user(body: dict[str, Any]) -> list[str]:
    return [message["content"] for message in body["messages"] if message["role"] == "user"]


def alone(model: OpenAIServer, name: str = "a") -> Team:
    return RoundRobinGroupChat([agent(model, name)], max_turns=3)


async def test_same_message_can_be_added_to_fork_of_fork(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, lambda: alone(model))
        async with NexumClient(server.address) as nexum:
            await fork_session(nexum, "s", 1, "f1", "Shorter")
            await run(server, lambda: alone(model), session="f1")
            await fork_session(nexum, "f1", 2, "f2", "Shorter")
            await fork_session(nexum, "f1", 2, "f2", "Shorter")  # the same fork again
            first = await run(server, lambda: alone(model), session="f2")
            await fork_session(nexum, "f1", 2, "f2", "Shorter")
        assert said_by_the_user(model.requests[-1].body).count("Shorter") == 2
        asked = len(model.requests)
        assert asked == 3 + 2 + 1
        assert texts(await run(server, lambda: alone(model), session="f2")) == texts(first)
        assert len(model.requests) == asked


async def test_added_message_reaches_agent_after_drift(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, lambda: alone(model))
        async with NexumClient(server.address) as nexum:
            await fork_session(nexum, "s", 2, "f", "Shorter")
            first = await run(server, lambda: alone(model, "other"), task="R", session="f", on_drift="continue")
            assert said_by_the_user(model.requests[-1].body).count("Shorter") == 1
            asked = len(model.requests)
            await fork_session(nexum, "s", 2, "f", "Shorter")
            assert texts(await run(server, lambda: alone(model, "other"), task="R", session="f")) == texts(first)
            assert len(model.requests) == asked
            listed = {one.session: one for one in await list_sessions(nexum)}
            assert listed["f"].question == "R / Shorter"
            assert listed["f"].status == "finished"


@pytest.mark.parametrize(
    ("source", "count", "message", "said"),
    [
        ("s", 2, "", "session f has recorded other events than s"),
        ("s", 0, "", "session f has recorded other events than s"),
        ("r", 1, "", "session f has recorded other events than r"),
        ("s", 1, "Longer", "session f has already continued without this message"),
    ],
)
async def test_fork_into_different_session_is_refused(
    server: ServerThread, source: str, count: int, message: str, said: str
) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        for session in ("s", "r"):
            await run(server, lambda: alone(model), session=session)
        async with NexumClient(server.address) as nexum:
            await fork_session(nexum, "s", 1, "f")
            await run(server, lambda: alone(model), session="f")
            await fork_session(nexum, "s", 1, "f")
            with pytest.raises(DriftError, match=said):
                await fork_session(nexum, source, count, "f", message)


# ---- Cancelled calls -------------------------------------------------------------------------------------------------


class Held:
    """A hook: an Owner that has recorded the event of one position waits until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, position: str) -> None:
        self.recorded, self.go = asyncio.Event(), asyncio.Event()
        complete, record = Owner.complete, Owner.record

        async def hold(output: Any) -> None:
            if getattr(output, "position", "") == position and not self.recorded.is_set():
                self.recorded.set()
                await self.go.wait()

        async def completed(owner: Owner, task: Any, output: Any) -> None:
            await complete(owner, task, output)
            await hold(output)

        async def recorded(owner: Owner, workflow: Any, input: Any, output: Any, **more: Any) -> None:
            await record(owner, workflow, input, output, **more)
            await hold(output)

        monkeypatch.setattr(Owner, "complete", completed)
        monkeypatch.setattr(Owner, "record", recorded)

    async def cancel(self, asking: asyncio.Task[Any]) -> None:
        """Cancel the caller `asking` while the Owner waits."""
        await asyncio.wait_for(self.recorded.wait(), TIMEOUT)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        self.go.set()


QUESTION = [UserMessage(content="Q", source="user")]


async def test_reply_recorded_while_caller_was_cancelled_is_given_up_again(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the replay, the program gives up its first call after 0.5 s. This is longer than
    # DRIFT_PATIENCE, but must not be reported as drift.
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.1)

    async def program(held: Held | None = None) -> str:
        async with DurableSession("s", nexum=server.address):
            durable = named(client(model), "a")
            if held is not None:
                await held.cancel(asyncio.create_task(durable.create(QUESTION)))
            else:
                with pytest.raises((asyncio.TimeoutError, TimeoutError)):
                    await asyncio.wait_for(durable.create(QUESTION), 0.5)
            return str((await durable.create(QUESTION)).content)

    with OpenAIServer(lambda _: answer("yes")) as model:
        said = await program(Held(monkeypatch, "reply/1"))
        async with NexumClient(server.address) as nexum:
            (listed,) = await list_sessions(nexum)
        assert listed.status == "finished"
        assert await asyncio.wait_for(program(), TIMEOUT) == said
        assert len(model.requests) == 2


async def test_call_is_given_up_again_although_the_run_ended_before_it_could_drop_the_result(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.3)
    executed: list[str] = []
    fast_is_done = asyncio.Event()

    async def tool(name: str) -> str:
        executed.append(name)
        if name == "slow":
            await fast_is_done.wait()
        return f"{name} is done"

    async def program(held: Held | None = None) -> list[str]:
        async def call(name: str) -> str:
            return str(await FunctionTool(tool, "A tool.").run_json({"name": name}, CancellationToken()))

        async with DurableSession("s", nexum=server.address):
            slow = asyncio.create_task(call("slow"))
            first = await call("fast")
            fast_is_done.set()
            if held is not None:
                await held.cancel(slow)
            slow.cancel()
            await asyncio.gather(slow, return_exceptions=True)
            return [first, await call("last")]

    async def unreachable(*_: Any, **__: Any) -> None:
        raise NexumError("the server can't be reached")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "revoke", unreachable)
        with pytest.raises(NexumError, match="can't be reached"):
            await program(Held(patched, "reply/0/tool/2"))
    for _ in range(2):
        assert await asyncio.wait_for(program(), TIMEOUT) == ["fast is done", "last is done"]
    assert sorted(executed) == ["fast", "last", "slow"]


async def test_survived_failure_is_recorded_once_although_next_call_was_given_up(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = iter([Reply(status=400), answer("given up"), answer("yes")])
    held = Held(monkeypatch, "reply/2")

    async def program(*, first: bool) -> str:
        async with DurableSession("s", nexum=server.address):
            durable = named(client(model), "a")
            with pytest.raises(ModelFailed):
                await durable.create(QUESTION)
            if first:
                await held.cancel(asyncio.create_task(durable.create(QUESTION)))
            else:
                with pytest.raises((asyncio.TimeoutError, TimeoutError)):
                    await asyncio.wait_for(durable.create(QUESTION), 0.5)
            return str((await durable.create(QUESTION)).content)

    with OpenAIServer(lambda _: next(replies)) as model:
        said = await program(first=True)
        assert await asyncio.wait_for(program(first=False), TIMEOUT) == said
        assert len(model.requests) == 3


async def test_duration_of_call_does_not_extend_drift_patience(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.2)
    lines: list[str] = []

    async def program(*names: str) -> None:
        with logged(lines):
            async with DurableSession("s", nexum=server.address):
                for name in names:
                    await named(client(model), name).create(QUESTION)

    def reply(_: dict[str, Any]) -> Reply:
        hold.wait(3)
        return answer("yes")

    hold = threading.Event()
    with OpenAIServer(reply) as model:
        await program("a")  # this call takes 3 s: the patience of the next run must not depend on that
        hold.set()
        with pytest.raises(DriftError, match="is next on record, but this run asks for reply 1 of b"):
            await asyncio.wait_for(program("b"), 2)


async def test_fork_keeps_external_stop(server: ServerThread) -> None:
    def build() -> Team:
        stopped = ExternalTermination()
        stopped.set()
        inner = RoundRobinGroupChat([agent(model, "i")], termination_condition=stopped, max_turns=3, name="inner")
        return RoundRobinGroupChat([inner, agent(model, "o")], max_turns=2)

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, build)
        asked = len(model.requests)
        async with NexumClient(server.address) as nexum:
            await fork_session(nexum, "s", asked, "f")
        assert texts(await run(server, build, session="f")) == texts(first)
        assert len(model.requests) == asked


@pytest.mark.every_python
@pytest.mark.parametrize("is_team", [False, True])
async def test_model_call_cancelled_by_token_ends_the_same_in_replay(server: ServerThread, is_team: bool) -> None:
    answers = threading.Event()
    tokens: list[CancellationToken] = []
    loop = asyncio.get_running_loop()

    def reply(_: dict[str, Any]) -> Reply:
        if len(model.requests) == 1:
            loop.call_soon_threadsafe(tokens[0].cancel)
            answers.wait(TIMEOUT)
        return answer("yes")

    async def program() -> list[str]:
        ends = []
        async with DurableSession("s", nexum=server.address):
            runnable = alone(model) if is_team else agent(model, "a")
            token = CancellationToken()
            tokens.append(token)
            if len(tokens) > 1:
                loop.call_later(0.1, token.cancel)  # the replay makes no request
            try:
                await runnable.run(task="Q", cancellation_token=token)
            except asyncio.CancelledError:
                ends.append("cancelled")
            other = agent(model, "b")
            ends += texts(await other.run(task="Q"))
        return ends

    with OpenAIServer(reply) as model:
        first = await asyncio.wait_for(program(), TIMEOUT)
        assert first[0] == "cancelled"
        answers.set()
        assert await asyncio.wait_for(program(), TIMEOUT) == first
        assert len(model.requests) == 2


@pytest.mark.every_python
async def test_cancelled_tool_is_called_again_in_next_run(server: ServerThread) -> None:
    begun: list[asyncio.Event] = [asyncio.Event(), asyncio.Event()]
    runs = 0

    async def slow() -> str:
        nonlocal runs
        runs += 1
        begun[runs - 1].set()
        if runs == 1:
            await asyncio.Event().wait()
        return "done"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if body["messages"][-1]["role"] == "tool" else Reply(calls=[("slow", {})])

    async def program(token: CancellationToken | None = None) -> list[str]:
        async with DurableSession("s", nexum=server.address):
            one = AssistantAgent("one", client(model), tools=[slow], max_tool_iterations=3)
            return texts(await one.run(task="Q", cancellation_token=token))

    with OpenAIServer(reply) as model:
        token = CancellationToken()
        running = asyncio.create_task(program(token))
        await asyncio.wait_for(begun[0].wait(), TIMEOUT)
        token.cancel()
        await asyncio.wait({running}, timeout=TIMEOUT)
        assert running.cancelled() or running.exception() is not None
        said = await asyncio.wait_for(program(), TIMEOUT)
        assert runs == 2
        assert "done" in said[2]
        assert await asyncio.wait_for(program(), TIMEOUT) == said
        assert runs == 2


@pytest.mark.every_python
def test_token_can_be_cancelled_after_run(server: ServerThread) -> None:
    token = CancellationToken()
    with OpenAIServer(lambda _: answer("yes")) as model:
        asyncio.run(run(server, lambda: agent(model, "a"), cancellation_token=token))
    token.cancel()
    assert token.is_cancelled()


@pytest.mark.parametrize("part", ["workbench", "memory", "method"])
def test_changed_object_or_method_is_named(part: str) -> None:
    recorded, now = fingerprint_of({part: "One"}), fingerprint_of({part: "Other"})
    assert fingerprint_differences(recorded, now) == [f"the {part} was One, now it is Other"]
