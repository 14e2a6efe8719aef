"""Sessions from outside: what there is on record, and a new one from the first events of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from console import say
from durable_autogen.errors import DriftError
from durable_autogen.events import AGENT_RUN, PAGE, PATIENCE, Event, Kind, end_of, read_events
from durable_autogen.journal import Journal
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from nexum_engine.model import Execution, ExecutionStatus, NodeStatus
from session_file import check_session_id

KEPT = (Kind.REPLY, Kind.TOOL, Kind.INPUT, Kind.TURN, Kind.STOP, Kind.MESSAGE)  # by a fork


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


async def fork_session(
    client: NexumClient,
    source: str,
    count: int,
    session: str,
    message: str = "",
    *,
    tell: Callable[[str], None] = say,
) -> list[Event]:
    """Begin a session with the first `count` recorded events of another; they are accepted as recorded.

    `message` is what the user says there, and `tell` gets what a person should know. Doing it again changes nothing.
    Raises InvalidRequest, DriftError if the new session has something else on record.
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
    async with Journal(client, session, tell) as journal:
        copied = [event for event in journal.events if event.accepted]
        added = [event for event in journal.events if event.kind is Kind.MESSAGE and not event.accepted]
        went_on = len(journal.events) > len(copied) + len(added)
        # What it made of them since may have left some of them behind.
        left_some = journal.epoch > 0 or any(event.kind is Kind.REVOKE for event in journal.events)
        if left_some:
            is_same = _is_within(copied, kept) and bool(copied or added)
        else:
            is_same = _identities(copied) == _identities(kept if went_on or added else kept[: len(copied)])
        if not is_same:
            raise DriftError(f"session {session} has something else on record than {source}: take another id")
        if not went_on and not added:
            for event in kept[len(copied) :]:
                await journal.add_copy(event)
        if message and not any(event.content["text"] == message for event in added):
            if went_on or added:
                raise DriftError(f"session {session} went on already, without this message: take another id")
            await journal.add_message(message)
        await journal.release()
    return kept


def _identities(events: Sequence[Event]) -> list[tuple[str, Any]]:
    return [(event.address, event.content) for event in events]


def _is_within(some: Sequence[Event], events: Sequence[Event]) -> bool:
    """Whether these are among the events, in the same order."""
    ahead = iter(_identities(events))
    return all(one in ahead for one in _identities(some))
