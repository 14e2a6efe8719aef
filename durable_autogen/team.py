"""A whole team, or one agent, run so that it can be continued: `run_durable`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from autogen_agentchat.base import ChatAgent, TaskResult, Team
from autogen_agentchat.messages import BaseChatMessage, MessageFactory
from autogen_core import CancellationToken

from console import say
from durable_autogen.errors import RunCancelled
from durable_autogen.events import Event, Kind
from durable_autogen.recorder import OnDrift, Recorder
from durable_autogen.request import differences, hashed
from durable_autogen.session import DurableSession
from durable_autogen.transcript import Item, Message, Task, messages_of
from nexum_engine.errors import InvalidRequest

END_PATIENCE = 5.0  # seconds that a stopped team gets to end

Runnable = ChatAgent | Team


async def run_durable(
    team: Runnable | Callable[[], Runnable | Awaitable[Runnable]],
    *,
    task: Task = None,
    session_id: str,
    nexum: str | None = None,
    on_drift: OnDrift = "stop",
    cancellation_token: CancellationToken | None = None,
    output_task_messages: bool = True,
    tell: Callable[[str], None] = say,
) -> TaskResult:
    """Run the team, or go on with the session's run; its result.

    `team` is a function that builds the team or agent, or one that has never run. What the session has recorded is
    replayed, the rest runs live and is recorded. The question can be left out where the session has one. `nexum`
    defaults to NEXUM_ADDRESS, then localhost:50051. `tell` gets the lines that say what is replayed; by default they go
    to standard output. `cancellation_token` and `output_task_messages` are those of AutoGen's `run`.

    Raises DriftError, SessionBusy, NotDurable, RunCancelled, ServerUnavailable, and what the team's run raises.
    """
    result: TaskResult | None = None
    async for item in run_durable_stream(
        team,
        task=task,
        session_id=session_id,
        nexum=nexum,
        on_drift=on_drift,
        cancellation_token=cancellation_token,
        output_task_messages=output_task_messages,
        tell=tell,
    ):
        if isinstance(item, TaskResult):
            result = item
    assert result is not None
    return result


async def run_durable_stream(
    team: Runnable | Callable[[], Runnable | Awaitable[Runnable]],
    *,
    task: Task = None,
    session_id: str,
    nexum: str | None = None,
    on_drift: OnDrift = "stop",
    cancellation_token: CancellationToken | None = None,
    output_task_messages: bool = True,
    tell: Callable[[str], None] = say,
) -> AsyncGenerator[Item, None]:
    """The same as a stream of messages with the result at its end, as AutoGen's `run_stream`."""
    session = DurableSession(session_id, nexum=nexum, on_drift=on_drift, tell=tell)
    async with session:
        recorder = session.recorder
        recorder.ended = recorder.journal.ended
        built = team if isinstance(team, (ChatAgent, Team)) else team()
        runnable = session.durable(await built if inspect.isawaitable(built) else built)
        task = await _begin(recorder, runnable, task)
        run = _Run(session, runnable, cancellation_token, output_task_messages=output_task_messages)
        async for message in run.messages(task):
            yield message
        result = run.result
        for added in recorder.messages:
            if added.seq in recorder.delivered:
                continue
            # It was added after the end of the run: it is the next thing that the user says.
            recorder.as_task.add(added.seq)
            async for message in run.messages(added.content["text"]):
                yield message
            result = TaskResult(messages=[*result.messages, *run.result.messages], stop_reason=run.result.stop_reason)
        session.stop_reason = result.stop_reason or ""
        if not (recorder.live or recorder.replayed):
            tell(
                f"[Nexum] session {session_id}: nothing was recorded. Whatever the run called, it called by itself: an "
                "agent's model clients and workbenches have to be attributes of its own"
            )
    yield result


async def _begin(recorder: Recorder, runnable: Runnable, task: Task) -> Task:
    """Compare question and team with the session's, or record them; the question to ask."""
    journal = recorder.journal
    begun = next((event for event in reversed(journal.events) if event.kind is Kind.BEGIN), None)
    if begun is None:
        if task is None:
            raise InvalidRequest(f"session {journal.session} is new: give it a task")
        await _record_beginning(recorder, runnable, task)
        return task
    recorded: list[str] = begun.content["task"]
    if task is None:
        if not recorded:
            raise InvalidRequest(f"session {journal.session} has no question of its own: give it a task")
        return _task_again(begun)
    if begun.accepted:  # in a fork, the team may be another one
        differing = differences(hashed({"task": recorded}), hashed({"task": _texts(task)}))
    else:
        differing = differences(begun.request, _description(runnable, task))
    if differing:
        await recorder.drift(begun.seq - 1, f"the session's beginning is another one: {'; '.join(differing)}")
        await _record_beginning(recorder, runnable, task)
    return task


async def _record_beginning(recorder: Recorder, runnable: Runnable, task: Task) -> None:
    content = {"task": _texts(task), "messages": [_dumped(message) for message in messages_of(task)]}
    await recorder.begin(content, _description(runnable, task))


def _dumped(message: BaseChatMessage) -> dict[str, Any]:
    """A message without the id and time that it was given by chance."""
    return message.model_dump(mode="json", exclude={"id", "created_at"} - message.model_fields_set)


def _task_again(begun: Event) -> Task:
    """The question as it was asked."""
    dumped: list[dict[str, Any]] = begun.content.get("messages") or []
    if not dumped:
        return "\n".join(begun.content["task"])
    factory = MessageFactory()
    try:
        messages = [factory.create(one) for one in dumped]
    except ValueError as error:
        raise InvalidRequest(
            f"the session's question can't be made again here: {error}. Give it as the task"
        ) from error
    return [message for message in messages if isinstance(message, BaseChatMessage)]


def _description(runnable: Runnable, task: Task) -> dict[str, Any]:
    members = getattr(runnable, "_participants", None) or [runnable]
    team = f"{type(runnable).__name__}: {', '.join(member.name for member in members)}"
    return hashed({"task": _texts(task), "team": team})


def _texts(task: Task) -> list[str]:
    if isinstance(task, str):
        return [task]
    return [message.to_text() for message in messages_of(task)]


class _Run:
    """One run of the team in a task of its own, so that a failure or a cancellation is not held up by AutoGen."""

    def __init__(
        self,
        session: DurableSession,
        runnable: Runnable,
        cancellation_token: CancellationToken | None,
        *,
        output_task_messages: bool,
    ) -> None:
        self.result = TaskResult(messages=[])
        self._recorder = session.recorder
        self._runnable = runnable
        self._output_task_messages = output_task_messages
        if cancellation_token is not None:
            loop = asyncio.get_running_loop()
            # Not handed to the team: AutoGen would wait for ever for a tool call that it cancels.

            def cancelled() -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._cancelled)

            cancellation_token.add_callback(cancelled)

    def _cancelled(self) -> None:
        self._recorder.stop(
            RunCancelled(f"the run of session {self._recorder.journal.session} was cancelled; what is recorded stays")
        )

    async def messages(self, task: Task) -> AsyncGenerator[Message, None]:
        """What the team says, as it says it."""
        queue: asyncio.Queue[Message | None] = asyncio.Queue()
        running = asyncio.create_task(self._feed(task, queue), name="durable team")
        running.add_done_callback(lambda _: queue.put_nowait(None))
        failed = self._recorder.failed
        try:
            while True:
                getting = asyncio.ensure_future(queue.get())
                try:
                    watched: set[asyncio.Future[Any]] = {getting, failed}
                    await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                    if failed.done():
                        raise failed.result()
                    item = await getting
                finally:
                    getting.cancel()
                if item is None:
                    break
                yield item
            if failed.done():
                raise failed.result()
            try:
                await running
            except RuntimeError as error:
                cause = self._recorder.call_error
                if cause is not None and error is not cause and str(cause) in str(error):
                    raise cause from error
                raise
        finally:
            if not running.done():
                self._cancelled()
                await asyncio.wait({running}, timeout=END_PATIENCE)
                running.cancel()
            if running.done() and not running.cancelled():
                running.exception()  # looked at; what counts is raised already

    async def _feed(self, task: Task, queue: asyncio.Queue[Message | None]) -> None:
        # A runnable of one's own may know no such argument.
        more: Any = {} if self._output_task_messages else {"output_task_messages": False}
        async for item in self._runnable.run_stream(task=task, **more):
            if isinstance(item, TaskResult):
                self.result = item
            else:
                queue.put_nowait(item)
