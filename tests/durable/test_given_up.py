"""A call that the program gives up is on record with what the program got of it, and is given up again by a replay."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import BaseChatMessage, ModelClientStreamingChunkEvent, TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken
from autogen_core.models import ChatCompletionClient, CreateResult
from autogen_core.tools import BaseTool, FunctionTool
from durable_agents import QUESTION, TIMEOUT, Own, Scripted, asked, inside, new_session, plain, reply, run, twice, word
from harness import Server, nexum_server
from pydantic import BaseModel

pytestmark = pytest.mark.every_python


GIVEN_UP_AFTER = 0.1  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole file: each test has sessions of its own."""
    with nexum_server(tmp_path_factory.mktemp("nexum")) as running:
        yield running


@pytest.fixture
def happened() -> list[str]:
    """What was asked and done live."""
    return []


async def hangs() -> str:
    """What a model does that never answers."""
    await asyncio.Event().wait()
    return "never"


class Nothing(BaseModel):
    """No arguments."""


class Said(BaseModel):
    """What a tool answers."""

    words: str


class Pieces(Scripted):
    """Streams its script piece by piece. An error is raised there; an async function is awaited there."""

    async def create_stream(self, messages: Sequence[Any], **_: Any) -> AsyncGenerator[str | CreateResult, None]:
        self.happened.append(self.name)
        said = ""
        while self.script and (piece := self.script.pop(0)) is not None:
            if isinstance(piece, Exception):
                raise piece
            if callable(piece):
                await piece()
            else:
                said += piece
                yield piece
        yield reply(said)


async def said_until(stop: str, client: ChatCompletionClient) -> str:
    """Read a stream, and leave it at a word."""
    said = ""
    async for piece in client.create_stream(QUESTION):
        if isinstance(piece, str):
            said += piece
            if stop in said:
                break
    return said


def by(act: Callable[[], Awaitable[str]], happened: list[str], turns: int = 2) -> RoundRobinGroupChat:
    """A team of an agent that acts so, and one that asks a model after it."""
    return RoundRobinGroupChat(
        [Own("hasty", lambda _: act()), AssistantAgent("next", Scripted(happened, name="next"))], max_turns=turns
    )


@pytest.mark.parametrize("then", ["the stream hangs", "the stream is over"])
@pytest.mark.parametrize("turns", [1, 2])
async def test_agent_that_leaves_its_stream_gets_the_same_pieces_again(
    server: Server, happened: list[str], then: str, turns: int
) -> None:
    async def act() -> str:
        more: list[Any] = [hangs] if then == "the stream hangs" else []
        return await said_until("STOP", Pieces(happened, f"{word()} ", "STOP ", "more ", *more, "and more"))

    async def program() -> TaskResult:
        return await by(act, happened, turns).run(task="Q")

    result = await twice(server, program, happened)
    assert result["messages"][1]["content"].endswith("STOP ")
    assert happened == ["model", "next"][:turns]


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("what", ["model", "tool", "own stream"])
async def test_call_given_up_by_wait_for_is_given_up_again(
    server: Server, happened: list[str], turns: int, what: str
) -> None:
    async def act() -> str:
        if what == "model":
            call: Awaitable[Any] = asked(Scripted(happened, hangs))
        elif what == "tool":

            async def wait() -> str:
                happened.append("tool")
                return await hangs()

            call = FunctionTool(wait, "Wait.").run_json({}, CancellationToken())
        else:
            call = said_until("never", Pieces(happened, "one ", hangs))
        with contextlib.suppress(asyncio.TimeoutError):
            return str(await asyncio.wait_for(call, GIVEN_UP_AFTER))
        return "gave up"

    async def team() -> TaskResult:
        return await by(act, happened, turns).run(task="Q")

    result = await twice(server, team, happened)
    assert result["messages"][-1]["content"] == "gave up"
    assert len(happened) == (1 if turns == 1 else 3)
    session = new_session()
    first = await run(server, lambda: by(act, happened, turns), session=session)
    happened.clear()
    assert (await run(server, lambda: by(act, happened, turns), session=session)).model_dump() == first.model_dump()
    assert happened == []


async def test_loser_of_a_race_is_cancelled_again(server: Server, happened: list[str]) -> None:
    async def program() -> list[str]:
        said = []
        for number in range(3):
            racers = [
                asyncio.create_task(asked(Scripted(happened, name="quick"))),
                asyncio.create_task(asked(Scripted(happened, hangs, name="slow"))),
            ]
            if number % 2:
                racers.reverse()
            done, pending = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            if number == 2:
                await asyncio.wait(pending)
            said += [task.result() for task in done]
        return said

    assert len(await twice(server, program, happened)) == 3
    assert sorted(happened) == ["quick"] * 3 + ["slow"] * 3


class Retrying(Own):
    """Asks again when its stream breaks; every attempt is streamed under a message id of its own."""

    def __init__(self, client: ChatCompletionClient) -> None:
        super().__init__("retrying", lambda _: asked(client))
        self.client = client

    async def on_messages_stream(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> AsyncGenerator[Any, None]:
        said, tried = "", 0
        while not said:
            tried, message = tried + 1, uuid.uuid4().hex
            with contextlib.suppress(ConnectionError):
                async for piece in self.client.create_stream(QUESTION):
                    if isinstance(piece, str):
                        yield ModelClientStreamingChunkEvent(content=piece, source=self.name, full_message_id=message)
                    else:
                        said = str(piece.content)
        yield Response(chat_message=TextMessage(content=f"{said} {tried}", source=self.name, id=message))


async def test_broken_stream_that_is_tried_again_has_the_same_message_ids(server: Server, happened: list[str]) -> None:
    async def program() -> list[tuple[str, str | None]]:
        broken = ConnectionError(word())
        script = ["one ", "two ", broken, broken, "three ", "four ", broken, word(), None, word()]
        team = RoundRobinGroupChat([Retrying(Pieces(happened, *script))], max_turns=2)
        found: list[tuple[str, str | None]] = []
        async for item in team.run_stream(task="Q"):
            if isinstance(item, ModelClientStreamingChunkEvent):
                found.append((item.content, item.full_message_id))
            elif isinstance(item, TextMessage):
                found.append((item.content, item.id))
        return found

    found = await twice(server, program, happened)
    assert len(happened) == 5
    # The task, three attempts that streamed something in the first turn, and one in the second.
    assert len({message for _, message in found}) == 5
    assert [said for said, _ in found if said in ("one ", "three ")] == ["one ", "three "]


async def test_call_left_running_at_session_end_does_not_hold_it_up_and_is_not_asked_again(
    server: Server, happened: list[str]
) -> None:
    left: list[asyncio.Task[str]] = []

    async def program() -> str:
        left.append(asyncio.create_task(asked(Scripted(happened, hangs, name="left"))))
        said = await asked(Scripted(happened, name="last"))
        await asyncio.sleep(0.1)  # the program's own work, within which a replay would ask again
        return said

    await asyncio.wait_for(twice(server, program, happened), TIMEOUT)
    assert sorted(happened) == ["last", "left"]
    done, _ = await asyncio.wait(left, timeout=TIMEOUT)
    assert len(done) == 2


@pytest.mark.parametrize("is_team", [True, False])
async def test_cancelled_session_records_nothing_as_given_up_and_asks_again(
    server: Server, happened: list[str], is_team: bool
) -> None:
    begun = asyncio.Event()
    session = new_session()
    survives = False

    async def answers() -> str:
        begun.set()
        return word() if survives else await hangs()

    async def act() -> str:
        first = await asked(Scripted(happened, name="first"))
        return f"{first} {await asked(Scripted(happened, answers, name='second'))}"

    async def program() -> Any:
        # Not the team's own `run`: cancelled, it waits for its agent for ever.
        return plain(await run(server, lambda: by(act, happened), session=session)) if is_team else await alone()

    async def alone() -> Any:
        return await inside(server, act, session)

    for number in range(2):  # the second replays, and is cancelled at the same call
        begun.clear()
        running = asyncio.create_task(program())
        await asyncio.wait_for(begun.wait(), TIMEOUT)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert happened == ["first", *["second"] * (number + 1)]
    survives = True
    whole = await program()
    expected = ["first", *["second"] * 3, *(["next"] if is_team else [])]
    assert happened == expected
    assert await program() == whole
    assert happened == expected


async def test_call_with_a_token_that_is_cancelled_already_is_for_the_tool_to_answer(
    server: Server, happened: list[str]
) -> None:
    class Careful(BaseTool[Nothing, Said]):
        """Answers although it is cancelled, as AutoGen's command-line executor does."""

        def __init__(self) -> None:
            super().__init__(Nothing, Said, "careful", "Answers.")

        async def run(self, args: Nothing, cancellation_token: CancellationToken) -> Said:
            happened.append("ran")
            return Said(words="cancelled before it began" if cancellation_token.is_cancelled() else "done")

    async def program() -> str:
        token = CancellationToken()
        token.cancel()
        said: Said = await Careful().run_json({}, token)
        return said.words

    session = new_session()
    for _ in range(2):
        assert await inside(server, program, session) == "cancelled before it began"
    assert happened == ["ran"]
