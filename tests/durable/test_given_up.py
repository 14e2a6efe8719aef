"""A call that the program gave up is recorded with the streamed pieces so far, and a replay gives it up again."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import BaseChatMessage, ModelClientStreamingChunkEvent, TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken
from autogen_core.models import ChatCompletionClient, CreateResult, UserMessage
from autogen_core.tools import BaseTool, FunctionTool
from durable_agents import QUESTION, TIMEOUT, Own, Scripted, asked, inside, new_session, plain, reply, run, twice, word
from harness import Server
from pydantic import BaseModel

from durable_autogen import DriftError, RunCancelled, current_session
from durable_autogen.errors import NotDurable
from durable_autogen.record import recorder
from durable_autogen.record.events import Event
from durable_autogen.record.journal import Journal
from durable_autogen.record.recorder import Recorder
from durable_autogen.record.setbacks import Setbacks
from nexum_engine.errors import NexumError
from nexum_engine.owner import Owner

pytestmark = pytest.mark.every_python


GIVEN_UP_AFTER = 0.6  # seconds; long enough for the call to begin on a busy machine


@pytest.fixture
def happened() -> list[str]:
    """A list to which a test's live calls and effects are added."""
    return []


async def hangs() -> str:
    """Wait for ever, like a model that never answers."""
    await asyncio.Event().wait()
    return "never"


async def skipped(*_: Any) -> None:
    """Do nothing."""


def cancelled_at_once(begin: Callable[..., None]) -> Callable[..., None]:
    """Return a function that cancels the current task, and then calls `begin`."""

    def cancelled(*args: Any, **more: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        begin(*args, **more)

    return cancelled


class Nothing(BaseModel):
    """The arguments of a tool that takes none."""


class Said(BaseModel):
    """A tool's answer."""

    words: str


class Pieces(Scripted):
    """A model that streams its script: texts are pieces, errors are raised, functions awaited. None ends a reply."""

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
    """Return a stream's text up to the word `stop`; leave the stream there."""
    said = ""
    async for piece in client.create_stream(QUESTION):
        if isinstance(piece, str):
            said += piece
            if stop in said:
                break
    return said


def by(act: Callable[[], Awaitable[str]], happened: list[str], turns: int = 2) -> RoundRobinGroupChat:
    """Return a team of two agents. The first agent calls `act`, and then the second agent asks a model."""
    return RoundRobinGroupChat(
        [Own("hasty", lambda _: act()), AssistantAgent("next", Scripted(happened, name="next"))], max_turns=turns
    )


@pytest.mark.parametrize("then", ["the stream hangs", "the stream is over"])
@pytest.mark.parametrize("turns", [1, 2])
async def test_agent_that_leaves_stream_gets_same_pieces_in_replay(
    shared_server: Server, happened: list[str], then: str, turns: int
) -> None:
    async def act() -> str:
        more: list[Any] = [hangs] if then == "the stream hangs" else []
        return await said_until("STOP", Pieces(happened, f"{word()} ", "STOP ", "more ", *more, "and more"))

    async def program() -> TaskResult:
        return await by(act, happened, turns).run(task="Q")

    result = await twice(shared_server, program, happened)
    assert result["messages"][1]["content"].endswith("STOP ")
    assert happened == ["model", "next"][:turns]


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("what", ["model", "tool", "own stream"])
async def test_call_cancelled_by_wait_for_is_cancelled_in_replay(
    shared_server: Server, happened: list[str], turns: int, what: str
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

    result = await twice(shared_server, team, happened)
    assert result["messages"][-1]["content"] == "gave up"
    assert len(happened) == (1 if turns == 1 else 3)
    session = new_session()
    first = await run(shared_server, lambda: by(act, happened, turns), session=session)
    happened.clear()
    assert (
        await run(shared_server, lambda: by(act, happened, turns), session=session)
    ).model_dump() == first.model_dump()
    assert happened == []


async def test_background_task_gets_its_results_although_the_replayed_program_ends_first(
    shared_server: Server, happened: list[str]
) -> None:
    async def program() -> str:
        is_done = asyncio.Event()

        async def works() -> None:
            with current_session().agent("worker"):
                await asked(Scripted(happened, name="worker"))
                await asked(Scripted(happened, name="worker"))
            is_done.set()

        async def waits() -> None:
            await is_done.wait()

        working = asyncio.create_task(works())
        said = await said_until("STOP", Pieces(happened, waits, "STOP ", hangs))  # a replay has these pieces at once
        working.add_done_callback(lambda _: None)  # keep the task until here
        return said

    assert await twice(shared_server, program, happened) == "STOP "
    assert sorted(happened) == ["model", "worker", "worker"]


@pytest.mark.parametrize("asks_more", [False, True])
async def test_recorded_reply_whose_stream_the_killed_program_had_left_is_given_up(
    shared_server: Server, happened: list[str], monkeypatch: pytest.MonkeyPatch, asks_more: bool
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.2)
    session = new_session()
    record, is_recorded, is_left = Journal.record, asyncio.Event(), asyncio.Event()

    async def slowly(self: Journal, *args: Any, **options: Any) -> Event:
        event = await record(self, *args, **options)
        is_recorded.set()
        await is_left.wait()
        return event

    async def killed(self: Recorder, _: Any, running: asyncio.Task[None]) -> None:
        is_left.set()
        await asyncio.wait({running})
        self.stop(NexumError("killed before the reply is revoked"))

    async def program() -> list[str]:
        said = []
        async for piece in Pieces(happened, "STOP ", "more ", "and more").create_stream(QUESTION):
            said.append(str(piece))
            await is_recorded.wait()
            break
        if asks_more or is_first_run:
            said.append(await asked(Scripted(happened, name="next")))
        return said

    is_first_run = True
    with monkeypatch.context() as in_first_run:
        in_first_run.setattr(Journal, "record", slowly)
        in_first_run.setattr(Recorder, "_take_back", killed)
        with pytest.raises(NexumError, match="killed before"):
            await inside(shared_server, program, session)
    assert happened == ["model"]
    is_first_run = False
    continued = await inside(shared_server, program, session)
    assert continued[0] == "STOP "
    assert await inside(shared_server, program, session) == continued
    assert happened == ["model", *(["next"] if asks_more else [])]


async def test_loser_of_race_is_cancelled_in_replay(shared_server: Server, happened: list[str]) -> None:
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

    assert len(await twice(shared_server, program, happened)) == 3
    assert sorted(happened) == ["quick"] * 3 + ["slow"] * 3


class Retrying(Own):
    """An agent that retries when its stream breaks. Each attempt has its own message id."""

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


async def test_retried_stream_has_same_message_ids_in_replay(shared_server: Server, happened: list[str]) -> None:
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

    found = await twice(shared_server, program, happened)
    assert len(happened) == 5
    # The task has one id, and the second turn has one. In the first turn, three attempts streamed pieces: three ids.
    assert len({message for _, message in found}) == 5
    assert [said for said, _ in found if said in ("one ", "three ")] == ["one ", "three "]


async def test_call_left_running_at_session_end_is_given_up(shared_server: Server, happened: list[str]) -> None:
    left: list[asyncio.Task[str]] = []

    async def program() -> str:
        left.append(asyncio.create_task(asked(Scripted(happened, hangs, name="left"))))
        said = await asked(Scripted(happened, name="last"))
        await asyncio.sleep(0.1)  # if the first call were not given up, a replay would have time to make it again
        return said

    await asyncio.wait_for(twice(shared_server, program, happened), TIMEOUT)
    assert sorted(happened) == ["last", "left"]
    found = await asyncio.gather(*left, return_exceptions=True)
    assert [type(one) for one in found] == [NotDurable] * 2
    assert all("has ended, and this call was started inside it: await the call before" in str(one) for one in found)


async def test_call_left_running_by_a_failed_program_gets_an_error_that_says_so(
    shared_server: Server, happened: list[str]
) -> None:
    begun = asyncio.Event()
    left: list[asyncio.Task[str]] = []

    async def hangs_after_its_beginning() -> str:
        begun.set()
        return await hangs()

    async def program() -> None:
        left.append(asyncio.create_task(asked(Scripted(happened, hangs_after_its_beginning))))
        await begun.wait()
        raise LookupError

    with pytest.raises(LookupError):
        await inside(shared_server, program, new_session())
    with pytest.raises(NotDurable, match="has ended, and this call was started inside it: await the call before"):
        await asyncio.wait_for(left[0], TIMEOUT)


@pytest.mark.parametrize("is_team", [True, False])
async def test_cancelled_session_records_no_given_up_call_and_retries(
    shared_server: Server, happened: list[str], is_team: bool
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
        # Don't call the team's own `run`: when `run` is cancelled, it waits for its agent for ever.
        return plain(await run(shared_server, lambda: by(act, happened), session=session)) if is_team else await alone()

    async def alone() -> Any:
        return await inside(shared_server, act, session)

    for number in range(2):  # the second run replays, and is cancelled at the same call
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


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 can't tell which tasks are being cancelled")
@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize("is_recorded", [True, False])
async def test_cancellation_during_replay_keeps_the_record(
    shared_server: Server, happened: list[str], is_recorded: bool, is_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean-up makes a call of the recorded run, or another one, which can't be made before the replay is over."""
    session = new_session()
    is_here, goes_on = asyncio.Event(), True

    async def act() -> str:
        try:
            await asked(Scripted(happened, name="first"))
            is_here.set()
            if not goes_on:
                await hangs()
        except asyncio.CancelledError:
            if not is_recorded:
                with current_session().agent("undo"):
                    await asked(Scripted(happened, name="undo"))
            raise
        finally:
            await asked(Scripted(happened, name="tidy up"))
        await asked(Scripted(happened, name="next"))
        if is_down:
            raise LookupError("so that the session isn't finished")
        return await asked(Scripted(happened, name="last"))

    is_down = True
    with pytest.raises(LookupError):
        await inside(shared_server, act, session)
    goes_on = False
    is_here.clear()
    running = asyncio.create_task(inside(shared_server, act, session))
    if is_early:  # as the session is opened, so that the program's first `await` is cancelled
        with monkeypatch.context() as patched:
            patched.setattr(Recorder, "__init__", cancelled_at_once(Recorder.__init__))
            await asyncio.wait({running}, timeout=8)
    else:
        await asyncio.wait_for(is_here.wait(), TIMEOUT)
        running.cancel()
        await asyncio.wait({running}, timeout=8)
    assert running.cancelled()
    goes_on, is_down = True, False
    await inside(shared_server, act, session)
    assert happened == ["first", "tidy up", "next", "last"]


async def test_program_that_once_caught_a_cancellation_keeps_its_later_calls(
    shared_server: Server, happened: list[str]
) -> None:
    """Such a task counts as cancelled until it ends. In Python 3.11 and 3.12, so it does after a failed TaskGroup."""
    session, here = new_session(), asyncio.Event()
    is_down = True

    async def act() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await asyncio.sleep(0)
            finally:
                await asked(Scripted(happened, name="tidy up"))
        names = ("first", "second")
        found = [await asked(Scripted(happened, name=name)) for name in names]
        found += await asyncio.gather(*(asked(Scripted(happened, name=name)) for name in names))
        here.set()
        return "".join(found) + await asked(Scripted(happened, *[hangs] * is_down, name="last"))

    running = asyncio.create_task(inside(shared_server, act, session))
    await asyncio.wait_for(here.wait(), TIMEOUT)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    is_down = False
    happened.clear()
    await inside(shared_server, act, session)
    assert happened == ["last"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 can't tell which tasks are being cancelled")
@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        *("in the program", "in an agent", "in two tasks", "by a team", "by streams", "in vain"),
        *("by tasks of its own", "by tasks of two tasks"),
    ],
)
async def test_cancelled_program_that_cleans_up_with_calls_continues_in_next_run(
    shared_server: Server, happened: list[str], how: str, is_killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean-up's calls are made again: a run that isn't cancelled makes them at another time, or not at all."""
    if is_killed:  # at the end of its clean-up
        monkeypatch.setattr(Recorder, "end_with", skipped)
        monkeypatch.setattr(recorder, "DRIFT_PATIENCE", 0.5)
    begun = asyncio.Semaphore(0)
    session = new_session()
    survives = False

    async def answers() -> str:
        begun.release()
        return word() if survives else await hangs()

    async def work(branch: str) -> str:
        if branch == "one":  # then a later run waits longer for the cancellation of this branch
            await asyncio.sleep(0.2)
        with current_session().agent(branch):
            try:
                return await asked(Scripted(happened, answers, name="work"))
            except asyncio.CancelledError:
                if how.startswith("by tasks"):
                    await asyncio.shield(asked(Scripted(happened, name="undo")))
                    await asyncio.gather(asyncio.wait_for(asked(Scripted(happened, name="undo")), TIMEOUT))
                    raise
                if how == "by streams":
                    question = UserMessage(content="Q", source="user")
                    assert [piece async for piece in Scripted(happened, name="undo").create_stream([question])]
                else:
                    await asked(Scripted(happened, name="undo"))
                model = Scripted(happened, *[LookupError("gone")] * (how == "in vain"), name="undo")
                agent = AssistantAgent(f"undo_{branch}", model, model_client_stream=how == "by streams")
                if how == "by a team":
                    await RoundRobinGroupChat([agent], max_turns=1).run(task="Q")
                else:
                    await agent.run(task="Q")
                raise

    async def act() -> str:
        first = await asked(Scripted(happened, name="first"))
        if sys.version_info >= (3, 11):  # for mypy
            with contextlib.suppress(TimeoutError):  # this cancellation doesn't come from outside
                async with asyncio.timeout(GIVEN_UP_AFTER):
                    try:
                        await asked(Scripted(happened, hangs, name="late"))
                    finally:
                        await asked(Scripted(happened, name="note"))
        if how in ("in the program", "by a team", "by streams", "in vain", "by tasks of its own"):
            return first + await work("")
        if how == "in an agent":
            agent = Own("one", lambda _: work("one"))
            return first + str((await agent.run(task="Q")).messages[-1])
        return first + "".join(await asyncio.gather(work("one"), work("two")))

    at_once = 2 if "two tasks" in how else 1
    for number in range(2):
        running = asyncio.create_task(inside(shared_server, act, session))
        for _ in range(at_once):
            await asyncio.wait_for(begun.acquire(), TIMEOUT)
        running.cancel()
        with pytest.raises((asyncio.CancelledError, LookupError)):
            await running
        again = [*["work"] * at_once, *["undo"] * 2 * at_once]
        assert happened == ["first", "late", "note", *again * (number + 1)]
    happened.clear()
    survives = True
    whole = await inside(shared_server, act, session)
    assert happened == ["work"] * at_once
    assert await inside(shared_server, act, session) == whole
    assert happened == ["work"] * at_once


async def test_sessions_use_the_programs_task_factory_and_leave_it_in_place(shared_server: Server) -> None:
    """Sessions wrap the event loop's task factory, so that the tasks of a clean-up know that they belong to it."""
    started: list[str] = []

    def start(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        started.append(work.__qualname__)
        return asyncio.Task(work, loop=loop, **options)

    async def program(seconds: float) -> str:
        task = asyncio.create_task(asyncio.sleep(seconds, "slept"), name="named")
        assert task.get_name() == "named"
        return await task

    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    for factory in (None, start):
        loop.set_task_factory(factory)
        try:
            # The sessions overlap, and the first one ends first.
            programs = [partial(program, seconds) for seconds in (0.1, 0.3)]
            said = await asyncio.gather(*(inside(shared_server, one, new_session()) for one in programs))
            assert loop.get_task_factory() is factory
        finally:
            loop.set_task_factory(before)
        assert said == ["slept"] * 2
    assert started.count("sleep") == 2


async def test_tool_answers_call_with_already_cancelled_token(shared_server: Server, happened: list[str]) -> None:
    class Careful(BaseTool[Nothing, Said]):
        """Return an answer although the token is cancelled, as AutoGen's command-line executor does."""

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
        assert await inside(shared_server, program, session) == "cancelled before it began"
    assert happened == ["ran"]


def test_token_of_replayed_given_up_call_can_be_cancelled_after_end_of_its_event_loop(
    shared_server: Server, happened: list[str]
) -> None:
    async def wait() -> str:
        happened.append("tool")
        return await hangs()

    async def program() -> CancellationToken:
        token = CancellationToken()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(FunctionTool(wait, "Wait.").run_json({}, token), GIVEN_UP_AFTER)
        return token

    session = new_session()
    tokens = [asyncio.run(inside(shared_server, program, session)) for _ in range(2)]
    assert happened == ["tool"]
    for token in tokens:
        token.cancel()


async def test_call_given_up_while_server_is_slow_to_record_it_keeps_the_session(
    shared_server: Server, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.pending_call.TAKE_OVER_PATIENCE", 0.1)
    record = Owner.record
    is_recorded, answers = asyncio.Event(), asyncio.Event()

    async def slowly(self: Owner, *args: Any, **options: Any) -> None:
        await record(self, *args, **options)
        if happened == ["slow"] and not is_recorded.is_set():
            is_recorded.set()
            await answers.wait()

    async def program() -> str:
        asking = asyncio.create_task(asked(Scripted(happened, name="slow")))
        await wait_for_record()
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking

        async def next_reply() -> str:
            answers.set()  # later than TAKE_OVER_PATIENCE: this call has waited for the call before (GIVE_UP_PATIENCE)
            return word()

        return await asked(Scripted(happened, next_reply, name="next"))

    async def wait_for_record() -> None:
        await (asyncio.sleep(GIVEN_UP_AFTER) if is_recorded.is_set() else is_recorded.wait())

    monkeypatch.setattr(Owner, "record", slowly)
    await twice(shared_server, program, happened)
    assert happened == ["slow", "next"]


async def test_run_cancelled_while_the_session_begins_can_be_started_again(
    shared_server: Server, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has recorded the beginning when the caller is cancelled, but its answer has not come yet."""
    is_recorded, answers = asyncio.Event(), asyncio.Event()
    record = Owner.record

    async def slowly(self: Owner, *args: Any, **options: Any) -> None:
        await record(self, *args, **options)
        is_recorded.set()
        await answers.wait()

    monkeypatch.setattr(Owner, "record", slowly)

    async def program() -> list[str]:
        first = asyncio.create_task(AssistantAgent("a", Scripted(happened)).run(task="Q"))
        await is_recorded.wait()
        first.cancel()
        answers.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        result = await AssistantAgent("a", Scripted(happened)).run(task="Q")
        return [message.to_text() for message in result.messages]

    session = new_session()
    assert len(await inside(shared_server, program, session)) == 2
    assert happened == ["model"]


@pytest.mark.parametrize("ends", ["without an error", "with an error", "and disconnects"])
@pytest.mark.parametrize("what", ["model", "tool", "sleep", "console"])
async def test_background_call_while_the_session_ends_is_an_error(
    shared_server: Server, happened: list[str], monkeypatch: pytest.MonkeyPatch, what: str, ends: str
) -> None:
    ending, answered = asyncio.Event(), asyncio.Event()
    session, background = new_session(), []
    monkeypatch.setattr("builtins.input", lambda _: happened.append("console"))

    async def note() -> None:
        happened.append("tool")

    async def call() -> Any:
        await ending.wait()
        try:
            if what == "model":
                return await asked(Scripted(happened))
            if what == "tool":
                return await FunctionTool(note, "Note.").run_json({}, CancellationToken())
            return input("?") if what == "console" else await current_session().sleep(0)  # noqa: ASYNC250
        finally:
            answered.set()

    async def program() -> str:
        background.append(asyncio.create_task(call()))
        said = await asked(Scripted(happened, name="last"))
        if ends == "with an error":
            raise LookupError(said)
        return said

    def held_back(end: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def held(*args: Any, **options: Any) -> None:
            ending.set()
            await answered.wait()
            await end(*args, **options)

        return held

    ways = [(Journal, "__aexit__")] if ends == "and disconnects" else [(Recorder, "end"), (Recorder, "end_with")]
    for kind, method in ways:
        monkeypatch.setattr(kind, method, held_back(getattr(kind, method)))
    with contextlib.suppress(LookupError):
        await inside(shared_server, program, session)
    with pytest.raises(NotDurable, match=f"session {session} has ended, and this call was started inside it"):
        await background[0]
    assert happened == ["last"]


async def test_call_raises_the_reason_if_the_run_is_stopped_as_the_call_begins(
    shared_server: Server, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Recorder._start

    def start_and_stop(recorder: Recorder, live: Any, work: Any) -> asyncio.Task[None]:
        running = start(recorder, live, work)
        recorder.stop(RunCancelled("stopped before the first step of the call's task"))
        return running

    monkeypatch.setattr(Recorder, "_start", start_and_stop)
    with pytest.raises(RunCancelled, match="stopped before the first step"):
        await asyncio.wait_for(inside(shared_server, lambda: asked(Scripted(happened)), new_session()), TIMEOUT)
    assert happened == []


@pytest.mark.parametrize("outer", ["", "outer"])
async def test_call_that_is_given_up_before_an_inner_agent_fails_is_kept(
    shared_server: Server, happened: list[str], outer: str
) -> None:
    session = new_session()

    async def by_agent(name: str, *script: Any) -> str:
        with current_session().agent(name):
            return await asked(Scripted(happened, *script, name=name))

    async def program() -> list[str]:
        with current_session().agent(outer) if outer else contextlib.nullcontext():
            return await work()

    async def work() -> list[str]:
        said = await said_until("STOP", Pieces(happened, "STOP ", hangs, "more"))
        answers = [await asyncio.create_task(by_agent("helper"))]
        answers.append(await asyncio.create_task(by_agent("fails", *([ConnectionError("down")] if is_down else []))))
        return [said, *answers]

    is_down = True
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await inside(shared_server, program, session)
    is_down = False
    assert (await inside(shared_server, program, session))[0] == "STOP "
    assert happened == ["model", "helper", "fails", "fails", "fails"]


@pytest.mark.parametrize("ends_with", ["a failure", "the program's own error"])
async def test_call_that_a_branch_gave_up_does_not_stop_the_next_run(
    shared_server: Server, happened: list[str], monkeypatch: pytest.MonkeyPatch, ends_with: str
) -> None:
    """Later branches need the given-up call's branch: the next run comes to their calls, whatever ended the run."""
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.5)
    session = new_session()
    has_fault = True

    async def branch(name: str, asking: Awaitable[str]) -> str:
        with current_session().agent(name):
            return await asking

    async def program() -> list[str]:
        left = said_until("STOP", Pieces(happened, "STOP ", hangs, name="left"))
        said = [await asyncio.create_task(branch("left", left))]
        said.append(await asyncio.create_task(branch("helper", asked(Scripted(happened, name="helper")))))
        fault = [ConnectionError("down")] if has_fault and ends_with == "a failure" else []
        said.append(await asyncio.create_task(branch("last", asked(Scripted(happened, *fault, name="last")))))
        if has_fault:
            raise LookupError("no such name")
        return said

    for _ in range(2):
        with pytest.raises(ConnectionError if ends_with == "a failure" else LookupError):
            await inside(shared_server, program, session)
    has_fault = False
    assert (await inside(shared_server, program, session))[0] == "STOP "
    if ends_with == "a failure":
        assert happened == ["left", "helper", "last", "last", "last"]


async def test_failed_call_that_is_given_up_as_the_run_ends_is_revoked_once(
    shared_server: Server, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    failing: list[asyncio.Task[str]] = []
    add, revoke, revoked = Setbacks.add, Journal.revoke, []

    def cancelling(self: Setbacks, *args: Any, **options: Any) -> None:
        add(self, *args, **options)
        failing[0].cancel()  # the call's failure is recorded, but its caller doesn't have it yet

    async def slowly(self: Journal, events: Iterable[Event], *args: Any, **options: Any) -> None:
        revoked.append([event.position for event in events])
        await asyncio.sleep(0.1)  # so that a second revoke could overlap
        await revoke(self, events, *args, **options)

    async def program() -> str:
        failing.append(asyncio.create_task(asked(Scripted(happened, ConnectionError("offline"), name="failing"))))
        await asyncio.wait(failing)
        raise ValueError("the program's own error")

    monkeypatch.setattr(Setbacks, "add", cancelling)
    monkeypatch.setattr(Journal, "revoke", slowly)
    with pytest.raises(ValueError, match="the program's own error"):
        await inside(shared_server, program, session)
    assert revoked == [["reply/1"]]
    monkeypatch.undo()
    assert await inside(shared_server, lambda: asked(Scripted(happened, "yes")), session) == "yes"


# ---- A program that no longer gives the call up ----------------------------------------------------------------------


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set how long a replay waits for a call to be given up."""
    monkeypatch.setattr("durable_autogen.record.recorder.DRIFT_PATIENCE", seconds)


async def hasty(*models: Scripted) -> None:
    """Ask the models at the same time, each as an agent of its name, and give all of them up."""

    async def one(model: Scripted) -> str:
        with current_session().agent(model.name):
            return await asked(model)

    asking = [asyncio.wait_for(one(model), GIVEN_UP_AFTER) for model in models]
    assert all(isinstance(end, asyncio.TimeoutError) for end in await asyncio.gather(*asking, return_exceptions=True))


async def test_late_drift_of_a_given_up_call_drops_nothing_that_the_program_got(
    shared_server: Server, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 0.5)
    session, model = new_session(), Scripted(happened, name="b")

    async def recorded() -> list[str]:
        await hasty(Scripted(happened, hangs, name="a"))
        return [await asked(model) for _ in range(3)]

    async def changed() -> list[str]:
        async def patient() -> str:
            with current_session().agent("a"):
                return await asked(Scripted(happened, name="a"))

        waiting = asyncio.create_task(patient())
        answers = [await asked(model) for _ in range(5)]
        return [*answers, await waiting]

    first = await inside(shared_server, recorded, session)
    lines: list[str] = []
    second = await inside(shared_server, changed, session, lines, on_drift="continue")
    assert second[:3] == first
    assert any("this run still waits for it" in line for line in lines)
    assert happened == ["a", "b", "b", "b", "b", "b", "a"]
    assert await inside(shared_server, changed, session) == second
    assert len(happened) == 7


async def test_two_given_up_calls_may_both_be_made_live(
    shared_server: Server, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 0.2)
    session = new_session()

    async def changed() -> list[str]:
        async def one(name: str) -> str:
            with current_session().agent(name):
                return await asked(Scripted(happened, name=name))

        return list(await asyncio.gather(one("a"), one("b")))

    await inside(
        shared_server, lambda: hasty(Scripted(happened, hangs, name="a"), Scripted(happened, hangs, name="b")), session
    )
    second = await inside(shared_server, changed, session, on_drift="continue")
    assert sorted(happened) == ["a", "a", "b", "b"]
    assert await inside(shared_server, changed, session) == second
    assert len(happened) == 4


async def test_drift_of_a_given_up_tool_ends_the_run_although_an_agent_takes_it_for_a_result(
    shared_server: Server, happened: list[str]
) -> None:
    session = new_session()

    async def work(number: int) -> str:
        """Work on a number."""
        happened.append(f"work {number}")
        return await hangs()

    async def program(number: int) -> str:
        tool = FunctionTool(work, work.__doc__ or "", name="work")
        with contextlib.suppress(Exception):
            await asyncio.wait_for(tool.run_json({"number": number}, CancellationToken()), GIVEN_UP_AFTER)
        return await asked(Scripted(happened))

    await inside(shared_server, lambda: program(1), session)
    with pytest.raises(DriftError, match="is not what this run asks for"):
        await inside(shared_server, lambda: program(2), session)
    assert happened == ["work 1", "model"]
