"""The runs and events of a session, and functions that read them from the server.

An event is either the outcome of a call (a model's reply, a tool's result, a person's input, ...), or a mark that notes
a fact (an agent's turn is over, the run was stopped). Each event is an execution with one node. The recording process
owns the execution. Each run of the session is an execution, too: only the process that owns the run's execution may
record events.

These are the names of a call, here of the second tool call that the third reply of `writer` requests, in session `s1`:

position  reply/3/tool/2                    the place among the agent's calls
address   writer/reply/3/tool/2             agent and position: unique among the events that are not revoked
scope     writer/reply/3/tool/2             the address; if a changed program's call replaces n earlier ones, with
                                            /again/n
digest    9f86...                           the hash of tool and arguments; only a tool's call has one
call id   s1/writer/reply/3/tool/2/9f86...  session, scope and digest: the same when the call is made again, so that a
                                            service recognizes it
key       s1/writer/reply/3/tool/2/9f86...  the idempotency key of the event's execution: session, address and digest;
                                            if n events of the address are revoked, with /again/n after the address

If an agent makes equal calls of several objects, the keys of the later ones have another hash in place of the digest
(see `Requested.unnumbered_hash`).

An event also has a number (`seq`). Every run delivers the events in the order of their numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from durable_autogen.record.failures import Failure
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from nexum_engine.records import Execution, ExecutionStatus
from nexum_engine.workflow import workflow

SERVER_PATIENCE = 3.0  # seconds to wait for a server that may be restarting
MAX_QUESTION = 200  # characters; a longer question is cut in a summary
DIGITS = 12  # of a call's digest, in ids and keys

_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_session_id(session_id: str) -> str:
    """Return the session id. Raises InvalidRequest if it isn't valid."""
    if not isinstance(session_id, str) or not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(
            f"{session_id!r} is not a session id: use a text of up to 64 letters, digits, - and _, beginning with a "
            "letter or digit"
        )
    return session_id


class Kind(str, Enum):
    """The kind of an event."""

    BEGIN = "begin"
    """The session's task and team."""
    REPLY = "reply"
    """A model's reply."""
    TOOL = "tool"
    """A tool's result."""
    TOOLS = "tools"
    """The list of a workbench's tools, or what a workbench has read from an MCP server: prompts, resources."""
    INPUT = "input"
    """A person's input."""
    CONSOLE = "console"
    """A line that a person typed at the console."""
    CODE = "code"
    """The result of executed code."""
    MEMORY = "memory"
    """The answer of a memory."""
    WAIT = "wait"
    """The beginning of a sleep or of a wait for a sent event."""
    SLEEP = "sleep"
    """The end of a sleep."""
    SENT_EVENT = "event"
    """The end of a wait for a sent event: the event's payload, or a timeout."""
    MESSAGE = "message"
    """A user message added to a fork."""
    TURN = "turn"
    """The end of an agent's turn, or the start of a streamed reply. Recorded only if agents work in parallel."""
    STOP = "stop"
    """A stop by a termination condition."""
    REVOKE = "revoke"
    """A note that earlier events no longer count."""

    @property
    def is_call(self) -> bool:
        """Whether a call of this kind costs money or a person's time, acts on the world, or waits for a sent event."""
        return self in (Kind.REPLY, Kind.TOOL, Kind.INPUT, Kind.CONSOLE, Kind.CODE, Kind.SENT_EVENT)

    @property
    def is_asked_for(self) -> bool:
        """Whether the program causes events of this kind. The session itself records the other kinds."""
        return self not in (Kind.BEGIN, Kind.MESSAGE, Kind.REVOKE)


class Frozen(BaseModel):
    """A value that is recorded as JSON and never changes."""

    model_config = ConfigDict(frozen=True)


# ---- Contents of an event --------------------------------------------------------------------------------------------


class Returned(Frozen):
    """The content of a call that returned."""

    type: Literal["returned"] = "returned"
    value: Any = None
    """The returned value, as `encoded` writes it."""
    streamed: list[Any] = []
    """The items that a stream yielded before its result."""
    is_broken: bool = False
    """Whether the value is a broken reply. If a run ends with a broken reply, the next run makes the call again."""


class Raised(Frozen):
    """The content of a call that raised an error."""

    type: Literal["raised"] = "raised"
    failure: Failure
    streamed: list[Any] = []


class GivenUp(Frozen):
    """The content of a call that the program cancelled, or whose stream the program left early."""

    type: Literal["given_up"] = "given_up"
    streamed: list[Any] = []
    was_made: bool = True
    """Whether this event counts the call as made.

    False if the call was given up before it began, or if a revoked event counts it already.
    """


class Begun(Frozen):
    """The content of a session's first event: its task."""

    type: Literal["begun"] = "begun"
    task: list[str] = []
    """The task's texts; empty if the program runs its agents itself."""
    messages: list[dict[str, Any]] = []
    """The task's messages as JSON; empty if the task is a text."""


class Said(Frozen):
    """The content of a user message added to a fork."""

    type: Literal["said"] = "said"
    text: str


class Revoked(Frozen):
    """The content of an event that revokes earlier events. Revoked events no longer count."""

    type: Literal["revoked"] = "revoked"
    why: str
    seqs: list[int]
    is_another_program: bool = False
    """Whether the events are revoked because a changed program continues the session.

    If so, other calls take the place of the revoked calls, and get new ids. If not, the next run makes the same calls
    again. They keep their ids, so that a service recognizes them: a failed or cancelled call may have done its work.
    """


class Mark(Frozen):
    """The empty content of a mark. Only the mark's place in the order of events matters."""

    type: Literal["mark"] = "mark"


class Waiting(Frozen):
    """The content of a WAIT event, which begins a sleep or a wait for a sent event."""

    type: Literal["waiting"] = "waiting"
    event: str = ""
    """The name of the sent event; empty for a sleep."""
    seconds: float | None = None
    """How long the wait may take; None if the wait has no limit."""
    until_ms: int | None = None
    """The latest time at which the wait ends, in milliseconds since 1970; None if the wait has no limit."""


class Received(Frozen):
    """The content of the event that ends a wait, if the wait received a sent event."""

    type: Literal["received"] = "received"
    event: str
    """The name of the sent event."""
    number: int
    """The number of the sent event. A session numbers the events of each name 1, 2, 3, ..."""
    payload: Any = None
    """The payload, as `encoded` writes it."""


class TimedOut(Frozen):
    """The content of a wait whose event was not sent in time."""

    type: Literal["timed_out"] = "timed_out"


Content: TypeAlias = Annotated[
    Returned | Raised | GivenUp | Begun | Said | Revoked | Mark | Waiting | Received | TimedOut,
    Field(discriminator="type"),
]


# ---- Runs and events -------------------------------------------------------------------------------------------------


class RunInput(Frozen):
    """The input of a run's execution: session and run number."""

    session: str
    run: int


class RunSummary(Frozen):
    """The output of the execution that stands for a run."""

    stop_reason: str = ""
    """The reason for the run's end."""
    last: int = 0
    """The number of the session's last event at the run's end. A later event makes the session unfinished again."""
    looks: dict[str, int] = {}
    """How often the run checked each recorded termination condition."""


class Addressed:
    """The address and the name of a call or an event, made of its kind, its agent and its position."""

    if TYPE_CHECKING:  # otherwise, pydantic would put these fields first in the recorded JSON
        kind: Kind
        agent: str
        position: str

    @property
    def address(self) -> str:
        """The agent and the position."""
        return f"{self.agent}/{self.position}"

    def __str__(self) -> str:
        return name_of(self.kind, self.agent, self.position)


class Requested(Addressed):
    """A call or an event with the fingerprint of its call."""

    if TYPE_CHECKING:
        request: Any

    @property
    def hash(self) -> str | None:
        """The hash in the fingerprint; None if the fingerprint has none, as with a mark."""
        found: str | None = self.request.get("hash")
        return found

    @property
    def unnumbered_hash(self) -> str | None:
        """The hash without the number of the called object. Equal calls of several objects have the same one.

        The number only tells simultaneous calls apart. Drift and ids don't depend on it: a program may make these calls
        in another order, and a fork's program may call other objects.
        """
        found: str | None = self.request.get("unnumbered", self.hash)
        return found

    @property
    def tool(self) -> str:
        """The tool's name; empty for other calls."""
        return str(self.request.get("tool", ""))

    @property
    def digest(self) -> str:
        """The hash of a tool's call, of the tool's name and arguments; empty for other calls."""
        return (self.unnumbered_hash or "") if self.tool else ""

    @property
    def title(self) -> str:
        """The name for a person: of a tool's call, the tool and the agent."""
        return f"{self.tool} for {self.agent or 'the program'}" if self.tool else str(self)


class EventInput(Addressed, Frozen):
    """The input of an event's execution: session, agent, position, kind, and which tool is called with what."""

    session: str
    agent: str
    position: str
    kind: Kind
    tool: str = ""
    """The tool's name; empty for other calls."""
    digest: str = ""
    """The hash in the fingerprint of a tool's call: its digest or, for equal calls of several objects, a hash with the
    object's number. Empty for other calls."""
    accepted: ClassVar[bool] = False
    """Only an event, which has a result, is copied into a fork."""

    @property
    def hash(self) -> str:
        """The hash in the fingerprint of a tool's call; empty for other calls."""
        return self.digest


class Summary(Frozen):
    """A summary of a session for `nexum ps`. Each event stores a summary of all events so far, without revoked ones."""

    number: int = 0
    """The number of the event that stores the summary. `nexum ps` shows the summary with the highest number."""
    question: str = ""
    calls: int = 0
    tokens: int = 0

    def plus(self, event: Event) -> Summary:
        """Return the summary with `event` added."""
        question = self.question
        if isinstance(event.content, Begun):
            question = " / ".join(event.content.task)
        elif isinstance(event.content, Said):
            question = " / ".join(filter(None, (question, event.content.text)))
        elif not question:
            question = text_asked(event)
        return Summary(
            number=event.seq,
            question=question[:MAX_QUESTION],
            calls=self.calls + event.kind.is_call,
            tokens=self.tokens + sum(usage_of(event.content)),
        )

    def minus(self, event: Event) -> Summary:
        """Return the summary without `event`, which no longer counts."""
        return self.model_copy(
            update={"calls": self.calls - event.kind.is_call, "tokens": self.tokens - sum(usage_of(event.content))}
        )


def text_asked(event: Event) -> str:
    """Return the beginning of the first user message of a model request; empty if there is none.

    If a session has no recorded task, this text is shown in place of the task. Only `run_durable` records a task.
    """
    for message in event.request.get("messages", ()) if event.kind is Kind.REPLY else ():
        if str(message["from"]).startswith("UserMessage "):
            return str(message["text"])
    return ""


def usage_of(content: Content) -> tuple[int, int]:
    """Return how many prompt and completion tokens a model's reply took; zeros for another content."""
    match content:
        case Returned(value={"usage": {"prompt_tokens": int(prompt), "completion_tokens": int(completion)}}):
            return prompt, completion
    return 0, 0


class Event(Requested, Frozen):
    """A recorded event."""

    seq: int
    """The event's number in the session. Every run delivers the events in the order of their numbers."""
    kind: Kind
    agent: str
    position: str
    content: Content
    request: dict[str, Any] = {}
    """The fingerprint of the call."""
    accepted: bool = False
    """Whether the event was copied into a fork. A replay doesn't compare such an event with the program's call."""
    asked_after: int = 0
    """The number of the last event that was delivered before the call was made."""
    recorded_ms: int = 0
    """The time of recording, in milliseconds since 1970 by the recording process's clock."""
    active_ms: int = 0
    """The session's active time at the recording: the length of all its runs, without the waits for a person."""
    asked_ms: int = 0
    """The session's active time when the call was made."""
    is_cleanup: bool = False
    """Whether the program was being cancelled, as after Ctrl+C, when it made this call or gave it up."""
    summary: Summary | None = None
    """The summary of the session up to this event. `nexum ps` shows the newest event's summary."""

    @property
    def is_failure(self) -> bool:
        """Whether the call raised an error or got a broken reply.

        If such an event ends a run, the next run makes the event's call again.
        """
        return isinstance(self.content, Raised) or (isinstance(self.content, Returned) and self.content.is_broken)


@dataclass(frozen=True)
class Call(Requested):
    """A call that a run makes, or a mark that the session records."""

    kind: Kind
    agent: str
    position: str
    request: Mapping[str, Any] = field(default_factory=dict)
    """The call's fingerprint. If it has a `base`, it holds only what is new since the request at position `base`."""
    whole_request: Callable[[], Mapping[str, Any]] | None = None
    """A function that returns the whole fingerprint, if `request` is only a part."""
    has_policy: bool = False
    """Whether it is the call of a tool with a policy."""

    @property
    def name(self) -> str:
        """The name in errors: of a tool's call, the tool."""
        return self.tool or str(self)


def end_of_wait(position: str) -> str:
    """Return the position (or address) of a wait's end from the position (or address) of the wait's beginning."""
    return f"{position}/end"


def name_of(kind: Kind, agent: str, position: str) -> str:
    """Return an event's name in words, such as `reply 2 of writer`."""
    if kind in (Kind.SLEEP, Kind.SENT_EVENT):
        return f"end of {name_of(Kind.WAIT, agent, position.removesuffix(end_of_wait('')))}"
    words = position.removeprefix("reply/0/").replace("/", " ")  # reply/0 is the time before the agent's first reply
    return f"{words} of {agent or 'the program'}" if kind.is_asked_for else kind.value


AGENT_RUN = workflow("agent-run", input=RunInput).effect("run", RunSummary).build()
AGENT_EVENT = workflow("agent-event", input=EventInput).effect("event", Event).build()


# ---- Reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """A session's events, and what they say about its calls. `read_record` reads them, and `add` adds a later event."""

    events: list[Event] = field(default_factory=list)
    """The events without revoked ones, in order."""
    history: list[Event | EventInput] = field(default_factory=list)
    """All that was read, in order: events, including revoked ones, and the inputs of calls without a result."""
    unfinished: list[EventInput] = field(default_factory=list)
    """The calls whose executions are still running: an earlier run began these calls without recording a result."""
    times_revoked: Counter[str] = field(default_factory=Counter)
    """How many events of each address were revoked."""
    times_replaced: Counter[str] = field(default_factory=Counter)
    """How many events of each address were revoked and replaced by a different call."""
    revoked_failures: dict[str, int] = field(default_factory=dict)
    """For each address with a revoked failure or given-up call: the event number after which calls may depend on it.

    For a given-up call, this is the last event before the call was made."""
    programs: list[int] = field(default_factory=list)
    """The numbers of the events with which a changed program took over the session."""
    at_end: list[Event] = field(default_factory=list)
    """The events that `read_record` found after the beginning of the last call without a recorded result, in order.

    A failure before that call didn't end the run: the run continued after the failure, and made the call.
    """

    def add(self, event: Event) -> None:
        """Add the session's next event. If it revokes earlier events, remove those."""
        if isinstance(event.content, Revoked):
            seqs, is_another_program = set(event.content.seqs), event.content.is_another_program
            for revoked in (one for one in self.events if one.seq in seqs):
                self.times_revoked[revoked.address] += 1
                self.times_replaced[revoked.address] += is_another_program
                if isinstance(revoked.content, Raised):
                    self.revoked_failures.setdefault(revoked.address, revoked.seq)
                elif isinstance(revoked.content, GivenUp):
                    self.revoked_failures.setdefault(revoked.address, revoked.asked_after)
            self.events = [one for one in self.events if one.seq not in seqs]
            if is_another_program:
                self.programs.append(event.seq)
        self.events.append(event)

    def summary_with(self, event: Event) -> Summary:
        """Return the summary of the session up to `event`, its next event."""
        summary = (self.events[-1].summary if self.events else None) or Summary()
        if isinstance(event.content, Revoked):
            seqs = set(event.content.seqs)
            for revoked in (one for one in self.events if one.seq in seqs):
                summary = summary.minus(revoked)
        return summary.plus(event)

    @property
    def beginning(self) -> Event | None:
        """The event that holds the session's task. After drift, the newest one counts."""
        return next((event for event in reversed(self.events) if event.kind is Kind.BEGIN), None)

    @property
    def task(self) -> list[str]:
        """The texts of the session's task; empty if no task is recorded."""
        begun = None if self.beginning is None else self.beginning.content
        return begun.task if isinstance(begun, Begun) else []

    @property
    def last_seq(self) -> int:
        """The number of the session's last event. That event is not revoked: a later event would have revoked it."""
        return self.events[-1].seq if self.events else 0

    def end_of(self, completed: Execution | None) -> RunSummary | None:
        """Return the summary of the last completed run; None if there is no such run, or if a later event exists."""
        if completed is None:
            return None
        summary = RunSummary.model_validate_json(completed.outputs()["run"])
        return summary if summary.last == self.last_seq else None

    def scope_of(self, address: str) -> str:
        """Return the scope of the call at `address`.

        If the call is made again after a crash, a failure or a cancellation, its scope stays the same. If a different
        call has taken the place of the recorded call, the different call gets a new scope.
        """
        times_replaced = self.times_replaced[address]
        return f"{address}/again/{times_replaced}" if times_replaced else address

    def call_id_of(self, session: str, call: Requested) -> str:
        """Return the id of a tool's call in this record of `session` (see `call_id` in place.py).

        If an earlier call fails in one run and not in the next, the program may then make a different call at the same
        place. The digest gives this call another id.
        """
        return f"{session}/{self.scope_of(call.address)}/{call.digest[:DIGITS]}"


async def latest_run(client: NexumClient, session: str, *, status: str = "") -> Execution | None:
    """Return a session's latest run (of this `status`, if given) with its result; None if there is none."""
    found = await client.list_executions(
        workflow_id=AGENT_RUN.workflow_id,
        status=status,
        key_prefix=f"{session}/",
        limit=1,
        with_nodes=True,
        patience=SERVER_PATIENCE,
    )
    return found[0] if found else None


async def read_record(client: NexumClient, session: str) -> Record:
    """Return everything that a session has recorded.

    If a process records more at the same time, the last events may be missing, but no event before the last one is.
    Raises ExecutionNotFound if the session is pruned at the same time.
    """
    found = await _read(client, session)
    numbers = {one.seq for one in found.history if isinstance(one, Event)}
    if len(numbers) < max(numbers, default=0):
        # The list was read in several pages. A long call that ended meanwhile is on a later page, but the events
        # between the first page and this call's end are on no page.
        found = await _read(client, session, last=max(numbers))
    return found


async def _read(client: NexumClient, session: str, *, last: float = math.inf) -> Record:
    """Return what a session has recorded up to the event with the number `last`."""
    found = Record()
    ended_ms: dict[int, int] = {}  # when each event was recorded, by the server's clock
    last_begun_ms = 0  # when the last call without a recorded result began
    async for execution in client.all_executions(
        workflow_id=AGENT_EVENT.workflow_id,
        key_prefix=f"{session}/",
        with_nodes=True,
        patience=SERVER_PATIENCE,
    ):
        if execution.status is ExecutionStatus.COMPLETED:
            event = Event.model_validate_json(execution.outputs()["event"])
            if event.seq > last:
                continue
            found.history.append(event)
            ended_ms[event.seq] = execution.ended_ms or 0
            continue
        last_begun_ms = max(last_begun_ms, execution.created_ms)
        input = EventInput.model_validate_json(execution.input_json)
        found.history.append(input)
        if execution.status is ExecutionStatus.RUNNING:
            found.unfinished.append(input)
    found.history.reverse()  # the server lists the newest first
    for event in sorted((one for one in found.history if isinstance(one, Event)), key=lambda one: one.seq):
        found.add(event)
    found.at_end = [event for event in found.events if ended_ms[event.seq] > last_begun_ms]
    return found
