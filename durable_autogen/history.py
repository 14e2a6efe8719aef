"""Sessions from outside: what there is on record, and a new one from the first events of another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from durable_autogen.errors import DriftError
from durable_autogen.events import AGENT_RUN, PAGE, PATIENCE, Event, Kind, end_of, read_events
from durable_autogen.journal import Journal
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from nexum_engine.model import Execution, ExecutionStatus, NodeStatus
from session_file import check_session_id

KEPT = (Kind.REPLY, Kind.TOOL, Kind.INPUT, Kind.TURN, Kind.MESSAGE)  # by a fork


@dataclass(frozen=True)
class SessionInfo:
    """One session for a person."""

    session: str
    question: str
    models: tuple[str, ...]
    status: str
    calls: Counter[str]
    """Recorded events by kind: reply, tool, input."""
    begun_ms: int


async def list_sessions(client: NexumClient) -> list[SessionInfo]:
    """Every session on the server, the latest first."""
    latest: dict[str, Execution] = {}
    earliest: dict[str, Execution] = {}
    completed: dict[str, Execution] = {}
    before = ""
    while True:
        page = await client.list_executions(
            workflow_id=AGENT_RUN.workflow_id, before=before, limit=PAGE, with_nodes=True, patience=PATIENCE
        )
        for run in page:
            session = run.idempotency_key.rpartition("/")[0]
            latest.setdefault(session, run)
            earliest[session] = run
            if run.status is ExecutionStatus.COMPLETED:
                completed.setdefault(session, run)
        if not page:
            break
        before = page[-1].execution_id
    return [
        await _info(client, session, run, completed.get(session), earliest[session].created_ms)
        for session, run in latest.items()
    ]


async def _info(
    client: NexumClient, session: str, run: Execution, completed: Execution | None, begun_ms: int
) -> SessionInfo:
    events, _, _ = await read_events(client, session)
    begin = next((event for event in reversed(events) if event.kind is Kind.BEGIN), None)
    messages = [event.content["text"] for event in events if event.kind is Kind.MESSAGE]
    replies = [event for event in events if event.kind is Kind.REPLY]
    return SessionInfo(
        session=session,
        question=" / ".join([*(begin.content["task"] if begin else []), *messages]),
        models=tuple(dict.fromkeys(str(event.request.get("model", "?")) for event in replies)),
        status=_status(run, is_finished=end_of(completed, events) is not None),
        calls=Counter(event.kind.value for event in events if event.kind.is_call),
        begun_ms=begun_ms,
    )


async def question_of(client: NexumClient, session: str) -> str | None:
    """What the session was asked; None if it has not begun."""
    events, _, _ = await read_events(client, session)
    begin = next((event for event in reversed(events) if event.kind is Kind.BEGIN), None)
    return None if begin is None else "\n".join(begin.content["task"])


def _status(run: Execution, *, is_finished: bool) -> str:
    """A finished session stays finished, whatever later runs of it have tried."""
    if any(node.status is NodeStatus.RUNNING for node in run.nodes):
        return "running"
    if is_finished:
        return "finished"
    return "interrupted" if run.status is ExecutionStatus.RUNNING else "stopped"


async def fork_session(client: NexumClient, source: str, count: int, session: str, message: str = "") -> list[Event]:
    """Begin a session with the first `count` recorded events of another; they are accepted as recorded.

    `message` is what the user says there. Doing it again changes nothing. Raises InvalidRequest, DriftError if the new
    session has something else on record.
    """
    check_session_id(session)
    if session == source:
        raise InvalidRequest(f"session {source!r} can't be forked onto itself: give the new one another id")
    events, _, _ = await read_events(client, source)
    asked = [event for event in events if event.kind.is_call]
    if not events:
        raise InvalidRequest(f"session {source!r} has nothing on record here; --sessions lists those that have")
    if not 0 <= count <= len(asked):
        raise InvalidRequest(
            f"session {source!r} has {len(asked)} recorded event(s): give 0 to {len(asked)}, not {count}"
        )
    last = asked[count - 1].seq if count else 0
    begin = [event for event in events if event.kind is Kind.BEGIN][-1:]
    kept = [*begin, *(event for event in events if event.seq <= last and event.kind in KEPT)]
    kept.sort(key=lambda event: (event.kind is not Kind.BEGIN, event.seq))
    async with Journal(client, session) as journal:
        for event, there in zip(kept, journal.events, strict=False):
            if (event.address, event.content) != (there.address, there.content):
                raise DriftError(f"session {session} has something else on record than {source}: take another id")
        for event in kept[len(journal.events) :]:
            await journal.add(
                event.kind,
                event.agent,
                event.position,
                event.content,
                event.request,
                failure=event.failure,
                accepted=True,
            )
        if message and not any(
            event.kind is Kind.MESSAGE and event.content["text"] == message for event in journal.events
        ):
            if len(journal.events) > len(kept):
                raise DriftError(f"session {session} went on already, without this message: take another id")
            await journal.add(Kind.MESSAGE, "", f"message/{len(journal.events)}", {"text": message}, {})
        await journal.release()
    return kept
