"""`Journal`: the owner and writer of a session's record."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any, TypeVar

from durable_autogen.errors import DriftError, RunCancelled, SessionBusy
from durable_autogen.record.events import (
    AGENT_EVENT,
    AGENT_RUN,
    DIGITS,
    SERVER_PATIENCE,
    Call,
    Content,
    Event,
    EventInput,
    Kind,
    Record,
    Revoked,
    RunInput,
    RunSummary,
    Said,
    latest_run,
    read_record,
)
from durable_autogen.record.log import LOG
from durable_autogen.record.storable import representable
from durable_autogen.record.tasks import cancel_and_wait
from nexum_engine.approvals import key_within, server_option
from nexum_engine.client import NexumClient
from nexum_engine.connection import OUTAGE_PATIENCE
from nexum_engine.errors import (
    Conflict,
    ExecutionNotFound,
    IdempotencyConflict,
    NexumError,
    ServerUnavailable,
    StaleTask,
    TaskNotFound,
)
from nexum_engine.event_loop import to_its_end
from nexum_engine.owner import Owner
from nexum_engine.records import Execution, ExecutionStatus, Task
from nexum_engine.workflow import Workflow

TAKE_OVER_PATIENCE = 3.0  # seconds to wait for an owner that may have just died
LOOK_INTERVAL = 0.1  # seconds
WATCH_WAIT = 25.0  # seconds that one look at the run may wait for its end
WATCH_PAUSE = 1.0  # seconds until the next look if no server answers

T = TypeVar("T")


class Journal:
    """A session's record. This process owns the session for the length of an `async with`.

    Entering raises SessionBusy if another process owns the session.
    """

    def __init__(self, client: NexumClient, session: str, log: logging.Logger = LOG) -> None:
        self.session = session
        self.log = log
        self.recorded = Record()
        """All that the session has recorded, including this process's events."""
        self.finished_run: RunSummary | None = None
        """The summary of the session's last run, if the session is finished, else None. Drift sets it to None."""
        self.may_leave_open = False
        """Whether calls of this run, or of an earlier run that did not finish, may have asked a person, waited for an
        event, or released an effect."""
        self.client = client
        self.owner = Owner(
            client,
            on_lost=lambda error: self.log.warning("%s; retrying for %g s", error, OUTAGE_PATIENCE),
        )
        self._on_cancelled: Callable[[RunCancelled], None] = lambda _: None
        self._watching: asyncio.Task[None] | None = None
        self._run: Task | None = None
        """The task of this process's run; None when the end of the run is recorded."""
        self._moving = asyncio.Lock()
        """Held while the events are recorded again, in a new database."""
        self.next_seq = 1
        """The number of the next event."""
        self._in_background: set[asyncio.Task[None]] = set()
        self._open: dict[str, Task] = {}
        """The tasks of calls whose beginning is recorded, by this run or an earlier one, and whose outcome isn't.

        The keys are the idempotency keys of their executions.
        """

    def command(self, name: str) -> str:
        """Return the beginning of a command that works on this session, such as the command `send`."""
        return f"python -m durable_autogen {name}{server_option(self.client.servers)} {self.session}"

    @property
    def events(self) -> list[Event]:
        """The session's events without revoked ones, in order."""
        return self.recorded.events

    async def __aenter__(self) -> Journal:
        latest = await latest_run(self.client, self.session)
        await self.owner.__aenter__()
        try:
            self._run, latest = await self._take_session(latest)
            await self._read_and_take_over()
            if latest is not None or self.recorded.history:  # else the session is new
                if latest is None or latest.status is not ExecutionStatus.COMPLETED:
                    latest = await latest_run(self.client, self.session, status=ExecutionStatus.COMPLETED.value)
                self.finished_run = self.recorded.end_of(latest)
                self.may_leave_open = self.finished_run is None
                if self.finished_run is None:
                    await self._revoke_failures_at_end()
                else:
                    self.log.info(
                        "session %s is finished: its record is replayed (new work needs a new session id)", self.session
                    )
        except BaseException:
            await self._release()
            raise
        return self

    async def _release(self) -> None:
        if self._watching is not None:
            await cancel_and_wait(self._watching)
        await self.owner.__aexit__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        await to_its_end(self._leave(error))

    async def _leave(self, error: BaseException | None) -> None:
        try:
            await self._finish_background()
            await self._close_open("the run was stopped before it had a result", TAKE_OVER_PATIENCE)
            if self._run is not None:
                # A journal that no session has opened, such as that of a fork, comes here without an error.
                reason = "no program was run" if error is None else f"{type(error).__name__}: {error}"
                await self.owner.fail(self._run, reason, patience=TAKE_OVER_PATIENCE)
        except StaleTask:
            pass  # somebody has cancelled the run, or another process has taken it over
        except NexumError as ending:
            self.log.warning("session %s: the end of this run could not be recorded: %s", self.session, ending)
        finally:
            await self._release()

    # ---- Owning the session ------------------------------------------------------------------------------------------

    async def _take_session(self, latest: Execution | None) -> tuple[Task, Execution | None]:
        """Begin the session's next run, or take over the latest one.

        Return the task of this process's run, and the latest run that the server had (None if the server had none).
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + TAKE_OVER_PATIENCE
        is_reported = False
        while True:
            try:
                input = RunInput(session=self.session, run=_run_number(latest))
                started = await self.owner.start(AGENT_RUN, input, idempotency_key=f"{self.session}/{input.run}")
            except Conflict as conflict:
                if loop.time() >= give_up:
                    raise SessionBusy(
                        f"session {self.session} is being run: {conflict}. Or use another session"
                    ) from conflict
                if not is_reported:
                    self.log.warning(
                        "session %s is in use by another run. If that run was killed, the server will notice within "
                        "%g s",
                        *(self.session, TAKE_OVER_PATIENCE),
                    )
                    is_reported = True
            else:
                if started.task is not None:
                    if started.task.attempt > 1:
                        self.log.info("session %s: the previous run died; taking over", self.session)
                        latest = latest or await latest_run(self.client, self.session)
                    return started.task, latest
                latest = started.ended  # other processes have made this run, and it has completed: make the next one
                continue
            await asyncio.sleep(LOOK_INTERVAL)
            latest = await latest_run(self.client, self.session)

    def _busy(self, why: str) -> SessionBusy:
        return SessionBusy(f"session {self.session}: {why}. Run the session again when that process has ended")

    async def _read_and_take_over(self) -> None:
        """Read the record and take over its unfinished calls, so that no earlier owner can record their results."""
        while True:
            record = self.recorded = await read_record(self.client, self.session)
            for input in record.unfinished:
                if not await self._start(input):
                    break  # the event was recorded in the meantime: read the record again
            else:
                self.next_seq = record.last_seq + 1
                return

    async def _revoke_failures_at_end(self) -> None:
        """Revoke the failures and broken replies at the end of an unfinished session. No later call depends on them."""
        trailing = list(takewhile(lambda event: event.is_failure, reversed(self.recorded.at_end)))
        if trailing and not any(event.accepted for event in trailing):
            await self.revoke(trailing, "the run ended with it")

    async def _start(self, input: EventInput) -> bool:
        """Begin an event of this run, or take it over. Return False if the event is recorded already.

        Raises SessionBusy if another process owns the run.
        """
        key = self._key(input)
        started = await self.under_this_run(self.owner.start, AGENT_EVENT, input, idempotency_key=key)
        if started.task is not None:
            self._open[key] = started.task
        return started.task is not None

    async def under_this_run(self, send: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
        """Call `send`, a method of the owner, with `holding` set to this run. Return the result.

        The server refuses the request if another process owns the run. Then SessionBusy is raised. DriftError is
        raised if the call was begun by a version that records other inputs.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + TAKE_OVER_PATIENCE
        while True:
            run = self._run
            try:
                return await send(*args, **options, holding=run)
            except Conflict as conflict:
                if await self._move_if_replaced(run):
                    continue
                if isinstance(conflict, IdempotencyConflict):
                    # This version never gives one key to two inputs.
                    raise DriftError(
                        f"session {self.session} has an unfinished call of another version of durable_autogen, which "
                        "this version can't continue. Continue the session with that version, or use a new session"
                    ) from conflict
                if loop.time() >= give_up:
                    raise self._busy(f"another process has taken over: {conflict}") from conflict
                # Try again: the event's owner may have died, and the server may not have noticed yet.
                await asyncio.sleep(LOOK_INTERVAL)

    def watch(self, on_cancelled: Callable[[RunCancelled], None]) -> None:
        """Call `on_cancelled` as soon as somebody cancels the run. The program may be waiting, and make no request."""
        self._on_cancelled = on_cancelled
        self._begin_watch()

    def _begin_watch(self) -> None:
        # In an empty context: otherwise, the watch would count as work of the session.
        self._watching = contextvars.Context().run(asyncio.create_task, self._watch())

    async def _watch(self) -> None:
        run = self._run
        assert run is not None
        has_ended = False
        while not has_ended:
            try:
                has_ended = await self._check_not_cancelled(run, wait=WATCH_WAIT, patience=0.0)
            except RunCancelled as cancelled:
                self._on_cancelled(cancelled)
                return
            except ServerUnavailable:
                await asyncio.sleep(WATCH_PAUSE)
            except NexumError:
                return  # the next request meets the same error, and raises it

    async def _check_not_cancelled(self, run: Task, *, wait: float = 0.0, patience: float = OUTAGE_PATIENCE) -> bool:
        """Return whether the run has ended, now or within `wait` seconds.

        Raises RunCancelled if somebody has cancelled the run, and ExecutionNotFound if the database was replaced.
        """
        execution = (await self.client.get_execution(run.execution_id, wait=wait, patience=patience)).execution
        if execution.status is ExecutionStatus.CANCELLED:
            raise RunCancelled.of(self.session, execution.error or "cancelled")
        return execution.status.ended

    @contextlib.contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Raise SessionBusy if the server answers, inside a `with`, that another process has taken over `what`."""
        try:
            yield
        except StaleTask as stale:
            raise self._busy(f"another process has taken over {what} ({stale})") from stale

    def finish_later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work in the background. The run's end waits for it."""
        working = asyncio.create_task(work)
        self._in_background.add(working)
        working.add_done_callback(self._in_background.discard)

    async def _finish_background(self) -> None:
        if self._in_background:
            await asyncio.wait(self._in_background, timeout=TAKE_OVER_PATIENCE)

    async def _move_if_replaced(self, run: Task | None) -> bool:
        """Record all events again if the server's database was replaced; return whether the database was replaced.

        `run` is the task of this process's run when the server refused a request. Several requests may be refused at
        the same time: only the first of them records the events again. Raises RunCancelled if somebody has cancelled
        the run.
        """
        async with self._moving:
            if self._run is not run:
                return True  # another refused request has moved the run
            if run is None:
                return False
            try:
                await self._check_not_cancelled(run)
                return False
            except ExecutionNotFound:
                await self._record_again()
                return True

    async def _record_again(self) -> None:
        self.log.warning(
            "session %s is unknown to this server: recording its %d event(s) again", self.session, len(self.events)
        )
        self._open.clear()
        run, _ = await self._take_session(await latest_run(self.client, self.session))
        if (await read_record(self.client, self.session)).events:
            raise SessionBusy(
                f"the server was replaced, and the new server has recorded other events in session {self.session}. "
                "Use another session"
            )
        for event in self.events:
            await self.owner.record(AGENT_EVENT, self._input(event), event, idempotency_key=self._key(event))
        # Set it last. Until then, the server refuses the other requests of this process. They wait for this method.
        self._run = run
        self._begin_watch()

    # ---- Writing -----------------------------------------------------------------------------------------------------

    async def begin_if_needed(self, call: Call, *, must_be_known: bool = False) -> None:
        """Record the beginning of a call if `must_be_known` is set, or after a failure, or if the lease may be lost.

        If an earlier run began the call, continue its execution. But each request to a model counts: end the execution
        of the earlier request as failed, and begin another one. Raises SessionBusy if another process owns the session.
        """
        # After a failure or a broken reply, the beginning shows that the run continued. If another process owns the
        # session, the server refuses the beginning, and the call costs no money.
        follows_failure = bool(self.events) and self.events[-1].is_failure
        if not must_be_known and not follows_failure and self.owner.is_holding:
            return
        key = self._key(call)
        if call.kind is Kind.REPLY and key in self._open:
            await self._close(key, "the run that made this call died, and the call was made again", OUTAGE_PATIENCE)
        await self.begin(call)

    def has_begun(self, call: Call) -> bool:
        """Return whether the beginning of a call is recorded, by this run or an earlier one, and its outcome isn't."""
        return self._key(call) in self._open

    async def begin(self, call: Call) -> None:
        """Record the beginning of a call. Raises SessionBusy if another process owns the session.

        If the beginning is recorded already, continue the call's execution.
        """
        if self._key(call) in self._open and self.owner.is_holding:
            return
        if not await self._start(self._input(call)):
            raise self._busy(f"another process has recorded {call}")

    async def record(
        self,
        call: Call,
        content: Content,
        *,
        asked_after: int = 0,
        asked_ms: int = 0,
        active_ms: int = 0,
        is_cleanup: bool = False,
    ) -> Event:
        """Record a call's outcome as the session's next event; return the event.

        The other arguments mean the same as in Event. Raises SessionBusy if another process owns the session.
        """
        event = Event(
            seq=self.next_seq,
            kind=call.kind,
            agent=call.agent,
            position=call.position,
            content=content,
            request=representable(dict(call.request)),
            asked_after=asked_after,
            asked_ms=asked_ms,
            active_ms=active_ms,
            is_cleanup=is_cleanup,
            recorded_ms=round(time.time() * 1000),
        )
        return await self._write(event)

    async def _write(self, event: Event) -> Event:
        self.next_seq = event.seq + 1
        event = event.model_copy(update={"summary": self.recorded.summary_with(event)})
        key, run = self._key(event), self._run
        task = self._open.get(key)
        try:
            if task is not None:
                with self.held(str(event)):
                    await self.owner.complete(task, event)
                self._open.pop(key, None)
        except TaskNotFound:
            await self._move_if_replaced(run)
            task = None
        if task is None:
            await self.under_this_run(self.owner.record, AGENT_EVENT, self._input(event), event, idempotency_key=key)
        self.recorded.add(event)
        return event

    def _key(self, one: Call | Event | EventInput) -> str:
        name = one.address
        if again := self.recorded.times_revoked[one.address]:
            name += f"/again/{again}"  # the old key still names the revoked event
        if one.tool and one.hash:  # an earlier run may have begun a different call at this position, and left no result
            name += f"/{one.hash[:DIGITS]}"
        return key_within(f"{self.session}/", name)

    def _input(self, call: Call | Event) -> EventInput:
        return EventInput(
            session=self.session,
            agent=call.agent,
            position=call.position,
            kind=call.kind,
            tool=call.tool,
            digest=(call.hash or "") if call.tool else "",
        )

    async def add_copy(self, event: Event) -> None:
        """Record a copy of another session's event as accepted: a replay doesn't compare it with the program's call."""
        # `asked_after` is a number of the other session: here, it could name an event that came after the copy.
        await self._write(event.model_copy(update={"seq": self.next_seq, "accepted": True, "asked_after": 0}))

    async def add_message(self, text: str) -> None:
        """Record a user message for the agents of a fork."""
        number = sum(event.kind is Kind.MESSAGE for event in self.events) + 1
        await self.record(Call(Kind.MESSAGE, "", f"message/{number}"), Said(text=text))

    async def revoke(self, events: Iterable[Event], why: str, *, is_another_program: bool = False) -> None:
        """Record that `events` no longer count. If the program makes the same calls again, they are made live."""
        content = Revoked(why=why, seqs=[event.seq for event in events], is_another_program=is_another_program)
        await self.record(Call(Kind.REVOKE, "", f"revoke/{self.next_seq}"), content)

    async def end(
        self,
        stop_reason: str = "",
        *,
        checks: Mapping[str, int] | None = None,
        is_finished: bool = True,
    ) -> None:
        """Record the end and the summary of the run.

        Raises SessionBusy if another process owns the session, and RunCancelled if somebody has cancelled the run.
        """
        await self._finish_background()
        await self._close_open(
            "the run that made this call died, and a later run did not make it again", OUTAGE_PATIENCE
        )
        if self._run is not None:
            last = self.recorded.last_seq if is_finished else -1
            summary = RunSummary(stop_reason=stop_reason, last=last, looks=dict(checks or {}))
            try:
                with self.held("it"):
                    try:
                        await self.owner.complete(self._run, summary)
                    except TaskNotFound:
                        await self._move_if_replaced(self._run)
                        await self.owner.complete(self._run, summary)
                    except StaleTask:
                        await self._check_not_cancelled(self._run)
                        raise
            finally:
                self._run = None

    async def cancel_running(self, workflow: Workflow, key_prefix: str) -> None:
        """Cancel the running executions of a workflow whose keys begin with `key_prefix`."""
        async for execution in self.client.all_executions(
            workflow_id=workflow.workflow_id,
            status=ExecutionStatus.RUNNING.value,
            key_prefix=key_prefix,
            patience=SERVER_PATIENCE,
        ):
            with contextlib.suppress(Conflict):  # it ended in the meantime
                await self.client.cancel_execution(execution.execution_id, by=f"session {self.session}")

    async def _close_open(self, reason: str, patience: float) -> None:
        for key in list(self._open):
            await self._close(key, reason, patience)

    async def _close(self, key: str, reason: str, patience: float) -> None:
        # Ignore a task that was recorded in the meantime, or that the server lost with its old database.
        with contextlib.suppress(StaleTask, TaskNotFound):
            await self.owner.fail(self._open[key], reason, patience=patience)
        self._open.pop(key, None)


def _run_number(latest: Execution | None) -> int:
    if latest is None:
        return 1
    number = int(latest.idempotency_key.rpartition("/")[2])
    # A failed run is made again under its number. If each run had a number of its own, a process that has looked before
    # other runs could begin an earlier one again, beside the latest one.
    return number + 1 if latest.status is ExecutionStatus.COMPLETED else number
