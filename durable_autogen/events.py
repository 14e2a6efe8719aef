"""What a session has on record: its events and its runs, and how they are read.

Each event (a model's reply, a tool's result, a person's input) is an execution of one node that the recording process
owns, under a key that names session, agent and position. A run of the session is one, too: who owns it may record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict

from durable_autogen.failures import Failure
from nexum_engine.client import NexumClient
from nexum_engine.model import Execution, ExecutionStatus
from nexum_engine.workflow import workflow

PATIENCE = 3.0  # seconds to wait for a server that may be starting again
PAGE = 100  # executions in one answer, at most


class Kind(str, Enum):
    """What an event is."""

    BEGIN = "begin"
    """The session's question and team."""
    REPLY = "reply"
    """A model's."""
    TOOL = "tool"
    """A tool's result, or its failure."""
    INPUT = "input"
    """A person's."""
    BRANCH = "branch"
    """From here on, another program than the recorded one."""
    MESSAGE = "message"
    """A user message that was added to a fork."""
    TURN = "turn"
    """An agent that works beside others has said what it had to say: its place in the order is recorded."""
    STOP = "stop"
    """Somebody outside has stopped the run."""
    REVOKE = "revoke"
    """An event that counts no more."""

    @property
    def is_call(self) -> bool:
        """Whether it has been paid for, in money, effects or a person's time."""
        return self in (Kind.REPLY, Kind.TOOL, Kind.INPUT)

    @property
    def is_asked_for(self) -> bool:
        """Whether it is asked for in the course of a run; the others are the session's own."""
        return self.is_call or self in (Kind.TURN, Kind.STOP)


class RunInput(BaseModel):
    """One run of a session."""

    model_config = ConfigDict(frozen=True)

    session: str
    run: int


class RunSummary(BaseModel):
    """What a run did."""

    model_config = ConfigDict(frozen=True)

    stop_reason: str = ""
    live: dict[str, int]
    replayed: dict[str, int]
    last: int = 0
    """The number of the session's last event: the session is finished if it is the last one still."""


class EventInput(BaseModel):
    """Which event of a session this is."""

    model_config = ConfigDict(frozen=True)

    session: str
    epoch: int
    agent: str
    position: str
    kind: Kind


class Event(BaseModel):
    """An event as it is recorded."""

    model_config = ConfigDict(frozen=True)

    seq: int
    """The session's order: events reach the agents in it, in this run and in every later one."""
    epoch: int
    """How often the session went on with a changed program."""
    kind: Kind
    agent: str
    position: str
    content: Any
    request: dict[str, Any] = {}
    failure: Failure | None = None
    """What was raised instead of content."""
    accepted: bool = False
    """Copied into a fork: it counts whatever it is asked with."""
    recorded_ms: int = 0
    """When, in milliseconds since 1970 by the recording process's clock."""
    active_ms: int = 0
    """How long the session had been at work by then: the time between a run's death and the next run doesn't count."""
    asked_ms: int = 0
    """The same for the moment at which it was asked for."""

    @property
    def address(self) -> str:
        return f"{self.agent}/{self.position}"

    def __str__(self) -> str:
        return name_of(self.kind, self.agent, self.position)


AGENT_RUN = workflow("agent-run", input=RunInput).effect("run", RunSummary).build()
AGENT_EVENT = workflow("agent-event", input=EventInput).effect("event", Event).build()


_HALVES = re.compile("[\ud800-\udfff]")


def name_of(kind: Kind, agent: str, position: str) -> str:
    """An event for a person: `reply 2 of writer`."""
    return f"{position.replace('/', ' ')} of {agent}" if kind.is_asked_for else kind.value


async def read_events(client: NexumClient, session: str) -> tuple[list[Event], list[EventInput], set[str]]:
    """The recorded events in order, the inputs of unfinished ones, and the addresses of all that had no result."""
    recorded: list[Event] = []
    tried: set[str] = set()
    begun: list[EventInput] = []
    before = ""
    while True:
        page = await client.list_executions(
            workflow_id=AGENT_EVENT.workflow_id,
            key_prefix=f"{session}/",
            before=before,
            limit=PAGE,
            with_nodes=True,
            patience=PATIENCE,
        )
        for execution in page:
            if execution.status is ExecutionStatus.COMPLETED:
                recorded.append(Event.model_validate_json(execution.outputs()["event"]))
                continue
            input = EventInput.model_validate_json(execution.input_json)
            tried.add(f"{input.agent}/{input.position}")
            if execution.status is ExecutionStatus.RUNNING:
                begun.append(input)
        if not page:
            tried |= {event.content["address"] for event in recorded if event.kind is Kind.REVOKE}
            return effective(recorded), begun, tried
        before = page[-1].execution_id


def effective(recorded: Sequence[Event]) -> list[Event]:
    """The events that count: a branch leaves behind what came after the place where it began, except what a person has
    added: that still has to be said."""
    in_order = sorted(recorded, key=lambda event: (event.epoch, event.seq))
    kept: list[Event] = []
    for event in in_order:
        if event.kind is Kind.BRANCH:
            after = event.content["after"]
            kept = [earlier for earlier in kept if earlier.seq <= after or earlier.kind is Kind.MESSAGE]
        if event.kind is Kind.REVOKE:
            kept = [earlier for earlier in kept if earlier.seq != event.content["seq"]]
        kept.append(event)
    return kept


def end_of(completed: Execution | None, events: Sequence[Event]) -> str | None:
    """Why a session is finished, if its last completed run left nothing open: nothing was recorded since."""
    if completed is None:
        return None
    summary = RunSummary.model_validate_json(completed.outputs()["run"])
    return summary.stop_reason if summary.last == max((event.seq for event in events), default=0) else None


def representable(value: Any) -> Any:
    """The same as JSON that every database takes: half of a surrogate pair, which is no character, is replaced."""
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value)
    if isinstance(value, dict):
        return {representable(key): representable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [representable(item) for item in value]
    return value
