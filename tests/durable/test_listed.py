"""A session in `nexum ps`: one row with its question, calls and tokens, in each state of the session."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.base import Team
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import UserMessage
from autogen_ext.models.replay import ReplayChatCompletionClient
from durable_agents import agent, answer, run
from harness import running
from openai_server import OpenAIServer, Reply
from processes import command_line
from server_thread import ServerThread

from durable_autogen import DurableSession, fork_session, list_sessions, recorded_sessions
from durable_autogen.record.events import Record, read_record
from durable_autogen.session_report import details, table
from nexum_engine.client import NexumClient
from nexum_engine.commands import look
from nexum_engine.records import Execution

TOKENS = 50  # the tokens that the model server reports for each reply
WIDTH = 80


def team(model: OpenAIServer, name: str = "a") -> Team:
    return RoundRobinGroupChat([agent(model, name)], max_turns=3)


async def listed(server: ServerThread, *arguments: str) -> list[Execution]:
    async with NexumClient(server.address) as nexum:
        return await nexum.list_executions(group_sessions=True)


async def tokens(server: ServerThread, session: str) -> int:
    """Return the number of tokens that the models reported for all replies that were not revoked."""
    async with NexumClient(server.address) as nexum:
        values: list[Any] = [
            getattr(event.content, "value", None) for event in (await read_record(nexum, session)).events
        ]
    usages = [value["usage"] for value in values if isinstance(value, dict) and "usage" in value]
    return sum(usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)


async def test_session_is_listed_with_question_calls_and_tokens(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, lambda: team(model), task="How many\n people?")
        await run(server, lambda: team(model), task="How many\n people?")  # a replay, which is the session's latest run
        async with NexumClient(server.address) as nexum:
            await fork_session(nexum, "s", 2, "f", "Shorter")
        await run(server, lambda: team(model), task="How many\n people?", session="f")
    fork, session = await listed(server)
    assert (session.idempotency_key, session.workflow_id, session.status) == ("s/2", "agent-run", "COMPLETED")
    assert session.session is not None
    assert fork.session is not None
    assert (session.session.question, session.session.calls) == ("How many\n people?", 3)
    assert (fork.session.question, fork.session.calls) == ("How many\n people? / Shorter", 3)
    for one in (session.session, fork.session):
        assert one.tokens == await tokens(server, one.session) > 0
        assert not one.is_running
    async with NexumClient(server.address) as nexum:
        assert {one.session: sum(one.calls.values()) for one in await list_sessions(nexum)} == {"s": 3, "f": 3}
    where = ("--nexum", server.address)
    lines = (await look(command_line("ps", *where))).splitlines()
    assert [line.split()[:3] for line in lines[1::3]] == [["session", "f", "COMPLETED"], ["session", "s", "COMPLETED"]]
    assert lines[5] == "    How many  people?"
    assert lines[6] == f"    3 call(s), {session.session.tokens} token(s), {session.session.events} event(s)"
    assert max(map(len, lines)) <= WIDTH
    events = json.loads(await look(command_line("ps", "--all", "--json", *where)))
    assert len(events) > session.session.events + fork.session.events


async def test_shown_session_is_read_without_other_sessions(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    async def noted(client: NexumClient, session: str) -> Record:
        read.append(session)
        return await read_record(client, session)

    with OpenAIServer(lambda _: answer("yes")) as model:
        for name in ("s", "s2", "t"):
            await run(server, lambda: team(model), session=name)
    monkeypatch.setattr(recorded_sessions, "read_record", noted)
    async with NexumClient(server.address) as nexum:
        assert (await recorded_sessions.show_session(nexum, "s")).info.session == "s"
    assert set(read) == {"s"}


async def test_limited_list_has_the_latest_sessions_and_reads_no_other_ones(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    async def noted(client: NexumClient, session: str) -> Record:
        read.append(session)
        return await read_record(client, session)

    for name in ("a", "b", "c", "a"):  # the latest run of session a is the newest run
        async with DurableSession(name, nexum=server.address):
            pass
    monkeypatch.setattr(recorded_sessions, "read_record", noted)
    async with NexumClient(server.address) as nexum:
        assert [one.session for one in await list_sessions(nexum, 2)] == ["a", "c"]
        assert read == ["a", "c"]
        assert [one.session for one in await list_sessions(nexum)] == ["a", "c", "b"]


async def test_session_of_a_program_without_a_task_is_listed_with_the_first_user_message(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        async with DurableSession("s", nexum=server.address):
            for task in ("How many\n people?", "Why?"):
                await agent(model, "a").run(task=task)
        async with DurableSession("empty", nexum=server.address) as empty:
            await empty.sleep(0)
    shown = [one.session.question for one in await listed(server) if one.session is not None]
    assert shown == ["", "How many people?"]
    async with NexumClient(server.address) as nexum:
        sessions = await list_sessions(nexum)
    assert [one.question for one in sessions] == shown
    lines = table(sessions, time.time()).splitlines()
    assert [line.split()[0] for line in lines] == ["empty", "no", "s", "How", "a"]


async def test_fork_of_a_program_without_a_task_is_listed_with_question_and_message(server: ServerThread) -> None:
    async with NexumClient(server.address) as nexum:
        with OpenAIServer(lambda _: answer("yes")) as model:
            async with DurableSession("s", nexum=server.address):
                await agent(model, "a").run(task="How many?")
        await fork_session(nexum, "s", 1, "f", "Shorter")
        assert [one.question for one in await list_sessions(nexum)] == ["How many? / Shorter", "How many?"]


async def test_shown_session_of_a_changed_program_says_how_many_events_it_dropped(
    monkeypatch: pytest.MonkeyPatch, server: ServerThread
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.1)
    with OpenAIServer(lambda _: answer("yes")) as model:
        for name in ("a", "b"):
            async with DurableSession("s", nexum=server.address, on_drift="continue"):
                await agent(model, name).run(task="How many?")
    async with NexumClient(server.address) as nexum:
        lines = details(await recorded_sessions.show_session(nexum, "s"), time.time()).splitlines()
    assert [line.split()[:5] for line in lines[-2:]] == [
        ["revoke", "1", "event(s)", "dropped"],
        ["1", "reply", "1", "of", "b"],
    ]


async def test_shown_session_has_its_contents_in_one_column(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        async with DurableSession("s", nexum=server.address):
            for name in ("a", "an_agent_with_a_rather_long_name"):
                await agent(model, name).run(task="How many?")
    async with NexumClient(server.address) as nexum:
        lines = details(await recorded_sessions.show_session(nexum, "s"), time.time()).splitlines()
    replies = [line for line in lines if " reply 1 of " in line]
    assert {line.index("yes") for line in replies} == {len("   1  reply 1 of an_agent_with_a_rather_long_name  ")}


async def test_failed_call_that_is_revoked_does_not_count(server: ServerThread) -> None:
    replies = iter([answer("one"), Reply(status=400), answer("two"), answer("three")])
    with OpenAIServer(lambda _: next(replies)) as model:
        with pytest.raises(Exception, match="400"):
            await run(server, lambda: team(model))
        (failed,) = await listed(server)
        assert failed.session is not None
        assert (failed.status, failed.session.calls) == ("FAILED", 1)
        await run(server, lambda: team(model))
    (finished,) = await listed(server)
    assert finished.session is not None
    assert (finished.status, finished.session.calls) == ("COMPLETED", 3)
    assert finished.session.tokens == await tokens(server, "s")


async def test_running_session_is_listed_as_running(server: ServerThread) -> None:
    waiting, going = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def reply(_: dict[str, Any]) -> Reply:
        loop.call_soon_threadsafe(waiting.set)
        asyncio.run_coroutine_threadsafe(going.wait(), loop).result(20)
        return answer("yes")

    with OpenAIServer(reply) as model:
        running = asyncio.create_task(run(server, lambda: team(model), task="Why?"))
        await asyncio.wait_for(waiting.wait(), 20)
        (session,) = await listed(server)
        assert session.session is not None
        assert (session.status, session.session.is_running, session.session.question) == ("RUNNING", True, "Why?")
        going.set()
        await running


async def test_list_of_sessions_holds_one_record_at_a_time(server: ServerThread) -> None:
    megabyte = 1024 * 1024
    for number in range(20):
        client = ReplayChatCompletionClient(["x" * megabyte])
        async with DurableSession(f"s{number}", nexum=server.address):
            await client.create([UserMessage(content="q", source="user")])
    async with NexumClient(server.address) as nexum:
        tracemalloc.start()
        try:
            assert len(await list_sessions(nexum)) == 20
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 12 * megabyte


@pytest.mark.parametrize("command", ["nexum_engine ps", "durable_autogen ls", "durable_autogen show s"])
@pytest.mark.parametrize("folder", ["new", "file"])
def test_commands_say_alike_that_nothing_is_recorded_and_make_no_database(
    tmp_path: Path, command: str, folder: str
) -> None:
    (tmp_path / "file").touch()
    url = f"sqlite:///{tmp_path / folder / 'x.db'}"
    with running(["-m", *command.split()], cwd=tmp_path, env={"DATABASE_URL": url}, forked=True) as listing:
        assert listing.wait() in (1, 2)
    assert listing.output.splitlines() == [
        f"error: no server on localhost:50051, and no database at {url}: nothing recorded"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
