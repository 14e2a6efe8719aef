"""`run_durable`: run one agent or team in a session; after a crash, resume its run."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from autogen_agentchat.base import ChatAgent, TaskResult, Team
from autogen_agentchat.messages import BaseChatMessage, MessageFactory
from autogen_core import CancellationToken

from durable_autogen.autogen.differences import fingerprint_differences
from durable_autogen.autogen.fingerprints import fingerprint_of
from durable_autogen.autogen.session_state import text_of
from durable_autogen.autogen.transcript import Item, Message, Task, marked, messages_of
from durable_autogen.errors import RunCancelled
from durable_autogen.record.budget import Budget
from durable_autogen.record.events import Begun
from durable_autogen.record.recorder import OnDrift, Recorder
from durable_autogen.record.session import OnUnrecorded
from durable_autogen.record.storable import representable
from durable_autogen.record.tasks import cancel_and_wait, closing, items_of
from durable_autogen.session import DurableSession
from nexum_engine.errors import InvalidRequest
from nexum_engine.event_loop import call_in, running_loop
from nexum_engine.policy import Policy

END_PATIENCE = 5.0  # seconds to wait for a stopped team to end

P = ParamSpec("P")
T = TypeVar("T")
Runnable = ChatAgent | Team

_at_work: WeakKeyDictionary[Any, DurableSession] = WeakKeyDictionary()
"""The session of each agent or team that is being run."""
_has_run: WeakSet[Any] = WeakSet()
"""The agents and teams that have run."""


async def run_durable_stream(
    team: Runnable | Callable[[], Runnable | Awaitable[Runnable]],
    *,
    task: Task = None,
    session_id: str,
    nexum: str | None = None,
    on_drift: OnDrift = "stop",
    on_unrecorded: OnUnrecorded = "tell",
    cancellation_token: CancellationToken | None = None,
    output_task_messages: bool = True,
    tell: Callable[[str], None] | None = None,
    budget: Budget | None = None,
    policies: Mapping[str, Policy] | None = None,
    park: bool = False,
    approve: bool = False,
) -> AsyncGenerator[Item, None]:
    """Run an agent or team as `run_durable` does; yield its messages and then its result."""
    running_loop()
    session = DurableSession(
        session_id,
        nexum=nexum,
        on_drift=on_drift,
        on_unrecorded=on_unrecorded,
        tell=tell,
        budget=budget,
        policies=policies,
        park=park,
        approve=approve,
    )
    run = _Run(session, team, task, cancellation_token, output_task_messages)
    # Use a separate task. It keeps the session out of the consumer's context. It also lets the consumer continue if
    # AutoGen waits for ever for a stopped agent.
    running = asyncio.create_task(run.whole(), name="durable run")
    async with closing(items_of(running, run.items)) as items:
        async for item in items:
            yield item
    yield await running


def _with_parameters_of(
    other: Callable[P, Any],
) -> Callable[[Callable[..., Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Return a decorator that gives a function the signature of `other`, to which it passes all of its arguments."""

    def decorate(function: Any) -> Any:
        shown = inspect.signature(other).replace(return_annotation=function.__annotations__["return"])
        function.__signature__ = shown
        return function

    return decorate


@_with_parameters_of(run_durable_stream)
async def run_durable(*args: Any, **options: Any) -> TaskResult:
    """Run an agent or team in a session, or resume the session's run; return its result.

    `team` is an agent or team that has never run, or a function that builds one. Recorded calls are replayed. Later
    calls are made live and recorded. A session holds one task. To resume the session with its recorded task, leave
    `task` out. `cancellation_token` and `output_task_messages` mean the same as in AutoGen's `run`. The other arguments
    mean the same as in DurableSession.

    Raises RunCancelled, Parked, the errors of DurableSession, and the errors of the team's run.
    """
    result: TaskResult | None = None
    async for item in run_durable_stream(*args, **options):
        if isinstance(item, TaskResult):
            result = item
    assert result is not None
    return result


@dataclass
class _Run:
    """A durable run of an agent or team."""

    session: DurableSession
    team: Runnable | Callable[[], Runnable | Awaitable[Runnable]]
    task: Task
    token: CancellationToken | None
    output_task_messages: bool
    items: asyncio.Queue[Message] = field(default_factory=asyncio.Queue)
    """The messages of the agent or team."""

    async def whole(self) -> TaskResult:
        """Run the agent or team in the session; return its result."""
        session = self.session
        async with session:
            recorder = session.recorder
            recorder.holds_one_task = True
            if self.token is not None:
                # Don't pass the token to the team: AutoGen would wait for ever for a tool call that the token cancels.
                self.token.add_callback(partial(call_in, session.loop, self._cancelled))
            built = self.team if isinstance(self.team, (ChatAgent, Team)) else self.team()
            runnable = await built if inspect.isawaitable(built) else built
            _check_new(runnable)
            _at_work[runnable] = session
            try:
                task = await _begin(recorder, runnable, self.task)
                result = await self._run(runnable, task)
                added = session.state.added
                for message in added.messages:
                    if message.seq not in added.delivered:
                        # No request to a model included the message before the run ended. So run the team with the
                        # message as its task.
                        added.as_task.add(message.seq)
                        more = await self._run(runnable, text_of(message))
                        result = TaskResult(messages=[*result.messages, *more.messages], stop_reason=more.stop_reason)
            finally:
                _at_work.pop(runnable, None)
            session.stop_reason = result.stop_reason or ""
            if not (recorder.live_counts or recorder.replayed_counts):
                session.log.warning(
                    "session %s: nothing was recorded: the run called no model, tool or person through AutoGen",
                    session.session_id,
                )
        return result

    async def _run(self, runnable: Runnable, task: Task) -> TaskResult:
        recorder = self.session.recorder
        running = asyncio.create_task(self._feed(runnable, task), name="durable team")
        watched: set[asyncio.Future[Any]] = {running, recorder.failed}
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if recorder.failed.done():
                raise recorder.failed.result()
            try:
                return await running
            except RuntimeError as error:
                failure = recorder.setbacks.failure_quoted_by(error)
                if failure is not None:
                    raise failure from error
                raise
        finally:
            if not running.done():
                self._cancelled()
                await asyncio.wait({running}, timeout=END_PATIENCE)
            await cancel_and_wait(running, 0)

    async def _feed(self, runnable: Runnable, task: Task) -> TaskResult:
        _has_run.add(runnable)
        result = TaskResult(messages=[])
        # Pass `output_task_messages` only if it is False: a custom agent or team may not accept it.
        more: Any = {} if self.output_task_messages else {"output_task_messages": False}
        async for item in runnable.run_stream(task=task, **more):
            if isinstance(item, TaskResult):
                result = item
            else:
                was_replayed = self.session.state.was_replayed(item.source)
                self.items.put_nowait(marked(item) if was_replayed else item)
        return result

    def _cancelled(self) -> None:
        self.session.recorder.stop(RunCancelled.of(self.session.session_id))


def _check_new(runnable: Runnable) -> None:
    """Raise InvalidRequest for an agent or team that is running, or that has run before."""
    busy = _at_work.get(runnable)
    if busy is not None:
        raise InvalidRequest(f"{runnable.name} is already running in session {busy.session_id}: build a new one")
    if runnable in _has_run or getattr(runnable, "_initialized", False):  # AutoGen marks teams that have run
        raise InvalidRequest(
            f"{runnable.name} has run before, and its memory of that run isn't recorded: give run_durable a function "
            "that builds a new one"
        )


async def _begin(recorder: Recorder, runnable: Runnable, task: Task) -> Task:
    """Record the task and the team of a new session, or compare them with the recorded ones; return the task to run."""
    journal = recorder.journal
    task = _recordable(task)
    begun = journal.recorded.beginning
    if begun is None:
        if task is None:
            raise InvalidRequest(f"session {journal.session} is new: give it a task")
        await _record_beginning(recorder, runnable, task)
        return task
    assert isinstance(begun.content, Begun)
    if task is None:
        if not begun.content.task:
            raise InvalidRequest(f"session {journal.session} has recorded no task: give it one")
        return _task_again(begun.content)
    recorded, now = begun.request, _fingerprint(runnable, task)
    if begun.accepted:  # compare only the task: a fork may have another team
        recorded, now = fingerprint_of({"task": begun.content.task}), fingerprint_of({"task": _texts(task)})
    if differing := fingerprint_differences(recorded, now):
        await recorder.drift(begun.seq - 1, f"the session began differently: {'; '.join(differing)}")
        await _record_beginning(recorder, runnable, task)
    return task


async def _record_beginning(recorder: Recorder, runnable: Runnable, task: Task) -> None:
    content = Begun(task=_texts(task), messages=[representable(_dumped(message)) for message in messages_of(task)])
    await recorder.begin_session(content, _fingerprint(runnable, task))


def _dumped(message: BaseChatMessage) -> dict[str, Any]:
    """Return a message as a dict. Leave out its id and time if AutoGen generated them."""
    return message.model_dump(mode="json", exclude={"id", "created_at"} - message.model_fields_set)


def _task_again(begun: Begun) -> Task:
    """Return the recorded task in the form in which the program gave it: a text or messages."""
    if not begun.messages:
        return "\n".join(begun.task)
    factory = MessageFactory()
    try:
        messages = [factory.create(one) for one in begun.messages]
    except ValueError as error:
        raise InvalidRequest(f"the recorded task can't be built here: {error}. Pass it as the task") from error
    return [message for message in messages if isinstance(message, BaseChatMessage)]


def _fingerprint(runnable: Runnable, task: Task) -> dict[str, Any]:
    members = getattr(runnable, "_participants", None) or [runnable]
    team = f"{type(runnable).__name__}: {', '.join(member.name for member in members)}"
    return fingerprint_of({"task": _texts(task), "team": team})


def _texts(task: Task) -> list[str]:
    return [task] if isinstance(task, str) else [message.to_text() for message in messages_of(task)]


def _recordable(task: Task) -> Task:
    """Return the task with lone surrogates replaced, so that the first run and a resumed run get equal tasks."""
    texts = _texts(task)
    if representable(texts) == texts:
        return task
    if isinstance(task, str):
        return str(representable(task))
    return [type(one).model_validate(representable(one.model_dump(mode="json"))) for one in messages_of(task)]
