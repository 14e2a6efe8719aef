"""The parts of a team that act on the world, and their durable twins."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from autogen_agentchat.agents import UserProxyAgent
from autogen_agentchat.base import ChatAgent, Team, TerminationCondition
from autogen_agentchat.conditions import TimeoutTermination
from autogen_core import CancellationToken
from autogen_core.code_executor import CodeExecutor
from autogen_core.models import ChatCompletionClient
from autogen_core.tools import StaticWorkbench, Workbench

from console import say
from durable_autogen.errors import NotDurable
from durable_autogen.journal import Kind
from durable_autogen.model import DurableModelClient, Replies
from durable_autogen.recorder import Recorder
from durable_autogen.request import hashed
from durable_autogen.termination import DurableTimeout, members
from durable_autogen.workbench import DurableWorkbench

# Packages through which an agent acts by itself: a vendor's own client, a browser.
OWN_WAYS_OUT = frozenset({"anthropic", "azure", "ollama", "openai", "playwright", "playwright_controller"})


class Parts:
    """Everything in a team that acts on the world, replaced by its durable twin for one run."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._replies: dict[str, Replies] = {}
        self._before: list[tuple[object, str, object]] = []
        self._seen: set[int] = set()

    def was_replayed(self, source: str) -> bool:
        """Whether the last reply of the agent of this name came from the record."""
        return source in self._replies and self._replies[source].replayed

    def restore(self) -> None:
        """Put everything back."""
        for owner, attribute, value in reversed(self._before):
            setattr(owner, attribute, value)

    def make_durable(self, part: object, name: str) -> None:
        """Replace what the part and its own parts call by themselves. Raises NotDurable."""
        if id(part) in self._seen:
            return
        self._seen.add(id(part))
        if isinstance(part, UserProxyAgent):
            self._replace(part, "_is_async", True)
            self._replace(part, "input_func", _recorded_input(part.input_func, self._recorder, name))
        for attribute, value in list(vars(part).items()):
            if isinstance(value, ChatCompletionClient):
                label = name if attribute == "_model_client" else f"{name}.{attribute.strip('_')}"
                label = label if isinstance(part, ChatAgent) else f"{label or type(part).__name__} (team)"
                self._replace(part, attribute, self.model_client(value, label))
            elif isinstance(value, CodeExecutor):
                raise NotDurable(
                    f"{name} runs code with {type(value).__name__}, whose effects can't be recorded here: give the "
                    "agent a tool that runs the code"
                )
            elif isinstance(value, (ChatAgent, Team)):
                self.make_durable(value, _inside(name, value.name))
            elif isinstance(value, (list, tuple)):
                self._replace_members(part, attribute, value, name)
            elif isinstance(value, Workbench):
                self._replace(part, attribute, self.workbench(value, name))
            elif isinstance(value, TerminationCondition):
                self._replace(part, attribute, self._termination(value))
            elif isinstance(part, ChatAgent) and _is_own_way_out(value):
                raise NotDurable(
                    f"{name} ({type(part).__name__}) acts by itself through {type(value).__module__}, and "
                    "what it gets there can't be recorded here: use an agent with a model client and tools"
                )

    def _replace_members(self, part: object, attribute: str, members: Sequence[object], name: str) -> None:
        if members and all(isinstance(member, Workbench) for member in members):
            self._replace(part, attribute, [self.workbench(cast(Workbench, member), name) for member in members])
        for member in members:
            if isinstance(member, (ChatAgent, Team)):
                self.make_durable(member, _inside(name, member.name))

    def model_client(self, client: ChatCompletionClient, name: str) -> DurableModelClient:
        """The client's durable twin for the agent of this name."""
        inner = client.inner if isinstance(client, DurableModelClient) else client
        return DurableModelClient(inner, self._recorder, name, self._replies_of(name))

    def workbench(self, workbench: Workbench, name: str) -> DurableWorkbench:
        """The workbench's durable twin for the agent of this name."""
        inner = workbench.inner if isinstance(workbench, DurableWorkbench) else workbench
        if isinstance(inner, StaticWorkbench):
            for tool in inner._tools:
                runner = getattr(tool, "_task_runner", None)
                if isinstance(runner, (ChatAgent, Team)):
                    self.make_durable(runner, _inside(name, runner.name))
        return DurableWorkbench(inner, self._recorder, name, self._replies_of(name))

    def _termination(self, condition: TerminationCondition) -> TerminationCondition:
        if isinstance(condition, TimeoutTermination):
            return DurableTimeout(condition, self._recorder)
        if parts := members(condition):
            self._replace(condition, "_conditions", tuple(self._termination(one) for one in parts))
        return condition

    def _replies_of(self, name: str) -> Replies:
        return self._replies.setdefault(name, Replies())

    def _replace(self, part: object, attribute: str, value: object) -> None:
        self._before.append((part, attribute, getattr(part, attribute)))
        setattr(part, attribute, value)


def _is_own_way_out(value: object) -> bool:
    modules = type(value).__module__.lstrip("_").split(".")
    return modules[0] in OWN_WAYS_OUT or modules[-1] in OWN_WAYS_OUT


def _inside(outer: str, name: str) -> str:
    return f"{outer}/{name}" if outer else name


def _recorded_input(
    ask: Callable[..., Any], recorder: Recorder, name: str
) -> Callable[[str, CancellationToken | None], Awaitable[str]]:
    """A person's input, recorded like a reply."""
    count = 0

    async def recorded(prompt: str, cancellation_token: CancellationToken | None) -> str:
        nonlocal count
        count += 1

        async def perform() -> str:
            if inspect.iscoroutinefunction(ask):
                return str(await ask(prompt, cancellation_token))
            return str(await asyncio.get_running_loop().run_in_executor(None, ask, prompt))

        outcome = await recorder.event(Kind.INPUT, name, f"input/{count}", hashed({"prompt": prompt}), perform)
        counts = recorder.replayed if outcome.replayed else recorder.live
        counts["inputs"] += 1
        if outcome.replayed:
            say(f"[Nexum] input {count} of {name}: replayed from the record ✓")
        return str(outcome.content)

    return recorded
