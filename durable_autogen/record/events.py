"""What a session has on record: its runs and its events, and how they are read.

An event is a call (a model's reply, a tool's result, a person's input, ...) or a mark (an agent's turn is over, the run
was stopped). Each is one execution with one node, owned by the recording process, under a key that names session, agent
and position. A run of the session is an execution, too: only the process that owns it may record.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from durable_autogen.record.failures import Failure
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from nexum_engine.records import Execution, ExecutionStatus
from nexum_engine.workflow import workflow

SERVER_PATIENCE = 3.0  # seconds to wait for a server that may be restarting
PAGE = 100  # executions in one answer, at most
MAX_DEPTH = 100  # levels of a value that is recorded as it is; a deeper one is recorded as a text


class Kind(str, Enum):
    """What an event is."""

    BEGIN = "begin"
    """The session's task and team."""
    REPLY = "reply"
    """A model's reply."""
    TOOL = "tool"
    """A tool's result."""
    TOOLS = "tools"
    """The list of a workbench's tools."""
    INPUT = "input"
    """A person's input."""
    CONSOLE = "console"
    """A line that a person typed at the console."""
    CODE = "code"
    """The result of executed code."""
    MEMORY = "memory"
    """The answer of a memory."""
    MESSAGE = "message"
    """A user message that was added to a fork."""
    TURN = "turn"
    """An agent that works beside others has finished its turn."""
    STOP = "stop"
    """A termination condition has stopped the run."""
    REVOKE = "revoke"
    """Earlier events no longer count."""

    @property
    def is_call(self) -> bool:
        """Whether it was paid for: in money, effects or a person's time."""
        return self in (Kind.REPLY, Kind.TOOL, Kind.INPUT, Kind.CONSOLE, Kind.CODE)

    @property
    def acts(self) -> bool:
        """Whether the call acts on the world or asks a person: then it is on record before it is made."""
        return self in (Kind.TOOL, Kind.INPUT, Kind.CODE)

    @property
    def is_asked_for(self) -> bool:
        """Whether a run asks for it; the others are the session's own."""
        return self not in (Kind.BEGIN, Kind.MESSAGE, Kind.REVOKE)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


# ---- What an event holds ---------------------------------------------------------------------------------------------


class Returned(_Frozen):
    """What a call returned."""

    type: Literal["returned"] = "returned"
    value: Any = None
    """The value as `encoded` writes it."""
    streamed: list[Any] = []
    """What a stream passed on before its result."""
    is_broken: bool = False
    """Whether a model's reply is empty or cut off: as a run's last one it is asked for again by the next run."""


class Raised(_Frozen):
    """What a call raised."""

    type: Literal["raised"] = "raised"
    failure: Failure
    streamed: list[Any] = []


class GivenUp(_Frozen):
    """The program cancelled the call, or left its stream."""

    type: Literal["given_up"] = "given_up"
    streamed: list[Any] = []


class Begun(_Frozen):
    """The task of a session."""

    type: Literal["begun"] = "begun"
    task: list[str] = []
    """The task's texts; none if the program runs its agents itself."""
    messages: list[dict[str, Any]] = []
    """The task's messages, as they are built again."""


class Said(_Frozen):
    """A message that the user added to a fork."""

    type: Literal["said"] = "said"
    text: str


class Revoked(_Frozen):
    """Which events no longer count."""

    type: Literal["revoked"] = "revoked"
    why: str
    seqs: list[int]
    is_another_program: bool = False
    """Whether the session continues as another program from here."""


class Mark(_Frozen):
    """Nothing but the event's place in the order."""

    type: Literal["mark"] = "mark"


Content: TypeAlias = Annotated[Returned | Raised | GivenUp | Begun | Said | Revoked | Mark, Field(discriminator="type")]


# ---- Runs and events -------------------------------------------------------------------------------------------------


class RunInput(_Frozen):
    """Which run of a session this is."""

    session: str
    run: int


class RunSummary(_Frozen):
    """What a run did."""

    stop_reason: str = ""
    live: dict[str, int]
    replayed: dict[str, int]
    last: int = 0
    """The number of the session's last event. The session is finished as long as it is the last one."""
    looks: dict[str, int] = {}
    """How often each condition that may stop the run was asked."""


@dataclass(frozen=True)
class Asked:
    """When a call was made."""

    after: int = 0
    """The number of the last event that had been delivered by then."""
    active_ms: int = 0
    """For how long the session's runs had been at work by then."""


class EventInput(_Frozen):
    """Which event of a session this is."""

    session: str
    agent: str
    position: str
    kind: Kind

    @property
    def address(self) -> str:
        return f"{self.agent}/{self.position}"


class Event(_Frozen):
    """A recorded event."""

    seq: int
    """The event's number in the session. Agents get their events in this order, in this run and in every later one."""
    kind: Kind
    agent: str
    position: str
    content: Content
    request: dict[str, Any] = {}
    """The fingerprint of what was asked."""
    accepted: bool = False
    """Whether the event was copied into a fork: it counts, whatever it is asked with."""
    asked_after: int = 0
    """The number of the last event that had been delivered when this one was asked for."""
    recorded_ms: int = 0
    """When it was recorded, in milliseconds since 1970 by the recording process's clock."""
    active_ms: int = 0
    """For how long the session's runs had been at work by then; the time between two runs doesn't count."""
    asked_ms: int = 0
    """The same for the moment at which it was asked for."""
    under_way: list[str] = []
    """The addresses of the calls without a recorded beginning that were made since the event before, and were under way
    when this one was recorded."""

    @property
    def is_setback(self) -> bool:
        """Whether a run that ends with this event has to make the call again: it failed, or its reply is broken."""
        return isinstance(self.content, Raised) or (isinstance(self.content, Returned) and self.content.is_broken)

    @property
    def address(self) -> str:
        return f"{self.agent}/{self.position}"

    def __str__(self) -> str:
        return name_of(self.kind, self.agent, self.position)


@dataclass(frozen=True)
class Call:
    """What a run asks for, or what is recorded on its own."""

    kind: Kind
    agent: str
    position: str
    request: Mapping[str, Any] = field(default_factory=dict)
    """The fingerprint: what is new in it, beside what an earlier request of the agent has."""
    whole_request: Callable[[], Mapping[str, Any]] | None = None
    """All of the fingerprint, where `request` is only a part."""
    label: str = ""
    """What an error calls it, if not by its name."""

    @property
    def address(self) -> str:
        return f"{self.agent}/{self.position}"

    def __str__(self) -> str:
        return name_of(self.kind, self.agent, self.position)


def name_of(kind: Kind, agent: str, position: str) -> str:
    """Name an event for a person: `reply 2 of writer`."""
    words = position.removeprefix("reply/0/").replace("/", " ")  # what no reply has asked for
    return f"{words} of {agent or 'the program'}" if kind.is_asked_for else kind.value


AGENT_RUN = workflow("agent-run", input=RunInput).effect("run", RunSummary).build()
AGENT_EVENT = workflow("agent-event", input=EventInput).effect("event", Event).build()


# ---- Values ----------------------------------------------------------------------------------------------------------

_HALVES = re.compile("[\ud800-\udfff]")
_FLOAT, _TEXT, _DICT = "$float", "$json", "$dict"


def encoded(value: Any) -> Any:
    """Write a JSON-like value so that every database takes it: `decoded` gives the same value back.

    Infinite numbers and NaN, which JSON lacks, and values that nest too deeply get a form of their own.
    Raises InvalidRequest if the value can't be written at all.
    """
    try:
        return _encoded(value, MAX_DEPTH)
    except RecursionError:
        pass
    try:
        return {_TEXT: json.dumps(value, ensure_ascii=False, separators=(",", ":"))}
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the value can't be written as JSON: {error}") from error


def _encoded(value: Any, levels: int) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if levels == 0:
        raise RecursionError
    if isinstance(value, Mapping):
        items = {key: _encoded(item, levels - 1) for key, item in value.items()}
        return {_DICT: items} if items.keys() & {_FLOAT, _TEXT, _DICT} else items
    if isinstance(value, (list, tuple)):
        return [_encoded(item, levels - 1) for item in value]
    raise InvalidRequest(f"a {type(value).__name__} can't be written as JSON")


def decoded(value: Any) -> Any:
    """Read a value that `encoded` wrote."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _FLOAT in value:
        return float(value[_FLOAT])
    if _TEXT in value:
        return json.loads(value[_TEXT])
    return {key: decoded(item) for key, item in value.get(_DICT, value).items()}


def representable(value: Any) -> Any:
    """Replace half surrogate pairs, which are no characters and which no database takes, in a JSON-like value."""
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value) if not value.isascii() else value
    if isinstance(value, dict):
        return {representable(key): representable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [representable(item) for item in value]
    return value


# ---- Reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """A session's events as they are read from the server."""

    events: list[Event] = field(default_factory=list)
    """The events that count, in order."""
    begun: list[EventInput] = field(default_factory=list)
    """What a run had begun and not finished."""
    tried: set[str] = field(default_factory=set)
    """The addresses of all calls that were made and have no result, as far as the record tells, and of those that were
    revoked."""
    times_revoked: Counter[str] = field(default_factory=Counter)
    """How often the event of an address was revoked."""
    last_seq: int = 0
    """The highest number that an event has, whether it counts or not."""
    ended_ms: dict[int, int] = field(default_factory=dict)
    """When each event was recorded, by the server's clock."""
    last_begun_ms: int = 0
    """When the last call was begun that has no result, by the server's clock."""


async def read_record(client: NexumClient, session: str) -> Record:
    """Read all that a session has recorded."""
    recorded: list[Event] = []
    found = Record()
    before = ""
    while True:
        page = await client.list_executions(
            workflow_id=AGENT_EVENT.workflow_id,
            key_prefix=f"{session}/",
            before=before,
            limit=PAGE,
            with_nodes=True,
            patience=SERVER_PATIENCE,
        )
        for execution in page:
            if execution.status is ExecutionStatus.COMPLETED:
                recorded.append(Event.model_validate_json(execution.outputs()["event"]))
                found.ended_ms[recorded[-1].seq] = execution.ended_ms or 0
                found.tried.update(recorded[-1].under_way)
                continue
            found.last_begun_ms = max(found.last_begun_ms, execution.created_ms)
            input = EventInput.model_validate_json(execution.input_json)
            found.tried.add(input.address)
            if execution.status is ExecutionStatus.RUNNING:
                found.begun.append(input)
        if not page:
            break
        before = page[-1].execution_id
    kept: dict[int, Event] = {}
    for event in sorted(recorded, key=lambda one: one.seq):
        found.last_seq = event.seq
        if isinstance(event.content, Revoked):
            for seq in event.content.seqs:
                if (revoked := kept.pop(seq, None)) is not None:
                    found.times_revoked[revoked.address] += 1
                    found.tried.add(revoked.address)
        kept[event.seq] = event
    found.events = list(kept.values())
    return found


def end_of(completed: Execution | None, events: list[Event]) -> RunSummary | None:
    """Return what a session's last completed run did, if nothing was recorded after it: the session is finished."""
    if completed is None:
        return None
    summary = RunSummary.model_validate_json(completed.outputs()["run"])
    return summary if summary.last == max((event.seq for event in events), default=0) else None
