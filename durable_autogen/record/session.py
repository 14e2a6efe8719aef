"""`Session`: a recorded session, for any framework."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, suppress
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

from durable_autogen.errors import NotDurable
from durable_autogen.record import unrecorded
from durable_autogen.record.activity import Activity
from durable_autogen.record.budget import BUDGET_QUESTION, Budget, BudgetCheck, budget_prefix, check_prices
from durable_autogen.record.cleanup import Cleanup, watched_tasks
from durable_autogen.record.console import recorded_console
from durable_autogen.record.effects import cancel_effects_to_be_made
from durable_autogen.record.events import Call, Event, check_session_id
from durable_autogen.record.guard import Guard
from durable_autogen.record.journal import Journal
from durable_autogen.record.log import log_for
from durable_autogen.record.place import Place, at, current, recording_place
from durable_autogen.record.recorder import OnDrift, Recorder
from durable_autogen.record.sent_events import SENT_EVENT
from durable_autogen.record.storable import representable
from durable_autogen.record.terminal import Terminal
from durable_autogen.record.threads import watched_threads
from durable_autogen.record.waits import Waits
from nexum_engine.approvals import NODE, approval_workflow
from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import InvalidRequest, NexumError
from nexum_engine.event_loop import call_in, running_loop
from nexum_engine.policy import Policy

OnUnrecorded = Literal["tell", "stop"]
S = TypeVar("S", bound="Session")


class Session:
    """A session. Calls inside it are recorded by Nexum. The next run with the session's id replays them."""

    def __init__(
        self,
        session_id: str,
        *,
        nexum: str | None = None,
        on_drift: OnDrift = "stop",
        on_unrecorded: OnUnrecorded = "tell",
        tell: Callable[[str], None] | None = None,
        budget: Budget | None = None,
        policies: Mapping[str, Policy] | None = None,
        park: bool = False,
        approve: bool = False,
    ) -> None:
        for name, value, choices in (
            ("on_drift", on_drift, get_args(OnDrift)),
            ("on_unrecorded", on_unrecorded, get_args(OnUnrecorded)),
        ):
            if value not in choices:
                raise InvalidRequest(f"{name} is {value!r}: give one of {', '.join(choices)}")
        if not isinstance(policies, Mapping | None):
            raise InvalidRequest(f"policies must be a dictionary of tools' names and Policy objects, not {policies!r}")
        for name, policy in (policies or {}).items():
            if not isinstance(name, str):
                raise InvalidRequest(f"policies must have names of tools as keys, not {name!r}")
            if not isinstance(policy, Policy):
                raise InvalidRequest(f"the policy of {name} must be a Policy, not {policy!r}")
        if not isinstance(budget, Budget | None):
            raise InvalidRequest(f"the budget must be a Budget, for instance Budget(usd=2), not {budget!r}")
        self.session_id = check_session_id(session_id)
        self.stop_reason = ""
        """The reason for the run's end, recorded when the session is left."""
        self.is_over = False
        """Whether the session has ended, or its end is being recorded. It then makes no further call."""
        self.activity = Activity()
        self._address = nexum
        self.log = log_for(tell, self._could_not_tell)
        self._on_drift: OnDrift = on_drift
        self._on_unrecorded: OnUnrecorded = on_unrecorded
        self._policies = dict(policies or {})
        self._park = park
        self._approve = approve
        self._budget = budget
        if budget is not None and budget.usd is not None:
            check_prices()
        self._stack = AsyncExitStack()
        self._recorder: Recorder | None = None
        self._waits: Waits
        self.guard: Guard
        """The policies of the run."""
        self.cleanup: Cleanup
        """The clean-up of the run after Ctrl+C."""
        self._left: Counter[str] = Counter()
        """How often each connection or process was started outside a recorded call."""

    def _could_not_tell(self, error: Exception) -> None:
        # Stop the run from its event loop: this function may be called in another thread.
        if self._recorder is not None:
            call_in(self.loop, self._recorder.stop, error)

    # ---- What a framework adds ---------------------------------------------------------------------------------------

    def entry_points(self) -> AbstractContextManager[None]:
        """Record calls of the framework's methods for the length of a `with`."""
        raise NotImplementedError

    def differences(self, recorded: Event, now: Call, find: Callable[[str], Event | None]) -> list[str]:
        """Return a line for each difference between a recorded event and the call `now`.

        `find` returns the recorded event of an address.
        """
        raise NotImplementedError

    @cached_property
    def state(self) -> Any:
        """The state that the framework's entry points keep for the session."""
        raise NotImplementedError

    # ---- The run -----------------------------------------------------------------------------------------------------

    @property
    def recorder(self) -> Recorder:
        """The run's recorder. Raises RuntimeError outside `async with`."""
        if self._recorder is None:
            raise RuntimeError("the session is not open: use it inside `async with`")
        return self._recorder

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop in which the session was opened. Raises RuntimeError outside `async with`."""
        return self.recorder.failed.get_loop()

    @contextmanager
    def agent(self, name: str) -> Iterator[None]:
        """Inside a `with`, record the program's own calls under `name`.

        Use `agent` to name the parallel branches of a program that calls models or tools itself.
        """
        place = self._place()
        label = place.inside(representable(name))
        with at(Place(self, agent=label, path=label, in_call=place.in_call, around=place.around)):
            yield

    def _place(self) -> Place:
        place = current.get()
        while place is not None and place.session is not self:
            place = place.around
        return place or Place(self)

    # ---- Waits -------------------------------------------------------------------------------------------------------

    async def sleep(self, seconds: float) -> None:
        """Sleep for `seconds`. After a crash, the next run sleeps only for the remaining time.

        The time at which the sleep ends is recorded first. The sleep is over when the machine's clock shows that time,
        never earlier. So the sleep continues while no process runs. If a later run passes other `seconds`, the sleep
        still ends at the recorded time. Raises InvalidRequest for a wrong number, and NotDurable inside a tool.
        """
        with self._at_wait("sleep", "use asyncio.sleep in the tool") as place:
            await self._waits.sleep(place.agent, seconds)

    async def wait_for_event(self, name: str, timeout: float | None = None) -> Any:
        """Wait until an event `name` is sent to the session; return its payload, a JSON value.

        Send an event with `send_event` or `python -m durable_autogen send SESSION NAME`. If an event is sent before the
        program waits, or while no process runs, the event is kept. Two waits never return the same event. Events of one
        name are returned in the order in which they were sent. A replay returns the same events.

        Raises TimeoutError if no event is sent within `timeout` seconds. A crash doesn't extend that time. A later
        event is kept for the next wait. Raises InvalidRequest for a wrong argument, and NotDurable inside a tool.
        """
        with self._at_wait("wait_for_event", "return, and wait in the program or an agent") as place:
            return await self._waits.receive(place.agent, name, timeout)

    @contextmanager
    def _at_wait(self, method: str, instead: str) -> Iterator[Place]:
        with at(self._place()):
            place = recording_place()
            if place is None:
                raise NotDurable(
                    f"{method} of session {self.session_id} can't be recorded inside a tool or another recorded call: "
                    f"{instead}"
                )
            yield place

    async def __aenter__(self: S) -> S:
        if self._recorder is not None:
            raise RuntimeError(f"session {self.session_id} was entered already: create a new DurableSession")
        running_loop()
        self.cleanup = Cleanup()
        async with AsyncExitStack() as stack:
            # Undo these last. Until then, a call of a task that the program left behind raises NotDurable.
            stack.enter_context(watched_threads())
            stack.enter_context(watched_tasks())
            stack.enter_context(recorded_console())
            stack.enter_context(unrecorded.watched_without_events())
            stack.enter_context(self.entry_points())
            # Connect without a place, so that nothing that the connection does counts as a call of the program.
            with at(None):
                address = self._address or os.environ.get("NEXUM_ADDRESS")
                if not address:
                    address = (await stack.enter_async_context(EmbeddedNexum(None, owners=True))).address
                client = await stack.enter_async_context(NexumClient(address))
                journal = await stack.enter_async_context(Journal(client, self.session_id, self.log))
            unrecorded.watch()
            stack.enter_context(at(Place(self, around=current.get())))
            budget = None if self._budget is None else BudgetCheck(self._budget, journal)
            ask = Terminal().ask if self._approve and Terminal.is_there() else None
            park = self._park and ask is None  # don't park a run that asks at the terminal: it waits there
            self._recorder = Recorder(journal, self, on_drift=self._on_drift, park=park, budget=budget)
            stack.push_async_callback(self._close)
            self.guard = Guard(self._recorder, self._policies, ask=ask)
            self._waits = Waits(self._recorder)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        recorder = self.recorder
        failure = recorder.failed.result() if recorder.failed.done() else None
        if error is not None and _is_successful_exit(error):
            error = None
        if error is not None and (failure is None or error is failure or not isinstance(error, Exception)):
            self.is_over = True
            try:
                if failure is None:
                    await recorder.end_with(error)
            except NexumError as ending:
                self.log.warning(
                    "session %s: the failure could not be dropped from the record: %s",
                    self.session_id,
                    ending,
                )
            finally:
                await self._stack.__aexit__(kind, error, traceback)
            return
        async with self._stack:
            if failure is not None:
                raise failure from error  # `error` may be a team's own error, which holds only the failure's text
            await recorder.replay_rest()
            self.is_over = True  # a call that a background task makes from now on would not be recorded
            await recorder.end(self.stop_reason)
            await self._withdraw_questions(recorder.journal)
            self.guard.warn_of_unknown_names()

    async def _withdraw_questions(self, journal: Journal) -> None:
        """Cancel the questions to people, the executions of events, and the effects that no call waits for any more.

        Calls of earlier runs may have begun them. The server never prunes a session that has running executions. If an
        event is sent later, its execution is started again.
        """
        with suppress(NexumError):  # if no server answers, a later run cancels them
            if journal.may_leave_open:
                await journal.cancel_running(approval_workflow(), f"{self.session_id}:{NODE}/")
                await journal.cancel_running(BUDGET_QUESTION, budget_prefix(self.session_id))
                await journal.cancel_running(SENT_EVENT, f"{self.session_id}/")
            # Since the end of a finished session, a person may have resolved an effect as not done.
            if journal.may_leave_open or journal.finished_run is not None:
                await cancel_effects_to_be_made(journal)

    async def _close(self) -> None:
        self.is_over = True
        await self.recorder.close()
        self._log_counts()

    # ---- Outside the record ------------------------------------------------------------------------------------------

    def left_the_record(self, agent: str, what: str) -> None:
        """Report a connection or process that isn't recorded. With `on_unrecorded="stop"`, raise NotDurable."""
        did = f"{agent or 'the program'} {what}"
        line = f"{did} outside the record: a re-run does it again, unless you make it a tool"
        self._left[did] += 1
        if self._on_unrecorded == "stop":
            error = NotDurable(f"session {self.session_id}: {line} (on_unrecorded='stop')")
            call_in(self.loop, self.recorder.stop, error)
            raise error
        if self._left[did] == 1:
            self.log.warning("%s", line)

    def _log_counts(self) -> None:
        recorder = self.recorder
        if recorder.live_counts or recorder.replayed_counts:
            live, replayed = _counts_in_words(recorder.live_counts), _counts_in_words(recorder.replayed_counts)
            # A program's handler can read the counts from the record instead of its text.
            counts = {"live": dict(recorder.live_counts), "replayed": dict(recorder.replayed_counts)}
            line = "session %s, live: %s; replayed from the record: %s"
            self.log.info(line, self.session_id, live, replayed, extra=counts)
        if self._left:
            times = ", ".join(f"{what}{f' ({count} times)' if count > 1 else ''}" for what, count in self._left.items())
            self.log.warning("session %s: outside the record: %s", self.session_id, times)


def _is_successful_exit(error: BaseException) -> bool:
    """Return whether a program has called `sys.exit` at its end. It may also do so to end because of an error."""
    return isinstance(error, SystemExit) and not error.code and error.__context__ is None


def _counts_in_words(counts: Mapping[str, int]) -> str:
    return (
        f"{counts.get('model calls', 0)} model call(s) ({counts.get('tokens', 0):,} tokens), "
        f"{counts.get('tool calls', 0)} tool call(s)"
        + (f", {counts['inputs']} input(s)" if counts.get("inputs") else "")
        + (f", {counts['waits']} wait(s)" if counts.get("waits") else "")
    )
