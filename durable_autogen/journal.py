"""A session's record on a Nexum server, and the right to write it.

Each event (a model's reply, a tool's result, a person's input) is an execution of one node that the recording process
owns, under a key that names session, agent and position. A run of the session is one, too: who owns it may record.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict

from console import say
from durable_autogen.errors import SessionBusy
from durable_autogen.failures import Failure
from nexum_engine.client import NexumClient, Started
from nexum_engine.errors import Conflict, ExecutionNotFound, NexumError, StaleTask, TaskNotFound
from nexum_engine.model import Execution, ExecutionStatus, Task
from nexum_engine.owner import PATIENCE, Owner
from nexum_engine.workflow import MAX_ID_LENGTH, workflow

TAKE_OVER_PATIENCE = 3.0  # seconds to wait for an owner that may have died a moment ago
PAGE = 100  # executions in one answer, at most
LOOK_AGAIN = 0.1  # seconds


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


async def read_events(client: NexumClient, session: str) -> tuple[list[Event], list[EventInput]]:
    """What a session has recorded, in order, and what it had begun."""
    recorded: list[Event] = []
    begun: list[EventInput] = []
    before = ""
    while True:
        page = await client.list_executions(
            workflow_id=AGENT_EVENT.workflow_id,
            key_prefix=f"{session}/",
            before=before,
            limit=PAGE,
            with_nodes=True,
            patience=TAKE_OVER_PATIENCE,
        )
        for execution in page:
            if execution.status is ExecutionStatus.COMPLETED:
                recorded.append(Event.model_validate_json(execution.outputs()["event"]))
            elif execution.status is ExecutionStatus.RUNNING:
                begun.append(EventInput.model_validate_json(execution.input_json))
        if not page:
            return effective(recorded), begun
        before = page[-1].execution_id


def effective(recorded: Sequence[Event]) -> list[Event]:
    """The events that count: a branch leaves behind what came after the place where it began."""
    in_order = sorted(recorded, key=lambda event: (event.epoch, event.seq))
    kept: list[Event] = []
    for event in in_order:
        if event.kind is Kind.BRANCH:
            kept = [earlier for earlier in kept if earlier.seq <= event.content["after"]]
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


class Journal:
    """One session, owned by this process for the length of an `async with`. Raises SessionBusy."""

    def __init__(self, client: NexumClient, session: str, tell: Callable[[str], None] = say) -> None:
        self.session = session
        self.tell = tell
        """Where it says what a person should know."""
        self.events: list[Event] = []
        self.epoch = 0
        self.ended: str | None = None
        """Why the session is finished, if it is."""
        self._client = client
        self._owner = Owner(client, on_lost=lambda error: tell(f"[Nexum] {error}; trying for {PATIENCE:g} s"))
        self._run: Task | None = None
        self._next_seq = 1
        self._starting: set[asyncio.Task[Started]] = set()
        self._revoked: Counter[str] = Counter()
        self._inherited: dict[str, Task] = {}
        self._open: dict[str, Task] = {}

    async def __aenter__(self) -> Journal:
        await self._owner.__aenter__()
        try:
            self._run = await self._take_session()
            self.events = await self._read_and_take_over()
            completed = await self._runs(status=ExecutionStatus.COMPLETED.value)
            self.ended = end_of(completed, self.events)
            self.epoch = max((event.epoch for event in self.events), default=0)
            self._next_seq = max((event.seq for event in self.events), default=0) + 1
        except BaseException:
            await self._owner.__aexit__()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if self._starting:
                await asyncio.wait(self._starting, timeout=TAKE_OVER_PATIENCE)
            await self._close_open("the run was stopped before it had a result", TAKE_OVER_PATIENCE)
            if self._run is not None:
                reason = f"{type(error).__name__}: {error}" if error is not None else "the run did not end"
                await self._owner.fail(self._run, reason, patience=TAKE_OVER_PATIENCE)
        except NexumError as ending:
            self.tell(f"[Nexum] the end of this run of session {self.session} could not be recorded: {ending}")
        finally:
            await self._owner.__aexit__()

    async def _take_session(self) -> Task:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + TAKE_OVER_PATIENCE
        said = False
        while True:
            latest = await self._runs()
            try:
                input = RunInput(session=self.session, run=_run_number(latest))
                started = await self._owner.start(AGENT_RUN, input, idempotency_key=f"{self.session}/{input.run}")
            except Conflict as conflict:
                if loop.time() >= give_up:
                    raise SessionBusy(f"session {self.session} is being run: {conflict}") from conflict
                if not said:
                    self.tell(
                        f"[Nexum] session {self.session} is owned by another run; if that one was killed, the server "
                        f"knows within {TAKE_OVER_PATIENCE:g} s"
                    )
                    said = True
            else:
                if started.task is not None:
                    if started.task.attempt > 1:
                        self.tell(f"[Nexum] session {self.session}: its last run died; this one takes it over")
                    return started.task
            await asyncio.sleep(LOOK_AGAIN)

    async def _runs(self, status: str = "") -> Execution | None:
        """The latest run of this session, with its result."""
        found = await self._client.list_executions(
            workflow_id=AGENT_RUN.workflow_id,
            status=status,
            key_prefix=f"{self.session}/",
            limit=1,
            with_nodes=True,
            patience=TAKE_OVER_PATIENCE,
        )
        return found[0] if found else None

    async def _read_and_take_over(self) -> list[Event]:
        """What is recorded. What was only begun is taken over, so that a process that hung can't record it later."""
        while True:
            events, begun = await read_events(self._client, self.session)
            self._revoked = Counter(event.content["address"] for event in events if event.kind is Kind.REVOKE)
            for input in begun:
                started = await self._start(input)
                if started.task is None:
                    break  # recorded a moment ago
                self._inherited[self._key(input)] = started.task
            else:
                return events

    async def _start(self, input: EventInput) -> Started:
        """Begin an event under this run, or take it over. Raises SessionBusy if the run is another process's now."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + TAKE_OVER_PATIENCE
        while True:
            try:
                started = await self._owner.start(
                    AGENT_EVENT, input, idempotency_key=self._key(input), holding=self._run
                )
            except Conflict as conflict:
                if await self._move_if_replaced():
                    continue
                if loop.time() >= give_up:
                    raise SessionBusy(
                        f"session {self.session} is not this process's any more: {conflict}. Run it again when the "
                        "other one has ended"
                    ) from conflict
                # A run that was just stopped may have left it, and is about to be known as gone.
                await asyncio.sleep(LOOK_AGAIN)
            else:
                if started.task is not None:
                    self._open[started.task.task_id] = started.task
                return started

    def _key(self, input: EventInput) -> str:
        key = f"{self.session}/{input.epoch}/{input.agent}/{input.position}"
        if again := self._revoked[f"{input.agent}/{input.position}"]:
            key += f"/again/{again}"  # a key has one result, and that one counts no more
        if len(key) <= MAX_ID_LENGTH and key.isprintable():
            return key
        return f"{self.session}/{input.epoch}/{hashlib.sha256(key.encode()).hexdigest()}"

    async def begin(self, kind: Kind, agent: str, position: str) -> Task:
        """Say that an event is under way."""
        input = EventInput(session=self.session, epoch=self.epoch, agent=agent, position=position, kind=kind)
        key = self._key(input)
        if key in self._inherited:
            return self._inherited.pop(key)
        starting = asyncio.create_task(self._start(input))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        # Who asks may be cancelled; what was begun on the server is then known here, and closed at the end of the run.
        started = await asyncio.shield(starting)
        if started.task is None:
            raise SessionBusy(
                f"another process has just recorded {name_of(kind, agent, position)} in session {self.session}: "
                "run it again when that one has ended"
            )
        return started.task

    async def record(
        self,
        task: Task,
        kind: Kind,
        agent: str,
        position: str,
        content: Any,
        request: Mapping[str, Any],
        *,
        failure: Failure | None = None,
        accepted: bool = False,
        active_ms: int = 0,
    ) -> Event:
        """Record an event that was begun, as the session's next one; it holds what was recorded.

        Raises SessionBusy if the session is another process's now.
        """
        event = Event(
            seq=self._next_seq,
            epoch=self.epoch,
            kind=kind,
            agent=agent,
            position=position,
            content=representable(content),
            request=representable(dict(request)),
            failure=failure,
            accepted=accepted,
            recorded_ms=round(time.time() * 1000),
            active_ms=active_ms,
        )
        self._next_seq += 1
        while True:
            try:
                await self._owner.complete(task, event)
                break
            except TaskNotFound:
                await self._move_if_replaced()
                task = await self.begin(kind, agent, position)
            except StaleTask as stale:
                raise SessionBusy(
                    f"session {self.session}: another process has taken over {event} from this one ({stale})"
                ) from stale
        self._open.pop(task.task_id, None)
        self.events.append(event)
        return event

    async def _move_if_replaced(self) -> bool:
        """If the server's database was replaced, or another server has taken its place, record all of it there."""
        if self._run is None:
            return False
        try:
            await self._client.get_execution(self._run.execution_id, patience=PATIENCE)
            return False
        except ExecutionNotFound:
            self.tell(
                f"[Nexum] session {self.session} is unknown to this server: recording {len(self.events)} event(s) anew"
            )
        self._open.clear()
        self._inherited.clear()
        self._run = await self._take_session()
        there, _ = await read_events(self._client, self.session)
        if there:
            raise SessionBusy(f"the server that took the place of the last one has another session {self.session}")
        for event in self.events:
            input = EventInput(
                session=self.session, epoch=event.epoch, agent=event.agent, position=event.position, kind=event.kind
            )
            started = await self._owner.start(AGENT_EVENT, input, idempotency_key=self._key(input))
            if started.task is not None:
                await self._owner.complete(started.task, event)
        return True

    async def add(
        self,
        kind: Kind,
        agent: str,
        position: str,
        content: Any,
        request: Mapping[str, Any],
        *,
        failure: Failure | None = None,
        accepted: bool = False,
    ) -> Event:
        """Begin and record at once."""
        task = await self.begin(kind, agent, position)
        return await self.record(task, kind, agent, position, content, request, failure=failure, accepted=accepted)

    async def give_up(self, task: Task, reason: str) -> None:
        """An event that was begun has no result."""
        if self._open.pop(task.task_id, None) is not None:
            with contextlib.suppress(TaskNotFound):  # its server is another one now
                await self._owner.fail(task, reason)

    async def branch(self, after: int, why: str) -> None:
        """Go on with another program: what is recorded after the event of this number counts no more."""
        self.epoch += 1
        await self.add(Kind.BRANCH, "", f"branch/{self.epoch}", {"after": after, "why": why}, {})

    async def revoke(self, event: Event) -> None:
        """The event counts no more: it will be asked for again."""
        content = {"seq": event.seq, "address": event.address}
        await self.add(Kind.REVOKE, "", f"revoke/{event.seq}", content, {})

    async def end(self, stop_reason: str, *, live: Mapping[str, int], replayed: Mapping[str, int]) -> None:
        """The run is over, and whole. Raises SessionBusy if it was another process's in the end."""
        await self._move_if_replaced()
        await self._close_open("the run that asked for it died, and a later one did not ask again", PATIENCE)
        if self._run is not None:
            last = max((event.seq for event in self.events), default=0)
            try:
                await self._owner.complete(
                    self._run, RunSummary(stop_reason=stop_reason, live=dict(live), replayed=dict(replayed), last=last)
                )
            except StaleTask as stale:
                raise SessionBusy(f"session {self.session} was taken over by another process ({stale})") from stale
            finally:
                self._run = None

    async def release(self) -> None:
        """Leave the session without having run it."""
        if self._run is not None:
            await self._owner.fail(self._run, "it was not run")
            self._run = None

    async def _close_open(self, reason: str, patience: float) -> None:
        for task in list(self._open.values()):
            # Its record was on the way and has arrived, or its server is another one now.
            with contextlib.suppress(StaleTask, TaskNotFound):
                await self._owner.fail(task, reason, patience=patience)
            del self._open[task.task_id]


def _run_number(latest: Execution | None) -> int:
    if latest is None:
        return 1
    number = int(latest.idempotency_key.rpartition("/")[2])
    return number if latest.status is ExecutionStatus.RUNNING else number + 1


def representable(value: Any) -> Any:
    """The same as JSON that every database takes: half of a surrogate pair, which is no character, is replaced."""
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value)
    if isinstance(value, dict):
        return {representable(key): representable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [representable(item) for item in value]
    return value
