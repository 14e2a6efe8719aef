"""Sessions from outside: what there is on record, and a new one from the first events of another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from durable_autogen.errors import DriftError
from durable_autogen.journal import AGENT_RUN, PAGE, TAKE_OVER_PATIENCE, Event, Journal, Kind, read_events
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from nexum_engine.model import Execution, ExecutionStatus, NodeStatus
from session_file import check_session_id


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
    before = ""
    while True:
        page = await client.list_executions(
            workflow_id=AGENT_RUN.workflow_id, before=before, limit=PAGE, with_nodes=True, patience=TAKE_OVER_PATIENCE
        )
        for run in page:
            session = run.idempotency_key.rpartition("/")[0]
            latest.setdefault(session, run)
            earliest[session] = run
        if not page:
            break
        before = page[-1].execution_id
    return [await _info(client, session, run, earliest[session].created_ms) for session, run in latest.items()]


async def _info(client: NexumClient, session: str, run: Execution, begun_ms: int) -> SessionInfo:
    events, _ = await read_events(client, session)
    begin = next((event for event in reversed(events) if event.kind is Kind.BEGIN), None)
    messages = [event.content["text"] for event in events if event.kind is Kind.MESSAGE]
    replies = [event for event in events if event.kind is Kind.REPLY]
    return SessionInfo(
        session=session,
        question=" / ".join([*(begin.content["task"] if begin else []), *messages]),
        models=tuple(dict.fromkeys(str(event.request.get("model", "?")) for event in replies)),
        status=_status(run),
        calls=Counter(event.kind.value for event in events if event.kind.is_asked_for),
        begun_ms=begun_ms,
    )


async def question_of(client: NexumClient, session: str) -> str | None:
    """What the session was asked; None if it has not begun."""
    events, _ = await read_events(client, session)
    begin = next((event for event in reversed(events) if event.kind is Kind.BEGIN), None)
    return None if begin is None else "\n".join(begin.content["task"])


def _status(run: Execution) -> str:
    if run.status is ExecutionStatus.COMPLETED:
        return "finished"
    if run.status is not ExecutionStatus.RUNNING:
        return "stopped"
    at_work = any(node.status is NodeStatus.RUNNING for node in run.nodes)
    return "running" if at_work else "interrupted"


async def fork_session(client: NexumClient, source: str, count: int, session: str, message: str = "") -> list[Event]:
    """Begin a session with the first `count` recorded events of another; they are accepted as recorded.

    `message` is what the user says there. Doing it again changes nothing. Raises InvalidRequest, DriftError if the new
    session has something else on record.
    """
    check_session_id(session)
    events, _ = await read_events(client, source)
    own = [event for event in events if not event.kind.is_asked_for and event.kind is not Kind.BRANCH]
    asked = [event for event in events if event.kind.is_asked_for]
    if not events:
        raise InvalidRequest(f"session {source!r} has nothing on record here; --sessions lists those that have")
    if not 0 <= count <= len(asked):
        raise InvalidRequest(
            f"session {source!r} has {len(asked)} recorded event(s): give 0 to {len(asked)}, not {count}"
        )
    last = asked[count - 1].seq if count else 0
    begin = [event for event in own if event.kind is Kind.BEGIN][-1:]
    kept = [*begin, *(event for event in own if event.kind is Kind.MESSAGE and event.seq <= last), *asked[:count]]
    kept.sort(key=lambda event: (event.kind is not Kind.BEGIN, event.seq))
    async with Journal(client, session) as journal:
        for event, there in zip(kept, journal.events, strict=False):
            if (event.address, event.content) != (there.address, there.content):
                raise DriftError(f"session {session} has something else on record than {source}: take another id")
        for event in kept[len(journal.events) :]:
            await journal.add(event.kind, event.agent, event.position, event.content, event.request, accepted=True)
        if message and not any(
            event.kind is Kind.MESSAGE and event.content["text"] == message for event in journal.events
        ):
            if len(journal.events) > len(kept):
                raise DriftError(f"session {session} went on already, without this message: take another id")
            await journal.add(Kind.MESSAGE, "", f"message/{len(journal.events)}", {"text": message}, {})
        await journal.release()
    return kept
