"""Events that are sent to a session from outside, and kept on the server until the session waits for them.

In a session, the sent events of one name have the numbers 1, 2, 3, ... Each sent event is an execution with one EVENT
node. The execution's key is made of session, name and number. The sender or the waiting session starts the execution,
whichever comes first.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from durable_autogen.record.events import SERVER_PATIENCE, Frozen, check_session_id
from nexum_engine import jsontext
from nexum_engine.client import NexumClient, Started
from nexum_engine.errors import Conflict, IdempotencyConflict, InvalidRequest, ServerUnavailable, perhaps_sent
from nexum_engine.records import ExecutionStatus
from nexum_engine.workflow import workflow

MAX_EVENT_BYTES = 1024 * 1024
"""The size limit of a payload as JSON text, in bytes of UTF-8."""

_EVENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}")


class SentEventInput(Frozen):
    """The input of a sent event's execution."""

    session: str
    name: str
    number: int


SENT_EVENT = workflow("agent-sent-event", input=SentEventInput).event("event", "event").build()


def check_event_name(name: str) -> str:
    """Return the name of a sent event. Raises InvalidRequest if it isn't valid."""
    if not isinstance(name, str) or not _EVENT_NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is not an event's name: use a text of up to 100 letters, digits, and - _ . : beginning with a "
            "letter or digit"
        )
    return name


async def expect(client: NexumClient, session: str, name: str, number: int, *, patience: float) -> Started:
    """Start or find the execution of event `name` with this number. The execution completes when the event is sent."""
    input = SentEventInput(session=session, name=name, number=number)
    key = f"{session}/{name}/{number}"
    return await client.start_execution(SENT_EVENT, input, idempotency_key=key, register=True, patience=patience)


async def send(
    client: NexumClient,
    session: str,
    name: str,
    payload: object = None,
    *,
    idempotency_key: str = "",
) -> None:
    """Send an event to a session. The session's next wait for an event of this name receives the payload.

    If an event of this name was sent with the same `idempotency_key` before, nothing is sent. Raises InvalidRequest for
    a wrong name or payload, and IdempotencyConflict if the key was used with another payload. Raises ServerUnavailable
    if no server answers: without `idempotency_key`, the error has the key that the event may have been sent with.
    """
    check_session_id(session)
    check_event_name(name)
    jsontext.check_size(jsontext.dump(payload, "the payload"), "the payload", max_bytes=MAX_EVENT_BYTES)
    # With a key, begin at the oldest event. If an event was sent with this key before, the execution of that event
    # accepts the key again, and no second event is sent.
    number = await _first_number(client, session, name, is_oldest=bool(idempotency_key))
    # A key lets the client retry the call if the server's answer is lost.
    key = idempotency_key or uuid.uuid4().hex
    while True:
        expected = await expect(client, session, name, number, patience=SERVER_PATIENCE)
        try:
            await client.send_event(
                expected.execution_id, "event", payload, idempotency_key=key, patience=SERVER_PATIENCE
            )
        except IdempotencyConflict:
            raise
        except ServerUnavailable as error:
            if idempotency_key:
                raise
            raise perhaps_sent(error, key) from error
        except Conflict:
            # The execution has ended. If it was COMPLETED when `expect` found it, another event has this number: take
            # the next number. If it was still running then, try this number again: the execution may have been
            # cancelled since.
            number += expected.status is ExecutionStatus.COMPLETED
        else:
            return


async def _first_number(client: NexumClient, session: str, name: str, *, is_oldest: bool) -> int:
    """Return the number of the session's oldest or newest event `name` on the server; 1 if the server has none."""
    query: dict[str, Any] = {
        "workflow_id": SENT_EVENT.workflow_id,
        "key_prefix": f"{session}/{name}/",
        "patience": SERVER_PATIENCE,
    }
    if is_oldest:
        found = [one async for one in client.all_executions(**query)]
    else:
        found = await client.list_executions(**query, limit=1)
    return int(found[-1].idempotency_key.rpartition("/")[2]) if found else 1
