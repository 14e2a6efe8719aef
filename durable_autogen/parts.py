"""The parts of a team that act on the world, and their durable twins."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

from autogen_agentchat.agents import BaseChatAgent, UserProxyAgent
from autogen_agentchat.base import ChatAgent, Response, TaskResult, Team, TerminationCondition
from autogen_agentchat.teams import BaseGroupChat, GraphFlow
from autogen_core import CancellationToken
from autogen_core.code_executor import CodeExecutor
from autogen_core.models import ChatCompletionClient
from autogen_core.tools import StaticWorkbench, Workbench

from durable_autogen.errors import NotDurable
from durable_autogen.events import Kind
from durable_autogen.failures import is_being_cancelled, made_ordinary
from durable_autogen.model import DurableModelClient, Replies
from durable_autogen.quiet import in_recorded_call
from durable_autogen.recorder import Recorder
from durable_autogen.request import describe_turn, hashed
from durable_autogen.termination import durable_condition
from durable_autogen.transcript import Transcript
from durable_autogen.workbench import DurableWorkbench
from nexum_engine.errors import InvalidRequest

# Packages through which an agent acts by itself: a vendor's own client, a browser.
OWN_WAYS_OUT = frozenset({"anthropic", "azure", "ollama", "openai", "playwright", "playwright_controller"})
# Objects of these packages are not searched: what a program keeps is in its own.
LIBRARIES = frozenset(
    {"autogen_agentchat", "autogen_core", "autogen_ext", "durable_autogen", "nexum_engine", "pydantic"}
)
MAX_DEPTH = 6  # attributes and items on the way from an agent to what it calls

_NOT_THERE = object()


class Parts:
    """Everything in a team that acts on the world, replaced by its durable twin for one run."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._replies: dict[str, Replies] = {}
        self._owners: dict[str, object] = {}
        self._names: dict[int, str] = {}
        self._sources: dict[str, list[str]] = {}
        self._before: list[tuple[dict[str, Any], str, object]] = []
        self._in_order: set[int] = set()
        self._seen: dict[int, object] = {}
        self._transcript = Transcript(recorder, self.was_replayed)
        self._settling: set[int] = set()

    def was_replayed(self, source: str) -> bool:
        """Whether the last reply of the agent of this name came from the record."""
        replies = [self._replies[name] for name in self._sources.get(source, ()) if name in self._replies]
        return any(one.replayed for one in replies) and all(one.replayed or not one.count for one in replies)

    def restore(self) -> None:
        """Put everything back."""
        for attributes, attribute, value in reversed(self._before):
            if value is _NOT_THERE:
                del attributes[attribute]
            else:
                attributes[attribute] = value

    # ---- One agent's own ---------------------------------------------------------------------------------------------

    def model_client(self, client: ChatCompletionClient, name: str) -> DurableModelClient:
        """The client's durable twin for the agent of this name. Raises InvalidRequest if another run has it."""
        if isinstance(client, DurableModelClient):
            if client.recorder is not self._recorder and not client.recorder.failed.done():
                raise InvalidRequest(
                    f"{name} is at work in session {client.recorder.journal.session}: build another one"
                )
            client = client.inner
        return DurableModelClient(client, self._recorder, name, self._replies_of(name))

    def workbench(self, workbench: Workbench, name: str) -> DurableWorkbench:
        """The workbench's durable twin for the agent of this name."""
        inner = workbench.inner if isinstance(workbench, DurableWorkbench) else workbench
        if isinstance(inner, StaticWorkbench):
            for tool in inner._tools:
                runner = getattr(tool, "_task_runner", None)
                if isinstance(runner, (ChatAgent, Team)):
                    self.make_durable(runner, _inside(name, runner.name))
        return DurableWorkbench(inner, self._recorder, name, self._replies_of(name))

    def _replies_of(self, name: str) -> Replies:
        return self._replies.setdefault(name, Replies())

    # ---- Whatever a team is made of ----------------------------------------------------------------------------------

    def make_durable(self, part: ChatAgent | Team, name: str) -> None:
        """Replace what the part and its own parts call by themselves. Raises NotDurable."""
        if id(part) in self._seen:
            return
        name = self._unique(name, part)
        self._names[id(part)] = name
        if isinstance(part, ChatAgent):
            self._sources.setdefault(part.name, []).append(name)
            stream = _contained(part.on_messages_stream, self._recorder, name)
            self._replace(part, "on_messages_stream", self._transcript.noting(stream))
        self._replace(part, "run_stream", self._transcript.noting(part.run_stream))
        self._look_into(part, part, name, "")
        if isinstance(part, UserProxyAgent):
            self._replace(part, "_is_async", True)
            self._replace(part, "input_func", _recorded_input(part.input_func, self._recorder, name))
        if isinstance(part, GraphFlow):
            for member in part._participants:
                if id(member) not in self._in_order:
                    self._in_order.add(id(member))
                    self._keep_order(member, self._names[id(member)])

    def settle(self, runnable: ChatAgent | Team) -> None:
        """Give what the agent or team says its lasting ids and times, in `run_stream` and in `run`."""
        if id(runnable) in self._settling:
            return
        self._settling.add(id(runnable))
        stream = self._transcript.settling(runnable.run_stream)
        self._replace(runnable, "run_stream", stream)
        # A class of the program's own may have a `run` that does more.
        if type(runnable).run in (BaseChatAgent.run, BaseGroupChat.run):

            async def run(**arguments: Any) -> TaskResult:
                return [item async for item in stream(**arguments) if isinstance(item, TaskResult)][-1]

            self._replace(runnable, "run", run)

    def _unique(self, name: str, owner: object) -> str:
        """Agents of one name are numbered, in the order in which the team was built."""
        found, number = name, 1
        while self._owners.setdefault(found, owner) is not owner:
            number += 1
            found = f"{name}#{number}"
        return found

    def _look_into(self, owner: object, root: ChatAgent | Team, name: str, path: str) -> None:
        self._seen[id(owner)] = owner
        for attribute, value in list(vars(owner).items()):
            step = attribute.strip("_")
            twin = self._twin(value, root, name, f"{path}.{step}" if path else step)
            if twin is not value:
                self._replace(owner, attribute, twin)

    def _twin(self, value: Any, root: ChatAgent | Team, name: str, path: str) -> Any:
        """What stands in for the value, or the value itself, with what it holds made durable."""
        if isinstance(value, ChatCompletionClient):
            label = name if path == "model_client" else f"{name}.{path}"
            if isinstance(root, Team):
                label = f"{label or type(root).__name__} (team)"
            # One client may serve many: it is the place that is asked from.
            return self.model_client(value, label if label == name else self._unique(label, value))
        if isinstance(value, Workbench):
            return self.workbench(value, name)
        if isinstance(value, TerminationCondition):
            return durable_condition(value, self._recorder, _inside(name, path), self._replace)
        if isinstance(value, (ChatAgent, Team)):
            self.make_durable(value, _inside(name, value.name))
        elif isinstance(value, CodeExecutor):
            raise NotDurable(
                f"{name} runs code with {type(value).__name__}, whose effects can't be recorded here: give the "
                "agent a tool that runs the code"
            )
        elif isinstance(root, ChatAgent) and _is_own_way_out(value):
            raise NotDurable(
                f"{name} ({type(root).__name__}) acts by itself through {type(value).__module__}, and "
                "what it gets there can't be recorded here: use an agent with a model client and tools"
            )
        elif path.count(".") < MAX_DEPTH:
            return self._twins_within(value, root, name, path)
        return value

    def _twins_within(self, value: Any, root: ChatAgent | Team, name: str, path: str) -> Any:
        if type(value) in (list, tuple):
            members = [self._twin(one, root, name, f"{path}.{n}") for n, one in enumerate(value)]
            is_same = all(one is other for one, other in zip(members, value, strict=True))
            return value if is_same else type(value)(members)
        if type(value) is dict:
            items = {key: self._twin(one, root, name, f"{path}.{key}") for key, one in value.items()}
            return value if all(items[key] is value[key] for key in value) else items
        if id(value) not in self._seen and _is_the_programs(value):
            self._look_into(value, root, name, path)
        return value

    def _keep_order(self, member: ChatAgent | Team, name: str) -> None:
        """Members that work at the same time end in the recorded order, whatever made one of them slow."""
        if isinstance(member, Team):
            self._replace(member, "run_stream", _in_order(member.run_stream, TaskResult, self._recorder, name))
        else:
            stream = _in_order(member.on_messages_stream, Response, self._recorder, name)
            self._replace(member, "on_messages_stream", stream)

    def _replace(self, owner: object, attribute: str, value: object) -> None:
        attributes = vars(owner)
        self._before.append((attributes, attribute, attributes.get(attribute, _NOT_THERE)))
        # Not setattr: the owner may be frozen, or have opinions.
        attributes[attribute] = value


def _is_own_way_out(value: object) -> bool:
    modules = type(value).__module__.lstrip("_").split(".")
    return modules[0] in OWN_WAYS_OUT or modules[-1] in OWN_WAYS_OUT


def _is_the_programs(value: object) -> bool:
    package = type(value).__module__.partition(".")[0]
    return (
        hasattr(value, "__dict__")
        and package not in LIBRARIES
        and package not in sys.stdlib_module_names
        and not isinstance(value, (type, ModuleType, FunctionType, MethodType))
    )


def _inside(outer: str, name: str) -> str:
    return f"{outer}/{name}" if outer else name


def _contained(stream: Callable[..., AsyncGenerator[Any, None]], recorder: Recorder, name: str) -> Callable[..., Any]:
    """The same stream; AutoGen would wait for ever for an agent that ends as cancelled."""

    async def contained(messages: Any, cancellation_token: CancellationToken) -> AsyncGenerator[Any, None]:
        try:
            async for item in stream(messages, cancellation_token):
                yield item
        except (Exception, GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            is_meant = recorder.failed.done() or cancellation_token.is_cancelled() or is_being_cancelled()
            if isinstance(error, asyncio.CancelledError) and (is_meant or sys.version_info < (3, 11)):
                raise  # before Python 3.11, it can't be told who cancels
            raise made_ordinary(error, name) from error

    return contained


def _in_order(
    stream: Callable[..., AsyncGenerator[Any, None]], last: type, recorder: Recorder, name: str
) -> Callable[..., AsyncGenerator[Any, None]]:
    """The same stream; its last item is let through when its turn comes."""
    turns = 0

    async def nothing() -> None:
        """The item is not in the record: what led to it is."""

    async def in_order(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        nonlocal turns
        async for item in stream(*args, **kwargs):
            if isinstance(item, last) and not in_recorded_call.get():
                turns += 1
                await recorder.event(Kind.TURN, name, f"turn/{turns}", describe_turn(_words(item)), nothing)
            yield item

    return in_order


def _words(item: Any) -> str:
    messages = item.messages if isinstance(item, TaskResult) else [item.chat_message]
    return "\n".join(message.to_text() for message in messages)


def _recorded_input(
    ask: Callable[..., Any], recorder: Recorder, name: str
) -> Callable[[str, CancellationToken | None], Awaitable[str]]:
    """A person's input, recorded like a reply."""
    count = 0

    async def asked(prompt: str, cancellation_token: CancellationToken | None) -> str:
        in_recorded_call.set(True)
        if inspect.iscoroutinefunction(ask):
            return str(await ask(prompt, cancellation_token))
        return str(await asyncio.get_running_loop().run_in_executor(None, ask, prompt))

    async def recorded(prompt: str, cancellation_token: CancellationToken | None) -> str:
        nonlocal count
        if in_recorded_call.get():
            return await asked(prompt, cancellation_token)
        count += 1
        position = f"input/{count}"
        # At once, and not when the server knows of it: AutoGen's UserInputManager waits for ever if its callback is not
        # under way when the request is shown.
        is_live = not recorder.is_recorded(f"{name}/{position}")
        asking = asyncio.create_task(asked(prompt, cancellation_token)) if is_live else None

        async def perform() -> str:
            return await (asking or asked(prompt, cancellation_token))

        try:
            outcome = await recorder.event(Kind.INPUT, name, position, hashed({"prompt": prompt}), perform)
        finally:
            if asking is not None and not asking.done():
                asking.cancel()
        counts = recorder.replayed if outcome.replayed else recorder.live
        counts["inputs"] += 1
        if outcome.replayed:
            recorder.tell(f"[Nexum] input {count} of {name}: replayed from the record ✓")
        return str(outcome.content)

    return recorded
