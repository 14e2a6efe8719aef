"""The state that the AutoGen integration keeps for one session: agent names, positions and message ids."""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from autogen_core import FunctionCall
from autogen_core.models import CreateResult, LLMMessage, RequestUsage, UserMessage

from durable_autogen.autogen.fingerprints import Conversation
from durable_autogen.autogen.transcript import Transcript
from durable_autogen.record.events import Event, Kind, Said
from durable_autogen.record.recorder import Recorder

MAX_OPEN_CALLS = 1000  # requested tool calls that no agent has made yet; the oldest ones are dropped


class AgentState:
    """The state of one agent: its last request to a model, and the tool calls that its replies requested."""

    def __init__(self) -> None:
        self.conversation = Conversation()
        self.replayed = False
        """Whether the agent's last reply was replayed."""
        self._calls: deque[tuple[str, FunctionCall]] = deque(maxlen=MAX_OPEN_CALLS)
        self._last_reply = 0
        self._thought = ""
        self._last_tool = 0
        """The number of the last reply's last tool call. Calls that no reply requested are counted, too."""

    def received(self, position: str, result: CreateResult, *, replayed: bool) -> None:
        """Remember that the agent got a reply, and which tool calls the reply requests."""
        calls = [] if isinstance(result.content, str) else result.content
        # Put the newest reply's tool calls first, in the order of the reply.
        self._calls.extendleft((f"{position}/tool/{n}", call) for n, call in reversed(list(enumerate(calls, 1))))
        self._last_reply, self._last_tool = int(position.rpartition("/")[2]), len(calls)
        self._thought = result.thought or ""
        self.replayed = replayed

    def position_of_call(self, call_id: str | None, name: str) -> str:
        """Return a tool call's position. Find the requested call by its id and tool name, else by its tool name."""
        same_name = [one for one in self._calls if one[1].name == name]
        same_id = [one for one in same_name if one[1].id == call_id]
        for found in (*same_id, *same_name):
            self._calls.remove(found)
            return found[0]
        # No reply requested this call: a custom agent may call tools on its own.
        self._last_tool += 1
        return f"reply/{self._last_reply}/tool/{self._last_tool}"

    def reason_for(self, position: str) -> str:
        """Return the text that the model gave along with the tool call at this position; empty if it gave none."""
        return self._thought if position.startswith(f"reply/{self._last_reply}/") else ""


class Names:
    """Unique names for objects. An object keeps its name, and no two objects have the same name."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, str], tuple[str, object]] = {}
        """For each object's `id()` and wanted name: the name, and a reference to the object.

        The reference is weak, and removes the name when the object is freed. An object that can't be weakly referenced
        is kept alive, so that no other object gets its `id()`.
        """
        self._counts: Counter[str] = Counter()

    def of(self, bearer: object, wanted: str) -> str:
        """Return the name of `bearer`: `wanted`, followed by a number if another object has that name."""
        key = (id(bearer), wanted)
        if key not in self._names:
            self._counts[wanted] += 1
            number = self._counts[wanted]
            name, names = wanted if number == 1 else f"{wanted}#{number}", self._names
            try:
                names[key] = name, weakref.ref(bearer, lambda _: names.pop(key))
            except TypeError:
                names[key] = name, bearer
        return self._names[key][0]


class SessionState:
    """The state that the entry points keep for one session."""

    def __init__(self, recorder: Recorder) -> None:
        self.names = Names()
        self.transcript = Transcript(recorder)
        self.added = AddedMessages(recorder)
        self.timeouts: weakref.WeakKeyDictionary[Any, tuple[float | None, int]] = weakref.WeakKeyDictionary()
        """For each TimeoutTermination: its adjusted start time, and the session's active time at the real start."""
        self.stopped: dict[int, object] = {}
        """The conditions that only the replay has stopped, by `id()`. They don't know that they are terminated.

        A reset of a condition removes it from here.
        """
        self.replayed_usage: dict[int, tuple[object, RequestUsage]] = {}
        """The usage of each client's replayed replies."""
        self._agents: dict[str, AgentState] = {}
        self._sources: dict[str, set[str]] = {}
        """For each source of messages: the agents whose messages have this source."""

    def agent(self, name: str) -> AgentState:
        """Return the state of the agent with this name."""
        return self._agents.setdefault(name, AgentState())

    def speaks_as(self, agent: str, source: str) -> None:
        """Remember that the messages of `agent` have the source `source`."""
        self._sources.setdefault(source, set()).add(agent)

    def was_replayed(self, source: str) -> bool:
        """Return whether each agent that speaks as `source` got its last reply from the replay.

        Agents without a reply don't count. If no agent has a reply, return False.
        """
        agents = [self._agents[name] for name in self._sources.get(source, ()) if name in self._agents]
        return any(one.replayed for one in agents) and all(one.replayed or not one.conversation.model for one in agents)

    def used(self, client: object, usage: RequestUsage) -> None:
        """Add a replayed reply's usage to the replayed usage of `client`."""
        self.replayed_usage[id(client)] = (client, total(self.replayed_usage_of(client), usage))

    def replayed_usage_of(self, client: object) -> RequestUsage:
        """Return the total usage of the replayed replies of `client`."""
        found = self.replayed_usage.get(id(client))
        return RequestUsage(prompt_tokens=0, completion_tokens=0) if found is None else found[1]


class AddedMessages:
    """The user messages added to a fork. Each agent gets them in its first live request and in all later ones."""

    def __init__(self, recorder: Recorder) -> None:
        self.messages = [event for event in recorder.journal.events if event.kind is Kind.MESSAGE]
        self.delivered: set[int] = set()
        """The event numbers of the messages that at least one agent got."""
        self.as_task: set[int] = set()
        """The event numbers of the messages that were run as a new task, because no agent got them during the run."""
        self._recorder = recorder
        self._at: dict[str, dict[int, int]] = {}
        """For each agent and event number of a message: at which index the agent's requests have the message."""

    def inserted_into(self, agent: str, position: str, messages: Sequence[LLMMessage]) -> Sequence[LLMMessage]:
        """Return a request's messages, with the added user messages inserted."""
        if not self.messages:
            return messages
        at = self._at.setdefault(agent, {})
        for added in self.messages:
            recorded = self._recorder.replay.event_for(f"{agent}/{position}")
            comes_before = recorded is not None and recorded.seq < added.seq
            if added.seq not in at and not comes_before and added.seq not in self.as_task:
                at[added.seq] = len(messages)
                self.delivered.add(added.seq)
        whole = list(messages)
        for added in reversed(self.messages):
            if added.seq in at:
                whole.insert(min(at[added.seq], len(messages)), UserMessage(content=text_of(added), source="user"))
        return whole


def text_of(added: Event) -> str:
    """Return the text of an added user message."""
    assert isinstance(added.content, Said)
    return added.content.text


def total(one: RequestUsage, other: RequestUsage) -> RequestUsage:
    """Return the sum of two usages."""
    return RequestUsage(
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
    )
