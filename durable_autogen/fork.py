"""Fork a session: begin a new one with copies of another session's first calls."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence, Set
from typing import Any, Literal, get_args

from durable_autogen.errors import DriftError
from durable_autogen.record.effects import (
    EFFECT,
    TOOL_EFFECT,
    Effect,
    Effects,
    effects_prefix,
    has_not_happened,
    read_effects,
    reuse_prefix,
    with_attempts,
)
from durable_autogen.record.events import (
    Event,
    Kind,
    Record,
    Revoked,
    Said,
    check_session_id,
    read_record,
)
from durable_autogen.record.journal import Journal
from durable_autogen.record.log import log_for
from durable_autogen.record.storable import representable
from durable_autogen.recorded_sessions import has_begun, unknown_session, while_pruning
from nexum_engine import jsontext
from nexum_engine.approvals import how_to_resolve
from nexum_engine.client import NexumClient
from nexum_engine.connection import OUTAGE_PATIENCE
from nexum_engine.errors import InvalidRequest
from nexum_engine.records import Execution, ExecutionStatus, NodeStatus

OnEffects = Literal["refuse", "reuse", "again"]
SHOWN_INPUT = 200  # characters of the input of a worker's call in a message


def fork_source(text: str) -> tuple[str, int]:
    """Return SESSION and N of the text `SESSION@N`. Raises InvalidRequest for any other text."""
    session, _, count = text.rpartition("@")
    if not session or not count.isdecimal() or len(count) > 9:
        raise InvalidRequest(f"{text!r} must be SESSION@N, for example demo1@2")
    return check_session_id(session), int(count)


async def fork_session(
    client: NexumClient,
    source: str,
    count: int,
    session: str,
    message: str = "",
    *,
    effects: OnEffects = "refuse",
    tell: Callable[[str], None] | None = None,
) -> list[Event]:
    """Begin `session` with the first `count` recorded calls of the session `source`; return the copied events.

    The copied events are accepted: a replay doesn't compare them with what the program asks for. `message` is a user
    message to add after the copied events. `effects` says what to do if, after the copied events, the source
    made calls whose effect must happen only once: "refuse" to fork, "reuse" their results if the fork makes equal
    calls, or make such calls "again". `tell` is called with each line about progress. Without `tell`, the logger
    `durable_autogen` logs these lines. A second fork with equal arguments changes nothing. Raises InvalidRequest for a
    wrong argument, and DriftError if `session` has other events on record.
    """
    check_session_id(session)
    if effects not in get_args(OnEffects):
        raise InvalidRequest(f"effects is {effects!r}: give one of {', '.join(get_args(OnEffects))}")
    if session == source:
        raise InvalidRequest(f"session {source!r} can't be forked into itself: give the new session another id")
    message = str(representable(message))
    copied, reused = await while_pruning(lambda: _forked(client, source, count, effects))
    async with Journal(client, session, log_for(tell)) as journal:
        is_new = await _copy(journal, source, copied, message)
        if reused and is_new:
            await _record_reusable(journal, reused)
    return copied


async def _forked(client: NexumClient, source: str, count: int, effects: OnEffects) -> tuple[list[Event], list[Effect]]:
    """Return the events that a fork copies, and the effects that it may reuse. Raises InvalidRequest."""
    record = await read_record(client, source)
    copied = _first_events(record, source, count)
    if effects == "again":
        return copied, []
    later = await _later_effects(client, source, record, copied)
    of_workers = await _effects_of_workers(client, source, record, copied)
    if not await has_begun(client, source):  # the session was pruned before its effects were read
        raise unknown_session(source)
    if effects == "refuse":
        _refuse(source, count, later, of_workers)
        return copied, []
    return copied, _reusable(source, later, of_workers, client.servers)


def _first_events(record: Record, source: str, count: int) -> list[Event]:
    """Return the events of a session that a fork with its first `count` calls copies."""
    calls = [event for event in record.events if event.kind.is_call]
    if not record.events:
        raise unknown_session(source)
    if not 0 <= count <= len(calls):
        raise InvalidRequest(
            f"session {source!r} has {len(calls)} recorded call(s): give 0 to {len(calls)}, not {count}"
        )
    last = calls[count - 1].seq if count else 0
    copied = [event for event in record.events if event.seq <= last and event.kind not in (Kind.BEGIN, Kind.REVOKE)]
    return copied if record.beginning is None else [record.beginning, *copied]


async def _copy(journal: Journal, source: str, events: Sequence[Event], message: str) -> bool:
    """Record the copies and the message of a fork, as far as an earlier fork with equal arguments has not done so.

    Return False if the new session has already continued. Raises DriftError if it was not forked with these arguments.
    """
    session = journal.session
    copied = [event for event in journal.events if event.accepted]
    added = [event for event in journal.events if event.kind is Kind.MESSAGE and not event.accepted]
    continued = len(journal.events) > len(copied) + len(added)
    if any(isinstance(event.content, Revoked) for event in journal.events):
        # Don't expect all copied events: an earlier run of the new session may have revoked some of them.
        is_same = _is_within(copied, events) and bool(copied or added)
    else:
        is_same = _identities(copied) == _identities(events if continued or added else events[: len(copied)])
    if not is_same:
        raise DriftError(f"session {session} has recorded other events than {source}: give the new session another id")
    if not continued and not added:
        for event in events[len(copied) :]:
            await journal.add_copy(event)
    if message and not any(isinstance(event.content, Said) and event.content.text == message for event in added):
        if continued or added:
            raise DriftError(
                f"session {session} has already continued without this message: give the new session another id"
            )
        await journal.add_message(message)
    return not continued


async def _later_effects(client: NexumClient, source: str, record: Record, copied: Sequence[Event]) -> list[Effect]:
    """Return the effects that a session has begun after the events that a fork copies."""
    later = []
    for input, found in await _unused(client, source, {record.scope_of(event.address) for event in copied}):
        execution = found if found.status.ended else await with_attempts(client, found)
        if not has_not_happened(execution):
            later.append((input, execution))
    return later


def _refuse(source: str, count: int, later: Sequence[Effect], of_workers: Sequence[Execution]) -> None:
    """Raise InvalidRequest if there is a later effect, even a failed one: it may have happened before the error."""
    made = [(str(input), one) for input, one in later] + [(_in_words(one), one) for one in of_workers]
    if not made:
        return
    failed = (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED)
    listed = ", ".join(f"{call}{' (failed)' if one.status in failed else ''}" for call, one in made)
    reuse = "" if of_workers else "Reuse their results (--effects reuse), or make "
    raise InvalidRequest(
        f"after call {count}, session {source} has made {len(made)} call(s) whose effect must happen only once: "
        f"{listed}. {reuse or 'Make '}the calls again (--effects again)"
    )


def _reusable(source: str, later: Sequence[Effect], of_workers: Sequence[Execution], nexum: str) -> list[Effect]:
    """Return the later effects that have a result. Raises InvalidRequest if one has not ended, or is a worker's."""
    if of_workers:
        raise InvalidRequest(
            f"the result of a worker's call can't be reused: {_in_words(of_workers[0])}. Fork after this call, or make "
            "the call again (--effects again)"
        )
    for input, execution in later:
        if not execution.status.ended:
            (node,) = execution.nodes
            is_unknown = node.status is NodeStatus.WAITING
            raise InvalidRequest(
                f"a call of session {source} has no result to reuse: {input} may or may not have happened. "
                + (
                    how_to_resolve(execution.execution_id, node.attempts[-1].attempt, nexum)
                    if is_unknown
                    else "Let the session continue first"
                )
            )
    return [(input, execution) for input, execution in later if execution.status is ExecutionStatus.COMPLETED]


async def _unused(client: NexumClient, source: str, before: Set[str]) -> list[Effect]:
    """Return a session's effects, except those of the calls in `before`.

    If the session is itself a fork that may reuse results, include these results, except those that the calls in
    `before` have reused. If a later call has reused a result, include the result only once.
    """
    reusable: defaultdict[str, list[Effect]] = defaultdict(list)
    for input, execution in await read_effects(client, reuse_prefix(source)):
        reusable[input.digest].append((input, execution))
    later = []
    own = await read_effects(client, effects_prefix(source))
    for input, execution in sorted(own, key=lambda one: one[0].call not in before):  # the calls in `before` come first
        left = reusable[input.digest]
        result = left.pop(0) if left else (input, execution)
        if input.call not in before:
            later.append(result)
    return [*later, *(one for left in reusable.values() for one in left)]


async def _effects_of_workers(
    client: NexumClient, source: str, record: Record, copied: Sequence[Event]
) -> list[Execution]:
    """Return the executions that workers ran for a session's calls, and whose effect must happen only once.

    Leave out the executions whose keys contain the id of a copied call.
    """
    calls = [record.call_id_of(source, event) for event in copied if event.kind is Kind.TOOL]
    found = [
        one
        for separator in ":/"  # what follows the session in a key of submit_task.py, and in a call's id
        async for one in client.all_executions(
            key_prefix=f"{source}{separator}", with_nodes=True, patience=OUTAGE_PATIENCE
        )
        if any(node.once for node in one.nodes)
        and one.workflow_id != TOOL_EFFECT.workflow_id
        and not any(_contains_id(one.idempotency_key, call) for call in calls)
    ]
    return sorted(found, key=lambda one: one.created_ms)


def _contains_id(key: str, call: str) -> bool:
    """Return whether the key of a worker's execution contains this call id."""
    return f":{call}:" in f":{key}:" or f"/{call}/" in key


def _in_words(execution: Execution) -> str:
    return f"{execution.workflow_id} {textwrap.shorten(execution.input_json, SHOWN_INPUT)} ({execution.execution_id})"


async def _record_reusable(journal: Journal, later: Sequence[Effect]) -> None:
    """Record the results of another session's effects, so that the journal's session may reuse them."""
    recorded = await read_effects(journal.client, reuse_prefix(journal.session))
    taken = {execution.idempotency_key for _, execution in recorded}
    numbers: Counter[str] = Counter()
    for input, execution in later:
        numbers[input.digest] += 1
        key = f"{reuse_prefix(journal.session, input.digest)}/{numbers[input.digest]}"
        if key not in taken:
            output = jsontext.parse(execution.outputs()[EFFECT], "the result")
            await Effects(journal).record(input, output, key)


def _identities(events: Sequence[Event]) -> list[tuple[str, Any]]:
    return [(event.address, event.content) for event in events]


def _is_within(some: Sequence[Event], events: Sequence[Event]) -> bool:
    """Return whether all of `some` are among `events`, in the order of `some`."""
    ahead = iter(_identities(events))
    return all(one in ahead for one in _identities(some))
