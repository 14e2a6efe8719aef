"""The recorder of a run: it delivers the recorded events in order, then makes calls live and records them.

Events are delivered one at a time, in recorded order, both live and in a replay. The next event is delivered when the
session is idle. So parallel branches join in a replay as they did in the recorded run, and an agent after the join gets
the same prompt.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

from durable_autogen.errors import DriftError, Parked
from durable_autogen.record.budget import BudgetCheck
from durable_autogen.record.cleanup import Cleanup
from durable_autogen.record.effects import warn_of_effects
from durable_autogen.record.events import (
    Begun,
    Call,
    Content,
    Event,
    GivenUp,
    Kind,
    Raised,
    Returned,
    usage_of,
)
from durable_autogen.record.failures import Failure
from durable_autogen.record.idle import idle
from durable_autogen.record.journal import Journal
from durable_autogen.record.pending_call import Answer, PendingCall, Perform, Performed, Streamed, Token
from durable_autogen.record.place import OpenSession, at, current, late_call
from durable_autogen.record.questions import Questions
from durable_autogen.record.replay import DRIFT_PATIENCE, Replay
from durable_autogen.record.setbacks import Caller, Setbacks
from durable_autogen.record.storable import representable
from durable_autogen.record.tasks import ordinary
from durable_autogen.record.threads import call_of_a_thread
from nexum_engine.errors import NexumError
from nexum_engine.event_loop import call_in, to_its_end

OnDrift = Literal["stop", "continue"]
T = TypeVar("T")

CLEANUP_PATIENCE = 1.0  # seconds that a clean-up after Ctrl+C waits for the replay
GIVE_UP_PATIENCE = 1.0  # seconds that a live call waits for given-up calls to end


COUNTED_AS = {
    Kind.REPLY: "model calls",
    Kind.TOOL: "tool calls",
    Kind.CODE: "tool calls",
    Kind.INPUT: "inputs",
    Kind.CONSOLE: "inputs",
    Kind.SLEEP: "waits",
    Kind.SENT_EVENT: "waits",
}
"""The name under which a run counts its calls, by their kind. It counts no other calls."""


class Recorder:
    """The recorder of one run: it replays events and records new ones."""

    def __init__(
        self,
        journal: Journal,
        session: OpenSession,
        *,
        on_drift: OnDrift,
        budget: BudgetCheck | None,
        park: bool,
    ) -> None:
        self.journal = journal
        self.on_drift = on_drift
        self.holds_one_task = False
        """Whether the session holds one task, as with `run_durable`. If it is finished, each further call is drift."""
        self._session = session
        self._budget = budget
        self.failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        """A future that gets the error that ends the run. Every later call raises that error."""
        self.replay = Replay(journal, session)
        self.setbacks = Setbacks()
        self.cleanup: Cleanup = session.cleanup
        self.questions = Questions(journal)
        self.live_counts: Counter[str] = Counter()
        """How many calls of each name in COUNTED_AS the run has made, and the number of their tokens."""
        self.replayed_counts: Counter[str] = Counter()
        """How many calls of each name in COUNTED_AS were replayed, and the number of their tokens."""
        self._counts: Counter[tuple[str, str]] = Counter()
        """How many calls of each kind each agent has made, and how often each termination condition was checked."""
        self._handled_seq = 0
        """The number of the last event that the program has surely handled: the session was idle after it."""
        self._record_lock = asyncio.Lock()
        """Held while an event is recorded: only one task may do so at a time."""
        self._calls: dict[asyncio.Task[None], PendingCall] = {}
        """The live calls, by the tasks that make them or take them back."""
        self._cancelled: dict[str, PendingCall] = {}
        """The calls that the program cancelled while they waited for their recorded results, by their addresses."""
        self._postponed: list[tuple[PendingCall, Returned | GivenUp]] = []
        """The typed console lines and given-up calls that are not recorded yet.

        They are recorded before the next event. A replay delivers them outside the order of events.
        """
        journal.watch(self.stop)
        self._in_background = [asyncio.create_task(self._run_replay(), name="replay")]
        if park:
            self._in_background.append(asyncio.create_task(self._park_when_all_wait(), name="parking"))

    # ---- The run -----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Cancel the replay and all live calls. Nothing is recorded after this."""
        self.stop(late_call(self._session))
        for one in self._in_background:
            one.cancel()
        await asyncio.gather(*self._in_background, *self._calls, return_exceptions=True)

    def stop(self, error: Exception) -> None:
        """End the run with an error. Every waiting call and every later call raises the error."""
        if not self.failed.done():
            self.failed.set_result(error)
        self.replay.fail(error)
        for running, pending in self._calls.items():
            pending.cancel(running, is_ending=True)

    def _check_not_failed(self) -> None:
        if self.failed.done():
            raise self.failed.result()

    @contextmanager
    def servers_errors(self) -> Iterator[None]:
        """If a request to the server fails, end the run: the model must not receive the error as a tool result."""
        try:
            yield
        except NexumError as error:
            self.stop(error)
            raise

    @property
    def program_number(self) -> int:
        """How often a changed program continued the session live, up to the last delivered event."""
        return sum(start < self.replay.last_seq for start in self.journal.recorded.programs)

    @property
    def _checks(self) -> dict[str, int]:
        """How often the run has checked each recorded termination condition."""
        return {name: count for (name, what), count in self._counts.items() if what == Kind.STOP.value}

    def was_checked(self, condition: str) -> bool:
        """Return whether the recorded run is finished, and made the latest check of a termination condition, too."""
        ended = self.journal.finished_run
        return ended is not None and self._checks[condition] <= ended.looks.get(condition, 0)

    @property
    def active_now_ms(self) -> int:
        """The session's active time until now: the total length of its runs, without the waits for a person."""
        return self.replay.active_ms + self._live_ms

    @property
    def _live_ms(self) -> int:
        """How long this run has been live, without the waits for a person."""
        since = self.replay.over_since
        if since is None:
            return 0
        return round((time.monotonic() - since - self.questions.seconds) * 1000)

    # ---- Calls -------------------------------------------------------------------------------------------------------

    async def begin_session(self, content: Begun | None = None, request: Mapping[str, Any] | None = None) -> None:
        """Record that a new session begins, or that a changed program continues the session."""
        if request is None and self.journal.events:
            return  # without waiting for the lock: in a replay, too, the agent begins at once
        # The journal needs the answer. Otherwise the server could have a beginning that the journal doesn't know of.
        # The server would then refuse the next beginning.
        await to_its_end(self._begin_session(content, request))

    async def _begin_session(self, content: Begun | None, request: Mapping[str, Any] | None) -> None:
        async with self._record_lock:
            if request is not None or not self.journal.events:
                position = f"begin/{len(programs)}" if (programs := self.journal.recorded.programs) else "begin"
                self.replay.delivered(
                    await self.journal.record(Call(Kind.BEGIN, "", position, request or {}), content or Begun())
                )

    def next_position(self, agent: str, what: str) -> str:
        """Return the position of the agent's next call of the kind `what`, such as `reply/3` or `sleep/1`."""
        self._counts[agent, what] += 1
        return f"{what}/{self._counts[agent, what]}"

    async def mark(self, agent: str, position: str, request: Mapping[str, Any]) -> None:
        """Record a mark of an agent's turn; in a replay, wait until the recorded mark is delivered."""
        await self.call(Call(Kind.TURN, agent, position, request), None)

    async def call(
        self,
        call: Call,
        perform: Perform | None,
        *,
        streamed: Streamed = lambda _: [],
        on_replay: Callable[[Content], None] = lambda _: None,
        caller: Caller = None,
        token: Token | None = None,
        early: bool = False,
    ) -> Answer:
        """Return the call's recorded answer, or make the call live with `perform` and record the answer.

        Raises the call's failure, recorded or live. If the caller or `token` is cancelled, the call is recorded as
        given up. In a replay, a given-up call waits until the program cancels it again.

        `on_replay` gets the content of a replayed answer before the answer is returned or raised. With `early`, or if
        the call was given up, `on_replay` gets the content as soon as the recorded event is found. `caller` is the task
        that makes the call; it defaults to the current task.
        """
        self._check_not_failed()
        caller = caller or asyncio.current_task()
        pending = PendingCall(self.replay.matching(call), perform, streamed, on_replay, caller, token)
        if caller is asyncio.current_task():
            self.cleanup.notice()
        pending.cleanup = self.cleanup.of_this_task()
        is_cancelled = pending.cleanup is not None or (token is not None and token.is_cancelled())
        self.setbacks.called(call, caller, is_cancelled=is_cancelled)
        event = self.replay.ahead.get(pending.call.address) if early else None
        if event is not None and not self.replay.differences(event, pending.call):
            self._found(pending, event.content)
        with call_of_a_thread():
            answer = await self._replayed(pending)
            if answer is None:
                answer = await self._made_live(pending)
        if isinstance(answer, Exception):
            # Raise the error without a traceback: AutoGen passes tracebacks to models, and a replay can't restore them.
            raise answer.with_traceback(None) from None
        self._count(call.kind, answer.content, is_replayed=answer.replayed)
        return answer

    def starts_an_agent(self) -> None:
        """Note that the current task runs an agent or a team."""
        self.cleanup.notice()
        if self.cleanup.of_this_task() is None:
            self.setbacks.starts_an_agent(asyncio.current_task())

    def _found(self, pending: PendingCall, content: Content) -> None:
        """Log that a call is replayed, unless it failed or was given up. Then call `on_replay`, which may print.

        Do nothing if the call's content was found early.
        """
        if pending.was_found:
            return
        pending.was_found = True
        if pending.call.kind in COUNTED_AS and not isinstance(content, (Raised, GivenUp)):
            self.journal.log.info("%s: replayed from the record ✓", pending.call.title)
        pending.on_replay(content)

    def _count(self, kind: Kind, content: Content, *, is_replayed: bool) -> None:
        counts = self.replayed_counts if is_replayed else self.live_counts
        if kind in COUNTED_AS:
            counts[COUNTED_AS[kind]] += 1
        if kind is Kind.REPLY:
            counts["tokens"] += sum(usage_of(content))

    async def _replayed(self, pending: PendingCall) -> Answer | Exception | None:
        """Return the call's recorded outcome in its turn; None if the call has to be made live."""
        call = pending.call
        if (event := self.replay.pop_unordered(call.address)) is not None:
            await self._wait_to_be_given_up(event, pending)
            return None
        if call.address not in self.replay.ahead:
            return None
        try:
            event = await self._in_time(pending, self.replay.take(call))
        except asyncio.CancelledError:
            pending.asked_after = self.replay.last_seq
            self._cancelled[call.address] = pending
            raise
        if event is None:
            return None
        self._found(pending, event.content)
        if not isinstance(event.content, Raised):
            return Answer(event.content, replayed=True, position=event.position)
        error = event.content.failure.again()
        self.setbacks.add(call.agent, pending.caller, error, event)
        return error

    async def _in_time(self, pending: PendingCall, waiting: Coroutine[Any, Any, T]) -> T:
        """Wait for the replay to reach a call.

        If Ctrl+C ends the replay, the program no longer makes the recorded calls that come before its clean-up. So the
        clean-up is not reached: then raise CancelledError.
        """
        if pending.cleanup is None:
            return await waiting
        reached = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait({reached}, timeout=CLEANUP_PATIENCE)
            if not reached.done():
                raise asyncio.CancelledError
            return reached.result()
        finally:
            reached.cancel()

    # ---- Live calls --------------------------------------------------------------------------------------------------

    async def _made_live(self, pending: PendingCall) -> Answer | Exception:
        """Let a task of its own make the call; return the outcome. If the caller is cancelled, give the call up."""
        if self._session.is_over:
            raise late_call(self._session)
        pending.asked_after = self.replay.last_seq
        pending.answer = asyncio.get_running_loop().create_future()
        running = self._start(pending, self._make_and_record(pending))
        try:
            return await pending.answer
        except asyncio.CancelledError:
            self._give_up(pending, running)
            raise

    def _start(self, pending: PendingCall, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that makes the call, or that takes it back. The end of the run waits for the task."""
        running = asyncio.create_task(work)
        self._calls[running] = pending
        running.add_done_callback(self._ended)
        return running

    def _ended(self, running: asyncio.Task[None]) -> None:
        """Answer a live call whose task was cancelled, perhaps even before it began."""
        pending = self._calls.pop(running)
        if pending.answer.done():
            return
        if self.failed.done():
            pending.answer.set_result(self.failed.result())
        elif self._session.is_over:
            pending.answer.set_result(late_call(self._session))
        else:
            pending.answer.set_result(RuntimeError(f"{pending.call} was cancelled"))

    async def _make_and_record(self, pending: PendingCall) -> None:
        """Make a call, record its outcome, and set the answer. This is where every live call is recorded."""
        call = pending.call
        try:
            # Make no live call before the whole record is replayed: until then, drift may be detected.
            await self._in_time(pending, self.replay.wait_until_over(call))
            if self.holds_one_task and self.journal.finished_run is not None:
                why = self.journal.finished_run.stop_reason or "it had its answer"
                last = self.journal.events[-1].seq
                await self.drift(last, f"the recorded run was over ({why}), and this one asks for {call}")
            # Wait until the session is idle, because the program may still be closing streams that it left.
            await self._idle()
            giving_up = [running for running, one in self._calls.items() if one.setback is not None]
            if giving_up:
                await asyncio.wait(giving_up, timeout=GIVE_UP_PATIENCE)
            if self._postponed:
                async with self._record_lock:
                    with pending.sending():
                        await self._record_postponed()
            pending.asked_ms = self.active_now_ms
            done = Performed(None, Returned())
            if pending.perform is not None:
                if self._budget is not None:
                    await self._wait_for_budget(self._budget, call)
                pending.was_made = True
                with pending.sending():
                    await self.journal.begin_if_needed(call, must_be_known=self._must_be_known(pending))
                done = await self._performed(pending, pending.perform)
            async with self._record_lock:
                # Let the program handle the last event first: it may give this call up.
                while self._handled_seq < self.replay.last_seq:
                    await self._idle()
                self._check_not_failed()
                with pending.sending():
                    await self._record_postponed()
                    event = await self._record(pending, done.content)
                await self._idle()
                self.replay.delivered(event)
                if done.error is not None:
                    self.setbacks.add(call.agent, pending.caller, done.error, event)
                if not pending.answer.done():
                    pending.answer.set_result(
                        done.error or Answer(event.content, replayed=False, position=event.position, value=done.value)
                    )
        except Exception as error:  # noqa: BLE001 - the caller raises it
            if isinstance(error, NexumError):
                self.stop(error)
            if not pending.answer.done():
                pending.answer.set_result(error)
        except asyncio.CancelledError:
            if pending.cleanup is not None and not self.replay.over.is_set():
                pending.answer.cancel()  # the clean-up was not reached
            raise

    async def _idle(self) -> None:
        delivered = self.replay.last_seq
        await idle(self._session)
        self._handled_seq = delivered

    def _must_be_known(self, pending: PendingCall) -> bool:
        """Return whether the next run must know of a call to a model or a tool, even if the call leaves no result."""
        call = pending.call
        if call.kind is not Kind.TOOL:
            return call.kind is Kind.REPLY and self._budget is not None
        # The next run may make calls in another order: simultaneous calls of an agent, and calls of parallel branches
        # without an agent. Their recorded beginnings show which one is which, so that each call keeps its id.
        is_in_order = call.agent and not any(
            one is not pending and (one.call.kind, one.call.agent) == (call.kind, call.agent)
            for one in self._calls.values()
        )
        return not is_in_order or call.has_policy or self._budget is not None

    async def _wait_for_budget(self, budget: BudgetCheck, call: Call) -> None:
        """Wait until the budget allows a call, and count it. Raises BudgetExceeded if a person stops the session."""
        while exceeded := budget.exceeded(call, self._live_ms):
            await budget.ask(exceeded, partial(self.questions.waiting, call.address))
        budget.count_call(call)

    async def before_attempt(self, call: Call) -> None:
        """Record the beginning of a call before an attempt at it, if another process may own the session now.

        Since the call was made, the run may have waited for a person or for a retry. If another process owns the
        session, the run ends with SessionBusy.
        """
        if not self.journal.owner.is_holding:
            with self.servers_errors():
                await to_its_end(self.journal.begin(call))  # the journal needs the answer, as in `begin`

    async def _performed(self, pending: PendingCall, perform: Perform) -> Performed:
        place = current.get()
        assert place is not None
        name = pending.call.name
        try:
            try:
                with at(dataclasses.replace(place, in_call=True)):
                    done = await ordinary(perform(pending.call), name)
            except asyncio.CancelledError as cancelled:
                if pending.token is not None and pending.token.is_cancelled():
                    pending.answer.cancel()  # the caller then gives the call up
                if pending.is_cancelled or pending.answer.cancelled():
                    raise
                raise RuntimeError(f"{name} ended with CancelledError") from cancelled
        except Exception as error:  # noqa: BLE001 - any error is recorded, and the caller raises it
            pending.check_not_cancelled()
            failure = Failure.model_validate(representable(Failure.of(error).model_dump()))
            return Performed(None, Raised(failure=failure, streamed=pending.streamed(True)), error)
        pending.check_not_cancelled()
        return done

    # ---- Recording ---------------------------------------------------------------------------------------------------

    async def _record_postponed(self) -> None:
        while self._postponed:
            pending, content = self._postponed[0]
            before = [event for event in self.journal.events if event.address == pending.call.address]
            if before:
                await self.journal.revoke(before, "the program asked something else")
            try:
                event = await self._record(pending, content)
                if pending.setback is not None:
                    pending.setback.event = event
            finally:
                # Check the record even after an error: the event may be recorded although this task was cancelled.
                if any(event.content is content for event in self.journal.events):
                    self._postponed.pop(0)

    async def _record(self, pending: PendingCall, content: Content) -> Event:
        event = await self.journal.record(
            pending.call,
            content,
            asked_after=pending.asked_after,
            asked_ms=pending.asked_ms,
            active_ms=self.active_now_ms,
            is_cleanup=pending.cleanup is not None,
        )
        if pending.cleanup is not None:
            pending.cleanup.add(event.address)
        if self._budget is not None:
            self._budget.count_usage(event)
        return event

    # ---- Given-up calls ----------------------------------------------------------------------------------------------

    def _give_up(self, pending: PendingCall, running: asyncio.Task[None]) -> None:
        """Cancel a call that the program has cancelled, or has not waited for."""
        if pending.setback is None:
            pending.setback = self.setbacks.add(pending.call.agent, pending.caller)
            pending.cleanup = self.cleanup.of_cancelled(pending.caller)
            pending.cancel(running)
            self._start(pending, self._take_back(pending, running))

    async def _take_back(self, pending: PendingCall, running: asyncio.Task[None]) -> None:
        """Remember that the program gave a call up. If the call's event was recorded already, revoke the event."""
        await asyncio.wait({running})
        if self.failed.done():
            return
        async with self._record_lock:  # the run may be ending and revoke the same event
            event = next((one for one in reversed(self.journal.events) if one.address == pending.call.address), None)
            if event is not None:
                try:
                    await self.journal.revoke([event], "the program gave the call up")
                except NexumError as error:
                    self.stop(error)
                    return
                pending.was_made = False
        # If an earlier run began the call and was killed, the call counts, too: this event ends its execution.
        was_made = pending.was_made or self.journal.has_begun(pending.call)
        self._postponed.append((pending, GivenUp(streamed=pending.streamed(False), was_made=was_made)))

    async def _wait_to_be_given_up(self, event: Event, pending: PendingCall) -> None:
        """Wait until the call is cancelled, as in the recorded run: then raise CancelledError.

        If that takes too long, the program has changed, or the reason for the cancellation is gone: a failure that
        doesn't occur again, or Ctrl+C. Then revoke the event, so that the call is made live, or raise DriftError.
        """
        differing = self.replay.differences(event, pending.call)
        if differing:
            await self._drift_of_one(event, f"{event} is not what this run asks for: {'; '.join(differing)}")
            return
        self._found(pending, event.content)
        loop = asyncio.get_running_loop()
        given_up = loop.create_future()
        if pending.token is not None:
            pending.token.add_callback(partial(call_in, loop, given_up.cancel))
        waited_ms = max(0, event.active_ms - event.asked_ms)
        watched: set[asyncio.Future[Any]] = {self.failed, given_up}
        # If the recorded run did nothing but clean up since then, Ctrl+C may have ended it, and a kill its clean-up.
        later = self._since(event.seq)
        was_ending = self.journal.finished_run is None and all(one.is_cleanup for one in later)
        # The recorded run may have given the call up because of an earlier failure. Wait until this run makes the
        # failed call again: if it fails again, the program gives this call up again.
        follows_failure = not was_ending and any(failed < event.seq for failed in self.replay.revoked_failures.values())
        if follows_failure:
            over = asyncio.ensure_future(self.replay.over.wait())
            try:
                await asyncio.wait({*watched, over}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                over.cancel()
        await asyncio.wait(watched, timeout=DRIFT_PATIENCE + 2 * waited_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
        self._check_not_failed()
        if given_up.cancelled():
            raise asyncio.CancelledError
        if was_ending:
            await self._revoke_cleanup(event)
            return
        what = f"the recorded run gave up {event} after {waited_ms / 1000:g} s, but this run still waits for it"
        if follows_failure:
            await self._revoke_after_failure(event, what)
        else:
            await self._drift_of_one(event, what)

    # ---- The console -------------------------------------------------------------------------------------------------

    def typed_before(self, call: Call) -> str | None:
        """Return the recorded answer to a question at the console; None if there is none.

        Raises DriftError if the prompt differs.
        """
        event = self.replay.pop_unordered(call.address)
        if event is None or not isinstance(event.content, Returned):
            return None
        was, now = event.request.get("prompt"), call.request["prompt"]
        if was != now and not event.accepted:
            self.differs(f"{event} asked {was!r}, now it asks {now!r}")
            return None
        self._found(PendingCall(call), event.content)
        self._count(call.kind, event.content, is_replayed=True)
        return str(event.content.value)

    def typed(self, call: Call, content: Returned) -> None:
        """Keep a typed console line until the line can be recorded."""
        self._count(call.kind, content, is_replayed=False)
        typed = PendingCall(call, asked_after=self.replay.last_seq, asked_ms=self.active_now_ms)
        self._postponed.append((typed, content))

    # ---- Parking ----------------------------------------------------------------------------------------------------

    async def _park_when_all_wait(self) -> None:
        while True:
            if not self.questions.addresses:
                await self.questions.another.wait()
            self.questions.another.clear()
            # Let the other branches continue: they may be running a tool, and their replies are paid for.
            await self._idle()
            waiting = self.questions.addresses
            at_work = {
                running
                for running, pending in self._calls.items()
                if pending.call.address not in waiting and pending.call.kind not in (Kind.SLEEP, Kind.SENT_EVENT)
            }
            if at_work:
                another = asyncio.ensure_future(self.questions.another.wait())
                await asyncio.wait({*at_work, another}, return_when=asyncio.FIRST_COMPLETED)
                another.cancel()
            elif self._postponed:  # the next run must not make the calls again that the program gave up
                with self.servers_errors():
                    async with self._record_lock:
                        await self._record_postponed()
            elif self.questions.addresses:
                with self.servers_errors():
                    # If the last event is a failure, show that it did not end the run: the program has handled it.
                    await self.journal.begin_if_needed(Call(Kind.TURN, "", f"parked/{self.journal.next_seq}"))
                self.stop(Parked(self.journal.session, self.questions.lines))
                return

    # ---- The replay, and drift ---------------------------------------------------------------------------------------

    async def _run_replay(self) -> None:
        try:
            while (mismatch := await self.replay.run()) is not None:
                event = mismatch.event
                if mismatch.follows_failure:
                    await self._revoke_after_failure(event, mismatch.what)
                elif not await self._give_up_recorded(event):
                    await self.drift(event.seq - 1, mismatch.what)
        except Exception as error:  # noqa: BLE001 - every waiting call raises the error
            self.stop(error)

    async def _give_up_recorded(self, event: Event) -> bool:
        """Revoke a result whose call the program has cancelled, if no later call of the record can depend on it.

        The recorded run cancelled the call, too. It was killed, or ended, before it could revoke the result. Return
        whether the event no longer counts.
        """
        cancelled = self._cancelled.get(event.address)
        if cancelled is None or any(one.asked_after >= event.seq for one in self.journal.events):
            return False
        async with self._record_lock:
            if event in self.journal.events:  # the end of the run and the replay may both revoke it
                await self._revoke([event], "the program gave the call up")
                cancelled.setback = self.setbacks.add(cancelled.call.agent, cancelled.caller)
                self._postponed.append((cancelled, GivenUp(streamed=cancelled.streamed(False), was_made=False)))
        return True

    def differs(self, what: str) -> None:
        """Raise DriftError: the program differs from the recorded one. With on_drift="continue", only log a warning."""
        if self.on_drift == "stop":
            error = DriftError(
                f"this program differs from the one recorded in session {self.journal.session}: {what}. Restore the "
                "recorded program, use a new session, or continue live from here with on_drift='continue' "
                "(--on-drift continue)"
            )
            self.stop(error)  # so that the run ends even if an agent takes the error for the result of its tool
            raise error
        self.journal.log.warning("%s", what)

    async def drift(self, after: int, what: str) -> None:
        """Handle drift after event number `after`: raise DriftError, or revoke the later events and continue live."""
        session = self.journal.session
        self.differs(what)
        self.journal.finished_run = None  # what follows is another run: it makes calls and stops on its own
        async with self._record_lock:
            left = len(self.replay.ahead)
            self.journal.log.warning(
                "session %s continues live from here; %d recorded event(s) are dropped", session, left
            )
            # Keep added user messages: agents still get them.
            later = [event for event in self._since(after + 1) if event.kind is not Kind.MESSAGE]
            await warn_of_effects(self.journal, later)
            await self.journal.revoke(later, what, is_another_program=True)
            self.replay.drop_rest()

    async def _drift_of_one(self, event: Event, what: str) -> None:
        """Handle drift of one call: raise DriftError, or revoke the call's event, so that the call is made live.

        Keep later events: the program may have got them already.
        """
        self.differs(what)
        async with self._record_lock:
            if event in self.journal.events:  # else another drift has revoked it meanwhile
                self.journal.log.warning("session %s makes this call live", self.journal.session)
                await warn_of_effects(self.journal, [event])
                await self._revoke([event], what, is_another_program=True)

    async def _revoke_after_failure(self, event: Event, why: str) -> None:
        """Revoke an event that came after a failure which ended an earlier run, so that its call is made live.

        This is no drift, so the call keeps its id. Keep later events: the program may have got them already.
        """
        async with self._record_lock:
            if event in self.journal.events:  # else a drift has revoked it meanwhile
                self.journal.log.warning(
                    "session %s: %s came after a failed or cancelled call that is made again, so it is made again, too",
                    *(self.journal.session, event),
                )
                await self._revoke([event], why)

    async def _revoke_cleanup(self, first: Event) -> None:
        """Revoke a call that Ctrl+C cut off, and the later calls, during which the process was killed."""
        async with self._record_lock:
            # Leave out what this run has recorded: another branch may have revoked later calls before.
            events = [event for event in self._since(first.seq) if event.is_cleanup]
            if first not in events:
                return  # another call that Ctrl+C cut off has revoked it
            self.journal.log.warning(
                "session %s: the last run was being cancelled when it died, so %s is made again",
                *(self.journal.session, first),
            )
            await self._revoke(events, "the run died while it was being cancelled")

    async def _revoke(self, events: Sequence[Event], why: str, *, is_another_program: bool = False) -> None:
        """Revoke events that the replay has not delivered yet."""
        await self.journal.revoke(events, why, is_another_program=is_another_program)
        for event in events:
            self.replay.ahead.pop(event.address, None)

    def _since(self, seq: int) -> list[Event]:
        return [event for event in self.journal.events if event.seq >= seq and event.kind is not Kind.REVOKE]

    # ---- The end -----------------------------------------------------------------------------------------------------

    async def replay_rest(self) -> None:
        """Let background tasks get the recorded events for which they ask.

        Raises DriftError if the program did not make every recorded call.
        """
        while (event := await self.replay.next_without_call()) is not None:
            self._check_not_failed()
            if not await self._give_up_recorded(event):
                await self.drift(event.seq - 1, f"the run ended without asking for {event}")

    async def end(self, stop_reason: str) -> None:
        """Record the run's end."""
        while self._calls:
            # The program ended without waiting for these calls. Record them as given up: a replay must not wait for
            # them either.
            for running, pending in list(self._calls.items()):
                if not pending.answer.done():
                    self._give_up(pending, running)
            await asyncio.wait(self._calls)  # gather would not let an ended task leave `_calls` (Python 3.12 and newer)
        async with self._record_lock:
            await self._record_postponed()
            broken = [event for event in self.journal.events if self._is_broken_end(event)]
            if broken:
                await self.journal.revoke(broken, "the run ended with a broken reply")
        for event in broken:
            self.journal.log.warning(
                "%s is empty or cut off, and no call came after it: it was dropped. Run the session again to retry",
                event,
            )
        await self.journal.end(stop_reason, checks=self._checks, is_finished=not broken)

    def _is_broken_end(self, event: Event) -> bool:
        return (
            isinstance(event.content, Returned)
            and event.content.is_broken
            and not event.accepted
            and not any(later.asked_after >= event.seq for later in self.journal.events)
        )

    async def end_with(self, error: BaseException) -> None:
        """Revoke the failures that led to the run's error, so that the next run makes the failed calls again."""
        is_cancelled = self.cleanup.is_end(error)
        async with self._record_lock:
            # Leave out the given-up calls: the run's end cancelled them, so the next run makes them again.
            self._postponed = [
                (pending, content) for pending, content in self._postponed if isinstance(content, Returned)
            ]
            await self._record_postponed()
            ended_it = self.setbacks.ended_by(error, self.journal.events)
            if is_cancelled:
                # A later run that isn't cancelled makes no such calls.
                ended_it += [
                    one
                    for one in self.journal.events
                    if one.address in self.cleanup.calls and not one.accepted and one not in ended_it
                ]
            if ended_it:
                await self.journal.revoke(ended_it, f"the run ended: {type(error).__name__}")
        self.setbacks.restore_origin(error)
        if is_cancelled:
            # As asyncio.run does later, cancel the calls of tasks that the program has left behind. Otherwise these
            # calls would raise NotDurable, and Python would print a traceback for each.
            for pending in self._calls.values():
                pending.answer.cancel()
