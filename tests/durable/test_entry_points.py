"""While a session is open, AutoGen's methods are replaced, and record all calls. Then the originals are restored."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import pickle
import random
import threading
import uuid
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple

import pytest
from autogen_agentchat.agents import AssistantAgent, CodeExecutorAgent, UserProxyAgent
from autogen_agentchat.agents._code_executor_agent import ApprovalRequest, ApprovalResponse
from autogen_agentchat.base import TaskResult, TerminationCondition
from autogen_agentchat.conditions import ExternalTermination, FunctionalTermination, MaxMessageTermination
from autogen_agentchat.messages import StopMessage, TextMessage
from autogen_agentchat.teams import BaseGroupChat, RoundRobinGroupChat
from autogen_core import (
    AgentId,
    CancellationToken,
    Image,
    InMemoryStore,
    MessageContext,
    RoutedAgent,
    SingleThreadedAgentRuntime,
    TopicId,
    TypeSubscription,
    message_handler,
)
from autogen_core.code_executor import CodeBlock, CodeExecutor, CodeResult
from autogen_core.memory import ListMemory, Memory, MemoryContent, MemoryMimeType, MemoryQueryResult
from autogen_core.models import ChatCompletionClient, CreateResult
from autogen_core.tool_agent import ToolAgent, tool_agent_caller_loop
from autogen_core.tools import BaseStreamTool, BaseTool, FunctionTool, StaticWorkbench, Workbench
from autogen_ext.models.cache import ChatCompletionCache
from autogen_ext.models.openai import OpenAIChatCompletionClient
from durable_agents import (
    QUESTION,
    Own,
    Scripted,
    asked,
    bench,
    call,
    inside,
    new_session,
    plain,
    reply,
    session,
    twice,
    word,
)
from harness import Server
from pydantic import BaseModel, ValidationError

from durable_autogen import DurableSession, NotDurable
from nexum_engine.errors import ServerUnavailable

pytestmark = pytest.mark.every_python


@pytest.fixture
def happened() -> list[str]:
    """A list to which a test's live calls and effects are added."""
    return []


def pair(*agents: Any, turns: int = 4, **more: Any) -> RoundRobinGroupChat:
    return RoundRobinGroupChat(list(agents), max_turns=turns, **more)


def token() -> CancellationToken:
    return CancellationToken()


# ---- Model clients ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Slots:
    client: ChatCompletionClient


class Pair(NamedTuple):
    client: ChatCompletionClient
    number: int


KEPT: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "slots": lambda client: functools.partial(getattr, Slots(client), "client"),
    "named tuple": lambda client: functools.partial(getattr, Pair(client, 1), "client"),
    "class": lambda client: functools.partial(getattr, type("Shelf", (), {"client": client}), "client"),
    "closure": lambda client: lambda: client,
    "partial": lambda client: functools.partial(lambda kept: kept, client),
    "global": lambda client: globals().update(KEPT_HERE=client) or (lambda: globals()["KEPT_HERE"]),
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
async def test_client_is_recorded_wherever_program_keeps_it(
    shared_server: Server, happened: list[str], keep: Callable[[Any], Callable[[], Any]]
) -> None:
    kept = keep(Scripted(happened))  # made before the session is opened
    other = Scripted(happened)

    async def program() -> TaskResult:
        return await pair(Own("keeper", lambda _: asked(kept())), AssistantAgent("other", other)).run(task="Q")

    await twice(shared_server, program, happened)
    assert len(happened) == 4


async def test_create_method_of_mixin_is_recorded(shared_server: Server, happened: list[str]) -> None:
    class Speaks:  # not an AutoGen class
        async def create(self, messages: Sequence[Any], **_: Any) -> CreateResult:
            happened.append("mixin")
            return reply()

    class Mixed(Speaks, Scripted):
        pass

    async def program() -> list[str]:
        return [await asked(Mixed(happened)) for _ in range(2)]

    await twice(shared_server, program, happened)
    assert happened == ["mixin"] * 2
    assert "create" not in vars(Mixed)


async def test_create_method_made_by_partialmethod_is_recorded(shared_server: Server, happened: list[str]) -> None:
    class Preset(Scripted):
        async def ask(self, model: str, messages: Sequence[Any], **_: Any) -> CreateResult:
            happened.append(model)
            return reply()

        create = functools.partialmethod(ask, "preset")

    async def program() -> list[str]:
        return [await asked(Preset(happened)) for _ in range(2)]

    await twice(shared_server, program, happened)
    assert happened == ["preset"] * 2


@pytest.mark.parametrize("leaves", [False, True], ids=["read to its end", "left early"])
async def test_stream_of_values_that_are_no_texts_is_recorded(
    shared_server: Server, happened: list[str], leaves: bool
) -> None:
    class Thinking(Scripted):
        async def create_stream(self, messages: Sequence[Any], **_: Any) -> AsyncGenerator[Any, None]:
            happened.append("stream")
            for piece in ("a text", Price(amount=1, day=DAY), {"step": word()}, ("two", 2), 3, True):
                yield piece
            yield reply()

    async def program() -> list[Any]:
        found: list[Any] = []
        async with contextlib.aclosing(Thinking(happened).create_stream(QUESTION)) as stream:
            async for piece in stream:
                found.append(piece if not isinstance(piece, CreateResult) else plain(piece))
                if leaves and len(found) == 4:
                    break
        return [*found, await asked(Scripted(happened))]

    found = await twice(shared_server, program, happened)
    assert found[:2] == ["a text", Price(amount=1, day=DAY)]
    assert happened == ["stream", "model"]


async def test_client_that_asks_other_clients_is_recorded_once(shared_server: Server, happened: list[str]) -> None:
    class Fallback(Scripted):
        async def create(self, messages: Sequence[Any], **more: Any) -> CreateResult:
            for client in (Scripted(happened, LookupError("down"), name="first"), Scripted(happened, name="second")):
                with contextlib.suppress(LookupError):
                    return await client.create(messages, **more)
            raise AssertionError

    async def program() -> Any:
        said = await AssistantAgent("a", Fallback(happened)).run(task="Q")
        recorder = session().recorder
        assert recorder.live_counts["model calls"] + recorder.replayed_counts["model calls"] == 1
        return said

    await twice(shared_server, program, happened)
    assert happened == ["first", "second"]


async def test_cached_reply_and_usage_stay_as_client_gave_them(shared_server: Server, happened: list[str]) -> None:
    async def program() -> Any:
        store: Any = InMemoryStore()
        client = ChatCompletionCache(Scripted(happened), store)
        # Dump each reply before the next call: the second call returns the first call's object, marked as cached.
        return [*[plain(await client.create(QUESTION)) for _ in range(2)], client.actual_usage().prompt_tokens]

    live, hit, used = await twice(shared_server, program, happened)
    assert (live["cached"], hit["cached"]) == (False, True)
    assert live["content"] == hit["content"]
    assert used == 2


# ---- Tools -----------------------------------------------------------------------------------------------------------


class Price(BaseModel):
    amount: float
    day: datetime | None = None


@dataclass
class Stock:
    name: str
    price: Price


DAY = datetime(2024, 2, 29, 12, tzinfo=timezone.utc)
PIXEL = Image.from_base64(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(Price(amount=float("inf")), id="model"),
        pytest.param(Stock("x", Price(amount=1, day=DAY)), id="dataclass"),
        pytest.param([Price(amount=1, day=DAY), Price(amount=2)], id="list"),
        pytest.param(PIXEL, id="image"),
        *(DAY, b"\x00\xff", (1, "two", None), {3: {"four"}}),
    ],
)
@pytest.mark.parametrize("method", ["run", "run_json"])
async def test_directly_called_tool_returns_same_value_in_replay(
    shared_server: Server, happened: list[str], value: Any, method: str
) -> None:
    def give(text: str) -> Any:
        happened.append(text)
        return value

    async def program() -> Any:
        tool = FunctionTool(give, "Give it.")
        args: Any = {"text": "x"} if method == "run_json" else tool.args_type()(text="x")
        got = await getattr(tool, method)(args, token())
        return type(got), got.to_base64() if isinstance(got, Image) else got

    assert (await twice(shared_server, program, happened))[0] is type(value)


class Declined(Exception):
    """An error of the program that can't be built from its text."""

    def __init__(self, bank: str, code: int) -> None:
        super().__init__(f"declined by {bank}")
        self.code = code


@pytest.mark.parametrize("kind", [Declined, ValidationError, KeyError])
async def test_tool_error_is_caught_by_its_type_in_replay(
    shared_server: Server, happened: list[str], kind: type[Exception]
) -> None:
    def fail() -> None:
        happened.append("failed")
        if kind is Declined:
            raise Declined(word(), random.randrange(1_000_000))
        if kind is KeyError:
            raise KeyError(word())
        Price.model_validate({"amount": word()})

    async def program() -> Any:
        try:
            return await FunctionTool(fail, "Fail.").run_json({}, token())
        except kind as error:
            found = error.errors() if isinstance(error, ValidationError) else []
            details = [(one["type"], one["loc"], one["msg"], one["input"]) for one in found]
            return [str(error), details or vars(error), type(error) is kind]

    assert (await twice(shared_server, program, happened))[-1]


class NewsArguments(BaseModel):
    upto: int


class News(BaseModel):
    text: str


class NewsTool(BaseStreamTool[NewsArguments, TextMessage, News]):
    """A tool that streams messages before its result."""

    component_type = "tool"

    def __init__(self, happened: list[str]) -> None:
        super().__init__(NewsArguments, News, "news", "The news.")
        self.happened = happened

    async def run(self, args: NewsArguments, cancellation_token: CancellationToken) -> News:
        raise AssertionError("it is streamed")

    async def run_stream(
        self, args: NewsArguments, cancellation_token: CancellationToken, call_id: str | None = None
    ) -> AsyncGenerator[TextMessage | News, None]:
        for number in range(args.upto):
            self.happened.append(f"item {number}")
            yield TextMessage(content=f"item {number} {word()}", source="news")
        yield News(text=word())


async def test_messages_of_streaming_tool_are_in_transcript(shared_server: Server, happened: list[str]) -> None:
    async def program() -> TaskResult:
        model = Scripted(happened, [call("news", upto=2)])
        return await pair(AssistantAgent("a", model, tools=[NewsTool(happened)]), turns=1).run(task="Q")

    outside = [(type(message).__name__, message.source) for message in (await program()).messages]
    assert sum(source == "news" for _, source in outside) == 2
    recorded = await twice(shared_server, program, happened)
    assert [(message["type"], message["source"]) for message in recorded["messages"]] == outside
    assert happened == ["model", "item 0", "item 1"]


# ---- The core API ----------------------------------------------------------------------------------------------------


@dataclass
class Ask:
    text: str


class Asker(RoutedAgent):
    def __init__(self, client: ChatCompletionClient, heard: asyncio.Queue[str]) -> None:
        super().__init__("asks")
        self.client, self.heard = client, heard

    @message_handler
    async def on_ask(self, message: Ask, ctx: MessageContext) -> Ask:
        said = await asked(self.client)
        self.heard.put_nowait(said)
        return Ask(said)


@pytest.mark.parametrize("started", ["before", "within"])
async def test_core_agents_are_recorded_whenever_their_runtime_started(
    shared_server: Server, happened: list[str], started: str
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def runtime() -> SingleThreadedAgentRuntime:
        found = SingleThreadedAgentRuntime()
        await Asker.register(found, "asker", lambda: Asker(Scripted(happened), heard))
        await found.add_subscription(TypeSubscription("asks", "asker"))
        found.start()
        return found

    before = await runtime() if started == "before" else None

    async def program() -> list[str]:
        at_work = before or await runtime()
        for key in (uuid.uuid4().hex, "same", uuid.uuid4().hex):
            await at_work.send_message(Ask("direct"), AgentId("asker", key))
        await asyncio.gather(*(at_work.publish_message(Ask("told"), TopicId("asks", word())) for _ in range(2)))
        said = [await heard.get() for _ in range(5)]
        if before is None:
            await at_work.stop_when_idle()
        return said

    await twice(shared_server, program, happened)
    if before is not None:
        await before.stop()


async def test_tool_agent_calls_tools_once(shared_server: Server, happened: list[str]) -> None:
    def charge(amount: int) -> str:
        happened.append(f"charge {amount}")
        return word()

    async def program() -> list[str]:
        runtime, tools = SingleThreadedAgentRuntime(), [FunctionTool(charge, "Charge.")]
        await ToolAgent.register(runtime, "tools", lambda: ToolAgent("tools", list(tools)))
        runtime.start()
        model = Scripted(happened, [call("charge", amount=1), call("charge", amount=2)], [call("missing")])
        to, schemas = AgentId("tools", "default"), [tool.schema for tool in tools]
        said = await tool_agent_caller_loop(runtime, to, model, list(QUESTION), schemas)
        await runtime.stop_when_idle()
        # Leave out the ids of the calls: they differ in each run.
        return [str(message.content) for message in said]

    await twice(shared_server, program, happened)
    assert sorted(happened) == ["charge 1", "charge 2", "model", "model", "model"]


async def test_team_on_own_runtime_started_before_session_is_recorded(
    shared_server: Server, happened: list[str]
) -> None:
    runtime = SingleThreadedAgentRuntime()
    runtime.start()

    def note(text: str) -> str:
        happened.append(text)
        return word()

    async def act(_: str) -> str:
        return str(await FunctionTool(note, "Note it.").run_json({"text": "directly"}, token()))

    async def program() -> TaskResult:
        one = AssistantAgent("one", Scripted(happened, [call("note", text="by model")]), tools=[note])
        return await pair(one, Own("two", act), runtime=runtime).run(task="Q")

    await twice(shared_server, program, happened)
    assert happened == ["model", "by model", "directly", "model", "directly"]
    await runtime.stop()


# ---- Memory, code, people --------------------------------------------------------------------------------------------


async def test_memory_is_asked_once(shared_server: Server, happened: list[str]) -> None:
    class Library(ListMemory):
        async def query(self, *args: Any, **more: Any) -> MemoryQueryResult:
            happened.append("looked up")
            return MemoryQueryResult(results=[MemoryContent(content=word(), mime_type=MemoryMimeType.TEXT)])

        async def update_context(self, model_context: Any) -> Any:
            await self.query("")
            return await super().update_context(model_context)

    async def program() -> Any:
        memory: Memory = Library()
        direct = await memory.query("what?")
        said = await AssistantAgent("a", Scripted(happened), memory=[memory]).run(task="Q")
        return [direct.model_dump(), plain(said)]

    await twice(shared_server, program, happened)
    assert happened == ["looked up", "looked up", "model"]


class Executor(CodeExecutor):
    """An executor that notes each execution and runs no code."""

    component_type = "code_executor"
    component_config_schema = BaseModel

    def __init__(self, happened: list[str]) -> None:
        self.happened = happened

    async def execute_code_blocks(
        self, code_blocks: list[CodeBlock], cancellation_token: CancellationToken
    ) -> CodeResult:
        self.happened.append("executed")
        return CodeResult(exit_code=3, output=word())

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def restart(self) -> None: ...


async def test_code_is_approved_and_executed_once(shared_server: Server, happened: list[str]) -> None:
    async def approve(request: ApprovalRequest) -> ApprovalResponse:
        happened.append("approved")
        return ApprovalResponse(approved=len(happened) < 4, reason=word())

    async def program() -> Any:
        writer = Scripted(happened, *["```python\nprint(1)\n```"] * 2)
        coder = CodeExecutorAgent("coder", Executor(happened), approval_func=approve)
        said = await pair(AssistantAgent("writer", writer), coder).run(task="Q")
        direct = await Executor(happened).execute_code_blocks([CodeBlock("1", "python")], token())
        return [plain(said), direct]

    await twice(shared_server, program, happened)
    assert happened == ["model", "approved", "executed", "model", "approved", "executed"]


async def test_person_behind_own_get_input_is_asked_once(shared_server: Server, happened: list[str]) -> None:
    class Web(UserProxyAgent):
        async def _get_input(self, prompt: str, cancellation_token: CancellationToken | None) -> str:
            happened.append(prompt)
            return word()

    async def program() -> TaskResult:
        return await pair(Web("person"), turns=2).run(task="Q")

    await twice(shared_server, program, happened)
    assert len(happened) == 2


# ---- Conditions ------------------------------------------------------------------------------------------------------


class Drawn(TerminationCondition):
    """A termination condition that decides by chance, or, if it has a model, by the model's reply."""

    def __init__(self, model: Scripted | None = None) -> None:
        self.model, self.over = model, False

    @property
    def terminated(self) -> bool:
        return self.over

    async def __call__(self, messages: Sequence[Any]) -> StopMessage | None:
        drawn = random.choice(["go", "stop"]) if self.model is None else await asked(self.model)
        self.over = drawn == "stop"
        return StopMessage(content=word(), source="lots") if self.over else None

    async def reset(self) -> None:
        self.over = False


class Slotted(TerminationCondition):
    """A termination condition that decides by chance, keeps its stop in a slot, and refuses a check after the stop."""

    __slots__ = ("stop",)

    def __init__(self) -> None:
        self.stop: StopMessage | None = None

    @property
    def terminated(self) -> bool:
        return self.stop is not None

    async def __call__(self, messages: Sequence[Any]) -> StopMessage | None:
        assert self.stop is None
        if random.random() < 0.3:
            self.stop = StopMessage(content=word(), source="lots")
        return self.stop

    async def reset(self) -> None:
        self.stop = None


class Plain(TerminationCondition):
    """A termination condition that decides by chance, and whose `terminated` is a plain attribute."""

    terminated = False

    async def __call__(self, messages: Sequence[Any]) -> StopMessage | None:
        assert not self.terminated
        self.terminated = random.random() < 0.3
        return StopMessage(content=word(), source="lots") if self.terminated else None

    async def reset(self) -> None:
        self.terminated = False


def pressed() -> TerminationCondition:
    """An external termination that a callback sets after a while."""
    button = ExternalTermination()
    asyncio.get_running_loop().call_later(0.05, button.set)
    return button


CONDITIONS: dict[str, Callable[[list[str]], TerminationCondition]] = {
    "own": lambda _: Drawn(),
    "function": lambda _: FunctionalTermination(lambda _: random.random() < 0.4),
    "pressed": lambda _: pressed(),
    "both of two": lambda _: Drawn() & Drawn(),
    "in slots": lambda _: Slotted() & Slotted(),
    "in plain attributes": lambda _: Plain() & Plain(),
    "nested, with a model": lambda happened: (
        MaxMessageTermination(500) | Drawn(Scripted(happened, *random.choices(["go", "stop"], k=90), name="judge"))
    ),
}


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
async def test_condition_that_ignores_messages_stops_replay_at_same_message(
    shared_server: Server, happened: list[str], condition: Callable[[list[str]], TerminationCondition]
) -> None:
    async def program() -> TaskResult:
        await asked(Scripted(happened))
        agents = [AssistantAgent(name, Scripted(happened)) for name in "ab"]
        result = await pair(*agents, turns=200, termination_condition=condition(happened)).run(task="Q")
        assert "Maximum" not in str(result.stop_reason)
        return result

    for _ in range(4):
        await twice(shared_server, program, happened)


# ---- Agents inside a turn, parallel sessions and tasks ---------------------------------------------------------------


async def test_agents_and_teams_built_in_a_turn_are_recorded(shared_server: Server, happened: list[str]) -> None:
    def note() -> str:
        happened.append("noted")
        return word()

    async def act(_: str) -> str:
        one = AssistantAgent("one", Scripted(happened, [call("note")]), tools=[note])
        alone = await one.run(task="Q")
        team = await pair(one, AssistantAgent("two", Scripted(happened)), turns=3).run(task=alone.messages[-1].id)
        return " ".join(message.to_text() for message in team.messages)

    async def program() -> TaskResult:
        return await pair(Own("builder", act), turns=2).run(task="Q")

    said = await twice(shared_server, program, happened)
    assert len(said["messages"]) == 3
    assert happened == (["model", "noted", *["model"] * 3]) * 2


async def test_parallel_sessions_in_one_loop_stay_separate(shared_server: Server, happened: list[str]) -> None:
    ids = {f"s{number}": new_session() for number in range(4)}

    async def one(name: str) -> Any:
        async def program() -> Any:
            agents = [AssistantAgent(member, Scripted(happened, name=name)) for member in "ab"]
            direct = await asyncio.gather(*(asked(Scripted(happened, name=name)) for _ in range(3)))
            return [direct, plain(await pair(*agents).run(task=name))]

        return await inside(shared_server, program, ids[name])

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(one, ids))

    first = await all_of_them()
    before = list(happened)
    assert [await one("s2"), await one("s0")] == [first[2], first[0]]  # now only one session runs at a time
    assert await all_of_them() == first
    assert happened == before


async def test_session_inside_recorded_tool_is_separate(shared_server: Server, happened: list[str]) -> None:
    own = new_session()

    async def inner() -> Any:
        return await inside(shared_server, lambda: asked(Scripted(happened, name="inner")), own)

    async def delegate() -> str:
        happened.append("delegated")
        return str(await inner())

    async def program() -> TaskResult:
        return await AssistantAgent("a", Scripted(happened, [call("delegate")]), tools=[delegate]).run(task="Q")

    said = await twice(shared_server, program, happened)
    assert happened == ["model", "delegated", "inner"]
    assert await inner() in str(said)
    assert happened == ["model", "delegated", "inner"]


async def test_tasks_that_ask_in_other_order_get_their_replies(shared_server: Server, happened: list[str]) -> None:
    async def ask(name: str) -> str:
        messages = [QUESTION[0].model_copy(update={"content": f"for {name}"})]
        return str((await Scripted(happened).create(messages)).content)

    async def program() -> dict[str, str]:
        names = list("abcdef")
        random.shuffle(names)
        found = await asyncio.gather(*(ask(name) for name in names))
        return dict(sorted(zip(names, found, strict=True)))

    for _ in range(3):
        await twice(shared_server, program, happened)


# ---- NotDurable ------------------------------------------------------------------------------------------------------


async def test_thread_with_own_event_loop_raises_not_durable_outside_tool(
    shared_server: Server, happened: list[str]
) -> None:
    def ask() -> str:
        return asyncio.run(asked(Scripted(happened, name="threaded")))

    def threaded() -> str:
        return ask()

    async def program() -> Any:
        for refused in (asyncio.to_thread(ask), asyncio.get_running_loop().run_in_executor(None, ask)):
            with pytest.raises(NotDurable, match="another event loop"):
                await refused
        raised: list[BaseException] = []

        def in_a_thread() -> None:
            try:
                ask()
            except BaseException as error:  # noqa: BLE001 - the error is checked below
                raised.append(error)

        thread = threading.Thread(target=in_a_thread)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert isinstance(raised[0], NotDurable)
        return await AssistantAgent("a", Scripted(happened, [call("threaded")]), tools=[threaded]).run(task="Q")

    await twice(shared_server, program, happened)
    assert happened == ["model", "threaded"]


async def test_call_after_session_end_raises_not_durable(shared_server: Server, happened: list[str]) -> None:
    over = asyncio.Event()
    late: list[asyncio.Task[str]] = []

    async def ask() -> str:
        await over.wait()
        return await asked(Scripted(happened, name="late"))

    async def program() -> str:
        late.append(asyncio.create_task(ask()))
        return await asked(Scripted(happened))

    async with DurableSession(new_session(), nexum=shared_server.address):
        await inside(shared_server, program, "ends-first")
        over.set()
        with pytest.raises(NotDurable, match="session ends-first has ended"):
            await late[0]
    assert happened == ["model"]


# ---- Restored methods ------------------------------------------------------------------------------------------------

WRAPPED = (
    Scripted,
    StaticWorkbench,
    FunctionTool,
    Drawn,
    UserProxyAgent,
    RoutedAgent,
    Executor,
    ListMemory,
    BaseGroupChat,
)


def everything() -> dict[str, Any]:
    """Return the methods that a session replaces, as they are now."""
    found: dict[str, Any] = {"input": input, "submit": ThreadPoolExecutor.submit, "start": threading.Thread.start}
    for kind in WRAPPED:
        for one in kind.__mro__[:-1]:
            found[one.__name__] = {name: value for name, value in vars(one).items() if not name.startswith("_abc")}
    return found


async def test_last_session_restores_all_methods(shared_server: Server, happened: list[str]) -> None:
    before = everything()
    first = DurableSession(new_session(), nexum=shared_server.address)
    await first.__aenter__()
    async with DurableSession(new_session(), nexum=shared_server.address):
        during = everything()
        assert {kind.__name__ for kind in WRAPPED} <= {name for name in before if during[name] != before[name]}
    with pytest.raises(ServerUnavailable):
        async with DurableSession(new_session(), nexum="127.0.0.1:1"):
            pass
    assert everything() == during  # the first session is still open
    await first.__aexit__(None, None, None)
    after = everything()
    assert [name for name in before if after[name] != before[name]] == []


def note(text: str, times: int = 1) -> str:
    return text * times


async def test_session_leaves_objects_unchanged(shared_server: Server, happened: list[str]) -> None:
    def looks() -> list[Any]:
        client = OpenAIChatCompletionClient(model="gpt-4o", api_key="k")
        tool = FunctionTool(note, "Note it.")
        methods: list[Any] = [
            client.create,
            client.create_stream,
            tool.run_json,
            StaticWorkbench.call_tool,
            Drawn.__call__,
        ]
        return [
            *(inspect.signature(method) for method in methods),
            *((method.__name__, method.__qualname__, method.__doc__, method.__module__) for method in methods),
            *(inspect.iscoroutinefunction(method) for method in methods),
            *(inspect.isasyncgenfunction(method) for method in methods),
            [isinstance(client, kind) for kind in (OpenAIChatCompletionClient, ChatCompletionClient, Scripted)],
            [isinstance(tool, kind) for kind in (FunctionTool, BaseTool, Workbench)],
            *(one.dump_component().model_dump_json() for one in (client, tool, bench([tool]))),
            pair(AssistantAgent("a", client, tools=[note])).dump_component().model_dump_json(),
            AssistantAgent.load_component(AssistantAgent("a", client).dump_component()).name,
            vars(pickle.loads(pickle.dumps(Scripted(["x"], "said")))),
            pickle.dumps([Scripted, Drawn, NewsTool]),
        ]

    outside = looks()
    assert await inside(shared_server, lambda: asyncio.sleep(0, looks()), new_session()) == outside


class VendorSettings(BaseModel):
    model: str = "m"


class VendorClient(Scripted):
    """A client as AutoGen's own for Azure: of a module that AutoGen calls internal."""

    __module__ = "vendor._client"

    def _to_config(self) -> VendorSettings:
        return VendorSettings()


async def test_warning_for_the_author_of_a_client_is_not_shown(shared_server: Server, happened: list[str]) -> None:
    with pytest.warns(UserWarning, match="Internal module name"):
        VendorClient(happened).dump_component()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        await inside(shared_server, lambda: asked(VendorClient(happened)), new_session())
    assert not warned


async def test_class_defined_in_session_is_recorded(shared_server: Server, happened: list[str]) -> None:
    async def program() -> Any:
        class Defined(Scripted):
            async def create(self, messages: Sequence[Any], **_: Any) -> CreateResult:
                happened.append("defined")
                return reply()

        class Counter(BaseTool[NewsArguments, News]):
            component_type = "tool"

            def __init__(self) -> None:
                super().__init__(NewsArguments, News, "counter", "Count.")

            async def run(self, args: NewsArguments, cancellation_token: CancellationToken) -> News:
                happened.append("counted")
                return News(text=word())

        counted = await Counter().run_json({"upto": 1}, token())
        arguments: Mapping[str, Any] = {"upto": 2}
        again = await Counter().run(NewsArguments(**arguments), token())
        return [await asked(Defined(happened)), counted.text, again.text]

    await twice(shared_server, program, happened)
    assert happened == ["counted", "counted", "defined"]
