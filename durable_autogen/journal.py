"""The right to write a session's record, and the writing of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from console import say
from durable_autogen.errors import SessionBusy
from durable_autogen.events import (
    AGENT_EVENT,
    AGENT_RUN,
    Event,
    EventInput,
    Kind,
    RunInput,
    RunSummary,
    end_of,
    name_of,
    read_events,
    representable,
)
from durable_autogen.failures import Failure
from nexum_engine.client import NexumClient, Started
from nexum_engine.errors import Conflict, ExecutionNotFound, NexumError, StaleTask, TaskNotFound
from nexum_engine.model import Execution, ExecutionStatus, Task
from nexum_engine.owner import PATIENCE, Owner
from nexum_engine.workflow import MAX_ID_LENGTH

TAKE_OVER_PATIENCE = 3.0  # seconds to wait for an owner that may have died a moment ago
LOOK_AGAIN = 0.1  # seconds


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
        self._tried: set[str] = set()
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
            events, begun, self._tried = await read_events(self._client, self.session)
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

    def was_tried(self, address: str) -> bool:
        """Whether an earlier run has begun this event, and had no result of it."""
        return address in self._tried

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
        asked_ms: int = 0,
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
            failure=None if failure is None else Failure.model_validate(representable(failure.model_dump())),
            accepted=accepted,
            recorded_ms=round(time.time() * 1000),
            active_ms=active_ms,
            asked_ms=asked_ms,
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
        there, _, _ = await read_events(self._client, self.session)
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
    ) -> Event:
        """Begin and record at once."""
        task = await self.begin(kind, agent, position)
        return await self.record(task, kind, agent, position, content, request)

    async def add_copy(self, event: Event) -> None:
        """Record an event of another session, which is accepted whatever it will be asked with."""
        task = await self.begin(event.kind, event.agent, event.position)
        await self.record(
            task,
            event.kind,
            event.agent,
            event.position,
            event.content,
            event.request,
            failure=event.failure,
            accepted=True,
            active_ms=event.active_ms,
            asked_ms=event.asked_ms,
        )

    async def add_message(self, text: str) -> None:
        """Record what the user says next."""
        taken = [int(event.position.rpartition("/")[2]) for event in self.events if event.kind is Kind.MESSAGE]
        await self.add(Kind.MESSAGE, "", f"message/{max(taken, default=0) + 1}", {"text": text}, {})

    async def branch(self, after: int, why: str) -> None:
        """Go on with another program: what is recorded after the event of this number counts no more."""
        self.epoch += 1
        await self.add(Kind.BRANCH, "", f"branch/{self.epoch}", {"after": after, "why": why}, {})

    async def revoke(self, event: Event) -> None:
        """The event counts no more: it will be asked for again."""
        content = {"seq": event.seq, "address": event.address}
        await self.add(Kind.REVOKE, "", f"revoke/{event.seq}", content, {})
        self._revoked[event.address] += 1
        self.events.remove(event)

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
