"""List, show and cancel recorded sessions, and send events to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from durable_autogen.record.events import (
    AGENT_RUN,
    SERVER_PATIENCE,
    Event,
    Said,
    Waiting,
    end_of_wait,
    latest_run,
    read_record,
    text_asked,
)
from durable_autogen.record.sent_events import send
from nexum_engine import jsontext
from nexum_engine.approvals import how_to_decide, how_to_resolve
from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import Conflict, ExecutionNotFound, InvalidRequest
from nexum_engine.records import Execution, ExecutionStatus, NodeStatus, PendingApproval, UnknownNode

T = TypeVar("T")


@dataclass(frozen=True)
class SessionInfo:
    """A summary of one session."""

    session: str
    question: str
    """The task and later user messages. If there are none: the first user message that a model got, else empty."""
    models: tuple[str, ...]
    status: str
    calls: Counter[str]
    """The number of recorded calls of each kind: reply, tool, input, console, code, event."""
    begun_ms: int
    waits: tuple[Event, ...] = ()
    """The WAIT events of the waits that are not over. Their content is a `Waiting`. Empty for a finished session."""
    questions: tuple[str, ...] = ()
    """The decisions that the session waits for, each with the command for it."""


async def list_sessions(client: NexumClient, limit: int | None = None) -> list[SessionInfo]:
    """Return a summary of every session on the server, the latest session first. With `limit`, of the latest ones."""

    async def read() -> list[SessionInfo]:
        questions = await _questions(client)
        found: list[SessionInfo] = []
        async for latest in _runs(client, group_sessions=True):
            if len(found) == limit:
                break
            session = latest.idempotency_key.rpartition("/")[0]
            if runs := [run async for run in _runs(client, key_prefix=f"{session}/")]:  # else it was just pruned
                # Keep no events: the sessions together may have more than fits into memory.
                found.append((await _shown(client, session, runs, questions)).info)
        return found

    return await while_pruning(read)


async def while_pruning(read: Callable[[], Awaitable[T]]) -> T:
    """Call `read`, which reads lists of executions. Call it again if executions are pruned at the same time."""
    while True:
        # If executions are pruned between two pages of a list, the server can't find the end of the first page.
        with suppress(ExecutionNotFound):
            return await read()


def _runs(client: NexumClient, **selected: Any) -> AsyncIterator[Execution]:
    return client.all_executions(
        workflow_id=AGENT_RUN.workflow_id, with_nodes=True, patience=SERVER_PATIENCE, **selected
    )


async def _questions(client: NexumClient) -> dict[str, list[str]]:
    """Return, by session, texts about what waits for a person's decision."""
    found: dict[str, list[str]] = {}
    pending: list[PendingApproval | UnknownNode] = [*await client.pending_approvals(patience=SERVER_PATIENCE)]
    for one in [*pending, *await client.unknown(patience=SERVER_PATIENCE)]:
        input_json = one.input_json
        if not input_json:  # the list leaves out a long input
            whole = await client.get_execution(one.execution_id, patience=SERVER_PATIENCE)
            input_json = whole.execution.input_json
        input = jsontext.parse(input_json, "the input")
        if isinstance(input, dict) and isinstance(session := input.get("session"), str):
            found.setdefault(session, []).append(_question(one, input, client.servers))
    return found


def _question(one: PendingApproval | UnknownNode, input: dict[str, Any], nexum: str) -> str:
    arguments = jsontext.dump(input.get("arguments"), "it") if one.input_json else "…"  # left out: too long to show
    what = f"{input['tool']}({arguments})" if "tool" in input else one.node_id
    if isinstance(one, UnknownNode):
        return f"may or may not have called {what}. {how_to_resolve(one.execution_id, one.attempt, nexum)}"
    if command := input.get("decide_with"):  # a `BudgetQuestion`: an approval without new limits decides nothing
        return f"has used {input.get('reason')} of its budget, and waits for a decision: {command}"
    return f"waits for a decision on {what}: {how_to_decide(one.execution_id, nexum)}"


async def _shown(
    client: NexumClient, session: str, runs: Sequence[Execution], questions: Mapping[str, Sequence[str]]
) -> ShownSession:
    """Return a session with its events. `runs` are its runs, newest first; `questions` are those of all sessions."""
    completed = next((run for run in runs if run.status is ExecutionStatus.COMPLETED), None)
    record = await read_record(client, session)
    events = record.events
    messages = [event.content.text for event in events if isinstance(event.content, Said)]
    models = [str(event.request["model"]) for event in events if "model" in event.request]
    task = record.task or [next(filter(None, map(text_asked, events)), "")]
    status = _status(runs[0], is_finished=record.end_of(completed) is not None)
    addresses = {event.address for event in events}
    info = SessionInfo(
        session=session,
        question=" / ".join(filter(None, [*task, *messages])),
        models=tuple(dict.fromkeys(models)),
        status=status,
        calls=Counter(event.kind.value for event in events if event.kind.is_call),
        begun_ms=runs[-1].created_ms,
        waits=tuple(
            event
            for event in events
            if isinstance(event.content, Waiting)
            and end_of_wait(event.address) not in addresses
            and status != "finished"
        ),
        questions=tuple(questions.get(session, ())),
    )
    return ShownSession(info, tuple(events))


@dataclass(frozen=True)
class ShownSession:
    """A session's summary and events."""

    info: SessionInfo
    events: tuple[Event, ...]
    """The session's events in recorded order, without revoked ones."""


async def show_session(client: NexumClient, session: str) -> ShownSession:
    """Return a session with its events. Raises InvalidRequest if the server has no session of this id."""

    async def read() -> ShownSession:
        runs = [run async for run in _runs(client, key_prefix=f"{session}/")]
        if not runs:
            raise unknown_session(session)
        return await _shown(client, session, runs, await _questions(client))

    return await while_pruning(read)


def unknown_session(session: str) -> InvalidRequest:
    """Return the error for a session that has recorded nothing, or that was pruned."""
    return InvalidRequest(
        f"session {session!r} has nothing on record here: it has recorded nothing yet, or it was pruned. List the "
        "sessions with: python -m durable_autogen ls"
    )


async def question_of(client: NexumClient, session: str) -> str | None:
    """Return the text of a session's task; None if the session has not begun."""
    record = await while_pruning(lambda: read_record(client, session))
    return None if record.beginning is None else "\n".join(record.task)


async def has_begun(client: NexumClient, session: str) -> bool:
    """Return whether a program has run in the session."""
    return await latest_run(client, session) is not None


async def cancel_session(client: NexumClient, session: str, *, by: str = "") -> Execution | None:
    """Cancel the run of a session: its program ends with RunCancelled, and continues when it runs again.

    `by` is the name of the person who cancels. If the run was cancelled before, return it; its program may have ended
    long ago. Raises InvalidRequest if the session is unknown, and Conflict if nothing runs it.
    """
    run = await latest_run(client, session)
    if run is None:
        raise unknown_session(session)
    if run.status is ExecutionStatus.CANCELLED:
        return run
    if not run.status.ended:
        with suppress(Conflict):  # the run has just ended
            await client.cancel_execution(run.execution_id, by=by)
            return None
    raise Conflict(f"nothing runs session {session}")


def _status(run: Execution, *, is_finished: bool) -> str:
    """Return a session's status. A finished session stays finished, even if a later run fails."""
    if any(node.status is NodeStatus.RUNNING for node in run.nodes):
        return "running"
    if is_finished:
        return "finished"
    return "interrupted" if run.status is ExecutionStatus.RUNNING else "stopped"


async def send_event(
    session_id: str, name: str, payload: object = None, *, idempotency_key: str = "", nexum: str | None = None
) -> None:
    """Send an event to a session: `wait_for_event(name)` in the session returns `payload`, a JSON value.

    If the session isn't waiting for the event now, or no process runs the session, the event is kept. If an event of
    this name was sent with the same `idempotency_key` before, nothing is sent. `nexum` is the server's address, as for
    DurableSession. Inside a session, call `send_event` in a tool: then a replay sends nothing.

    Raises InvalidRequest for a wrong argument, IdempotencyConflict if the key was used with another payload, and the
    server's errors.
    """
    async with EmbeddedNexum(nexum, owners=True) as server, NexumClient(server.address) as client:
        await send(client, session_id, name, payload, idempotency_key=idempotency_key)
