"""An ended session leaves nothing behind: no object, no task, no thread that counts as busy, no unread error."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent, UserProxyAgent
from autogen_agentchat.conditions import TimeoutTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from durable_agents import QUESTION, Scripted, asked, new_session
from harness import Server

from durable_autogen import DriftError, DurableSession, Policy, run_durable_stream
from nexum_engine.errors import InvalidRequest

SOON = 10.0  # seconds


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Yield a list that gets what the event loop reports, such as errors that nobody has read."""
    found: list[str] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: found.append(f"{context['message']}: {context.get('exception')!r}"))
    try:
        yield found
    finally:
        gc.collect()
        loop.set_exception_handler(before)


async def test_ended_session_is_freed_while_its_team_lives(shared_server: Server) -> None:
    model = Scripted([])
    team = RoundRobinGroupChat(
        [AssistantAgent("writer", model)], termination_condition=TimeoutTermination(60), max_turns=1
    )

    async def ended() -> list[weakref.ref[Any]]:
        async with DurableSession(new_session(), nexum=shared_server.address) as session:
            await team.run(task="Q")
            recorder = session.recorder
        return [weakref.ref(session), weakref.ref(recorder)]

    refs = [ref for _ in range(3) for ref in await ended()]
    give_up = asyncio.get_running_loop().time() + SOON
    while any(ref() for ref in refs):  # on a busy machine, grpcio tells the event loop late that a call has ended
        assert asyncio.get_running_loop().time() < give_up, [ref() for ref in refs]
        await asyncio.sleep(0.01)
        gc.collect()


def test_closed_event_loop_of_session_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Let the program open the database itself. With another server, a gRPC connection would keep event loops alive.
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEXUM_ADDRESS", raising=False)

    async def program() -> weakref.ref[Any]:
        async with DurableSession(new_session()):
            await asyncio.gather(*(Scripted([]).create(QUESTION) for _ in range(2)))
        return weakref.ref(asyncio.get_running_loop())

    loops = [asyncio.run(program()) for _ in range(3)]
    gc.collect()
    assert [loop() for loop in loops[:-1]] == [None, None]  # gRPC keeps the last loop alive


async def test_session_that_refuses_its_policies_leaves_no_task(shared_server: Server) -> None:
    session_id = new_session()
    async with DurableSession(session_id, nexum=shared_server.address):
        await Scripted([]).create(QUESTION)
    before = asyncio.all_tasks()
    with pytest.raises(InvalidRequest, match="a model's policy"):
        async with DurableSession(
            session_id, nexum=shared_server.address, policies={"model": Policy(approval="always")}
        ):
            pass
    assert asyncio.all_tasks() == before


async def test_refused_thread_does_not_keep_session_busy(shared_server: Server) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    async with DurableSession(new_session(), nexum=shared_server.address) as session:
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(print)
        assert not session.activity.is_in_thread
        await Scripted([]).create(QUESTION)


async def test_error_of_unrecorded_input_is_not_reported_as_unread(
    monkeypatch: pytest.MonkeyPatch, shared_server: Server
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.1)
    session_id = new_session()
    person = UserProxyAgent("person", input_func=lambda _: (_ for _ in ()).throw(EOFError("no terminal")))
    async with DurableSession(session_id, nexum=shared_server.address):
        await Scripted([]).create(QUESTION)
    with complaints() as found:
        with pytest.raises(DriftError), contextlib.suppress(EOFError):
            async with DurableSession(session_id, nexum=shared_server.address):
                await person.run(task="Q")
        gc.collect()
        await asyncio.sleep(0)
    assert not found


@pytest.mark.parametrize("is_shielded", [True, False])
async def test_call_left_behind_by_a_cancelled_program_is_cancelled(shared_server: Server, is_shielded: bool) -> None:
    name, model = new_session(), Scripted([], lambda: asyncio.sleep(60), "yes")
    left: list[weakref.ref[asyncio.Task[str]]] = []

    async def program() -> str:
        async with DurableSession(name, nexum=shared_server.address):
            asking = asyncio.create_task(asked(model))
            left.append(weakref.ref(asking))
            return await (asyncio.shield(asking) if is_shielded else asyncio.sleep(60, "slept"))

    with complaints() as reported:
        running = asyncio.create_task(program())
        while not model.requests:  # noqa: ASYNC110 - nothing sets an event
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        del running
        await asyncio.sleep(0.01)
    assert reported == []
    assert left[0]() is None
    async with DurableSession(name, nexum=shared_server.address):
        assert await asked(model) == "yes"


async def test_closed_stream_of_run_has_released_its_session(shared_server: Server) -> None:
    session_id, model = new_session(), Scripted([])
    stream = run_durable_stream(
        lambda: RoundRobinGroupChat([AssistantAgent("writer", model)], max_turns=3),
        task="Q",
        session_id=session_id,
        nexum=shared_server.address,
    )
    before = asyncio.all_tasks()
    await stream.__anext__()
    await stream.aclose()
    assert asyncio.all_tasks() == before
