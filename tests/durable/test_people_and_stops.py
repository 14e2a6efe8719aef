"""A person's answers and external stops are replayed. If a session has recorded its task, a run may omit the task."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import UserProxyAgent
from autogen_agentchat.conditions import ExternalTermination, FunctionalTermination, MaxMessageTermination
from autogen_agentchat.messages import (
    MultiModalMessage,
    TextMessage,
)
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_agentchat.ui import Console, UserInputManager
from autogen_core import CancellationToken
from autogen_core.models import UserMessage
from durable_agents import (
    TIMEOUT,
    agent,
    answer,
    client,
    named,
    run,
    texts,
)
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import DurableSession, Policy, run_durable_stream
from nexum_engine.errors import InvalidRequest


async def test_user_input_manager_answer_is_replayed(server: ServerThread) -> None:
    asked = 0

    async def person(prompt: str, cancellation_token: CancellationToken | None) -> str:
        nonlocal asked
        asked += 1
        return f"I say {random.random()}"

    async def program() -> list[str]:
        manager = UserInputManager(person)
        user = UserProxyAgent("user", input_func=manager.get_wrapped_callback())

        def build() -> RoundRobinGroupChat:
            return RoundRobinGroupChat([agent(model, "one"), user], max_turns=4)

        stream = run_durable_stream(build, task="Q", session_id="s", nexum=server.address)
        return texts(await asyncio.wait_for(Console(stream, user_input_manager=manager), TIMEOUT))

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await program()
        assert await program() == first
        assert (len(model.requests), asked) == (2, 2)


async def test_person_is_not_asked_again_for_an_input_that_was_given_up(server: ServerThread) -> None:
    asked: list[str] = []

    async def person(prompt: str, cancellation_token: CancellationToken | None) -> str:
        asked.append(prompt)
        await asyncio.Event().wait()
        return "never"

    async def program() -> str:
        user = UserProxyAgent("user", input_func=person)
        async with DurableSession("s", nexum=server.address):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(user.on_messages([], CancellationToken()), 0.5)
            return str((await named(client(model), "a").create([UserMessage(content="Q", source="user")])).content)

    with OpenAIServer(lambda _: answer("yes")) as model:
        assert await program() == await program()
        assert (len(model.requests), len(asked)) == (1, 1)


async def test_external_stop_is_replayed_at_same_message(server: ServerThread) -> None:
    stop = ExternalTermination()
    count = 0

    def reply(_: dict[str, Any]) -> Reply:
        nonlocal count
        count += 1
        if count == 3:
            stop.set()
        return answer("on")

    def build() -> RoundRobinGroupChat:
        limit = stop | MaxMessageTermination(10)
        return RoundRobinGroupChat([agent(model, "one"), agent(model, "two")], termination_condition=limit)

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        assert first.stop_reason == "External termination requested"
        stop = ExternalTermination()
        again = await run(server, build)
        assert (texts(again), again.stop_reason) == (texts(first), first.stop_reason)
        assert len(model.requests) == 3


async def test_changed_program_stops_at_its_own_check(server: ServerThread) -> None:
    def build(system: str) -> RoundRobinGroupChat:
        stop = FunctionalTermination(lambda messages: "STOP" in messages[-1].to_text()) | MaxMessageTermination(6)
        return RoundRobinGroupChat([agent(model, "one", system_message=system)], termination_condition=stop)

    with OpenAIServer(lambda body: answer("STOP" if "Be brief." in json.dumps(body) else "on")) as model:
        assert len((await run(server, lambda: build("Be long."))).messages) == 6
        changed = await run(server, lambda: build("Be brief."), on_drift="continue")
        assert len(changed.messages) == 2
        assert texts(await run(server, lambda: build("Be brief."))) == texts(changed)


@pytest.mark.parametrize(
    "task",
    [
        TextMessage(content="Q", source="alice"),
        [TextMessage(content="Q", source="alice"), TextMessage(content="R", source="bob")],
        MultiModalMessage(content=["Q", "R"], source="alice"),
    ],
)
async def test_any_task_can_be_omitted_if_session_has_one(server: ServerThread, task: Any) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, lambda: agent(model, "one"), task)
        again = await run(server, lambda: agent(model, "one"), None)
        assert again.model_dump() == first.model_dump()
        assert len(model.requests) == 1


async def test_task_messages_can_be_omitted_from_output(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        result = await run(server, lambda: agent(model, "one"), output_task_messages=False)
        assert [message.source for message in result.messages] == ["one"]


async def test_misspelt_on_drift_is_refused(server: ServerThread) -> None:
    with pytest.raises(InvalidRequest, match="on_drift is 'Stop': give one of stop, continue"):
        await run(server, lambda: None, on_drift="Stop")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"budget": 2.0}, r"the budget must be a Budget, for instance Budget\(usd=2\), not 2\.0"),
        ({"policies": Policy(approval="always")}, "policies must be a dictionary of tools' names and Policy objects"),
        ({"policies": {"charge": {"approval": "always"}}}, r"the policy of charge must be a Policy, not \{'approval'"),
    ],
)
async def test_budget_or_policy_of_another_type_is_refused(
    server: ServerThread, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        await run(server, lambda: None, **wrong)


async def asked_by_program(server: ServerThread, model: OpenAIServer) -> list[str]:
    """Ask two questions with `input()`, and a model after each; return the answers."""
    found = []
    async with DurableSession("s", nexum=server.address, tell=lambda _: None):
        for question in ("colour? ", "delete? "):
            found.append(input(question))  # noqa: ASYNC250
            await agent(model, "a").run(task=found[-1])
    return found


async def asked_by_agent(server: ServerThread, model: OpenAIServer) -> list[str]:
    """Let a UserProxyAgent ask two questions in a team; return the answers."""
    async with DurableSession("s", nexum=server.address, tell=lambda _: None):
        team = RoundRobinGroupChat([UserProxyAgent("person"), agent(model, "a")], max_turns=4)
        result = await team.run(task="Q")
    return [one.content for one in result.messages if isinstance(one, TextMessage) and one.source == "person"]


@pytest.mark.parametrize("asked", [asked_by_program, asked_by_agent])
@pytest.mark.parametrize("answers", ["yes\nno\n", "yes \r\nno\n", "no\n"])
@pytest.mark.parametrize("is_pipe", [False, True])
async def test_replayed_answer_is_skipped_in_a_file_or_pipe(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, answers: str, is_pipe: bool
) -> None:
    if is_pipe and not hasattr(os, "set_blocking"):
        pytest.skip("Python before 3.12 can't look into a pipe on Windows")

    def file(text: str) -> Any:
        (tmp_path / "answers").write_bytes(text.encode())
        return stack.enter_context((tmp_path / "answers").open(encoding="utf-8"))

    def open_pipe(text: str) -> Any:
        end, other = os.pipe()
        stack.callback(os.close, other)  # only at the end: until then, a read beyond the text would wait for ever
        os.write(other, text.encode())
        return stack.enter_context(open(end, encoding="utf-8"))

    with ExitStack() as stack, OpenAIServer(lambda _: answer("ok")) as model:
        monkeypatch.setattr(sys, "stdin", file("yes\n"))
        with pytest.raises(Exception, match="EOF"):  # the run ends at the second question
            await asked(server, model)
        monkeypatch.setattr(sys, "stdin", open_pipe(answers) if is_pipe else file(answers))
        assert [said.strip() for said in await asyncio.wait_for(asked(server, model), TIMEOUT)] == ["yes", "no"]
        assert len(model.requests) == 2
