"""Limits of drift: how long a replay waits before it reports drift, and changed programs that continue or fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from durable_agents import (
    TIMEOUT,
    Failing,
    Offline,
    Scripted,
    agent,
    all_of,
    answer,
    ask,
    asked,
    client,
    named,
    run,
    texts,
    whole,
)
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import DriftError, DurableSession, current_session, list_sessions
from durable_autogen.record.recorder import OnDrift
from nexum_engine.client import NexumClient


async def test_programs_own_work_does_not_use_up_drift_patience(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.5)

    async def program(*, more: bool) -> str:
        async with DurableSession("s", nexum=server.address):
            recorded, new = (named(client(model), name) for name in ("a", "b"))
            asking = []
            if more:
                await asyncio.sleep(1.2)  # the program's own work: longer than DRIFT_PATIENCE
                asking = [asyncio.ensure_future(ask(new))]
                await asyncio.sleep(0.05)
            found = await ask(recorded)
            await asyncio.gather(*asking)
            return found

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await whole(lambda: program(more=False))
        assert await whole(lambda: program(more=True)) == first
        assert len(model.requests) == 2


@pytest.mark.parametrize("is_cut_off", [False, True])
async def test_branch_that_works_for_long_beside_another_one_is_no_drift(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch, is_cut_off: bool
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.2)
    happened: list[str] = []
    is_in_flight = asyncio.Event()

    async def answers() -> str:
        await asyncio.sleep(0.1)
        return "yes"

    async def hangs_once() -> str:
        if not is_in_flight.is_set():
            is_in_flight.set()
            await asyncio.Event().wait()
        return "yes"

    async def works() -> None:
        with current_session().agent("works"):
            await asked(Scripted(happened, answers))
            await asyncio.sleep(1.2)  # while the other branch gets a result every 0.1 s; in a replay, all at once
            await asked(Scripted(happened, answers))

    async def asks() -> None:
        with current_session().agent("asks"):
            for _ in range(16):
                await asked(Scripted(happened, answers))
            if is_cut_off:
                await asked(Scripted(happened, hangs_once))

    async def program() -> None:
        async with DurableSession("s", nexum=server.address):
            await asyncio.gather(works(), asks())

    first = asyncio.create_task(program())
    if is_cut_off:
        await asyncio.wait_for(is_in_flight.wait(), TIMEOUT)
        first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    made = len(happened)
    await program()
    assert len(happened) == made + is_cut_off


async def test_another_call_than_the_recorded_one_raises_drift_error(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.1)

    async def program(name: str) -> str:
        async with DurableSession("s", nexum=server.address):
            return await ask(named(client(model), name))

    with OpenAIServer(lambda _: answer("yes")) as model:
        await whole(lambda: program("a"))
        with pytest.raises(DriftError, match="is next on record, but this run asks for reply 1 of b"):
            await whole(lambda: program("b"))
        assert len(model.requests) == 1


async def test_program_that_continues_live_is_reported_once(server: ServerThread) -> None:
    lines: list[str] = []

    def build(system: str) -> RoundRobinGroupChat:
        return RoundRobinGroupChat([AssistantAgent("a", client(model), system_message=system)], max_turns=3)

    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, lambda: build("Be brief."))
        changed = await run(server, lambda: build("Be long."), on_drift="continue", logs=lines)
        assert ["continues live from here" in line for line in lines].count(True) == 1
        assert texts(await run(server, lambda: build("Be long."))) == texts(changed)
        assert len(model.requests) == 6


async def test_replay_knows_where_another_program_continued_session(server: ServerThread) -> None:
    def build(system: str) -> RoundRobinGroupChat:
        one, other = client(model), client(model)
        return RoundRobinGroupChat(
            [AssistantAgent("a", one), AssistantAgent("b", other, system_message=system)], max_turns=3
        )

    with OpenAIServer(lambda _: answer("yes")) as model:
        before = await run(server, lambda: build("Be brief."))
        live = await run(server, lambda: build("Be long."), on_drift="continue")
        again = await run(server, lambda: build("Be long."))
        assert again.model_dump() == live.model_dump()
        ids, left = ([message.id for message in result.messages] for result in (live, before))
        assert [one == other for one, other in zip(ids, left, strict=True)] == [True, True, False, False]
        assert len(model.requests) == 5


async def test_undelivered_failure_is_retried_after_drift(server: ServerThread) -> None:
    broken = True

    async def program(prompt: str, on_drift: OnDrift = "stop") -> list[Any]:
        async with DurableSession("s", nexum=server.address, on_drift=on_drift):
            failing = named(Failing(model, "x", lambda: Offline("no") if broken else None), "x")
            return await all_of(ask(failing), ask(named(client(model), "y"), prompt))

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(Offline):
            await whole(lambda: program("1"))
        broken = False
        changed = await whole(lambda: program("2", "continue"))
        assert await whole(lambda: program("2")) == changed
        assert len(model.requests) == 3


async def test_session_that_continued_after_its_end_is_not_finished(server: ServerThread) -> None:
    broken = True

    def build(turns: int) -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model, "a")], max_turns=turns)

    def reply(_: dict[str, Any]) -> Reply:
        return Reply(status=400) if broken and len(model.requests) == 3 else answer("on")

    with OpenAIServer(reply) as model:
        await run(server, lambda: build(1))
        with pytest.raises(Exception, match="no usable answer"):
            await run(server, lambda: build(3), on_drift="continue")
        async with NexumClient(server.address) as nexum:
            assert [one.status for one in await list_sessions(nexum)] == ["stopped"]
        broken = False
        ended = await run(server, lambda: build(3))  # compared with the second run's record, not with the first one's
        assert len(ended.messages) == 4
        assert len(model.requests) == 4
        async with NexumClient(server.address) as nexum:
            assert [one.status for one in await list_sessions(nexum)] == ["finished"]
