"""Reports of sessions and their events, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from durable_autogen.autogen.fingerprints import excerpt
from durable_autogen.autogen.values import without_classes
from durable_autogen.record.events import (
    Begun,
    Event,
    GivenUp,
    Kind,
    Mark,
    Raised,
    Received,
    Returned,
    Revoked,
    Said,
    TimedOut,
    Waiting,
)
from durable_autogen.record.log import at_time
from durable_autogen.record.storable import decoded
from durable_autogen.recorded_sessions import SessionInfo, ShownSession
from nexum_engine.report import age, printable

CONTENT_WIDTH = 100  # characters; the content of an event is cut if it is longer
NAME_WIDTHS = (32, 48)  # the smallest and the largest width of the column of names; a longer name is not cut


def table(sessions: Sequence[SessionInfo], now: float) -> str:
    """Return a text with two or three lines for each session, and one for each of its waits, the latest session first.

    `now` is in seconds since 1970.
    """
    if not sessions:
        return "no session is on record here"
    return "\n".join(line for one in sessions for line in _summary(one, now))


def _summary(one: SessionInfo, now: float) -> Iterator[str]:
    calls = f"{one.calls['reply']} model call(s), {one.calls['tool']} tool call(s)"
    yield f"{one.session:<22} {one.status:<12} {calls}, begun {age(round(now * 1000) - one.begun_ms)}"
    if one.question:
        yield f"    {_excerpt(one.question)}"
    yield f"    {printable(', '.join(one.models)) or 'no model has answered yet'}"
    for wait in one.waits:
        yield f"    {wait.agent or 'the program'} {_words(wait)} (began {age(round(now * 1000) - wait.recorded_ms)})"
    for question in one.questions:
        yield f"    {printable(question)}"


def details(shown: ShownSession, now: float) -> str:
    """Return a text with a line for each event of a session. A call's line begins with the N of `fork SESSION@N`."""
    lines = [*_summary(shown.info, now), ""]
    names = [printable(event.title) for event in shown.events]
    smallest, largest = NAME_WIDTHS
    width = min(max([smallest, *map(len, names)]), largest)
    number = 0
    for event, name in zip(shown.events, names, strict=True):
        number += event.kind.is_call
        lines.append(f"{number if event.kind.is_call else '':>4}  {name:<{width}}  {_excerpt(_words(event))}".rstrip())
    return "\n".join(lines)


def sessions_as_json(sessions: Sequence[SessionInfo]) -> str:
    """Return the sessions as a JSON list."""
    return json.dumps([_session(one) for one in sessions], indent=2)


def events_as_json(shown: ShownSession) -> str:
    """Return a session with all of its events as JSON."""
    events = [{"name": str(event), **event.model_dump(mode="json")} for event in shown.events]
    return json.dumps({**_session(shown.info), "events": events}, indent=2)


def _session(one: SessionInfo) -> dict[str, Any]:
    return {
        "session": one.session,
        "status": one.status,
        "question": one.question,
        "models": list(one.models),
        "calls": dict(one.calls),
        "begun_ms": one.begun_ms,
        "waits": [
            {
                "agent": wait.agent,
                "since_ms": wait.recorded_ms,
                **wait.content.model_dump(mode="json", exclude={"type"}),
            }
            for wait in one.waits
        ],
        "questions": list(one.questions),
    }


def _words(event: Event) -> str:
    match event.content:
        case Begun(task=task):
            return " / ".join(task)
        case Said(text=text):
            return text
        case Raised(failure=failure):
            return f"failed: {failure.text}"
        case Revoked(seqs=seqs):
            return f"{len(seqs)} event(s) dropped"
        case GivenUp():
            return "given up by the program"
        case Waiting(event="", until_ms=int(until)):
            return f"sleeps until {at_time(until)}"
        case Waiting(event=name, until_ms=until):
            return f"waits for event {name!r}" + ("" if until is None else f" until {at_time(until)}")
        case Received(event=name, payload=payload):
            return f"{name!r}: {json.dumps(decoded(payload), ensure_ascii=False)}"
        case TimedOut():
            return "no event came in time"
        case Mark() if event.kind is Kind.SLEEP:
            return "it is over"
        case Returned(value=value):
            return _value(without_classes(decoded(value)))
        case _:
            return str(event.request.get("said", ""))


def _value(value: Any) -> str:
    """Return a recorded value as text: a reply's text or tool calls, a tool's text, or any other value as JSON."""
    match value:
        case {"content": content, "usage": _}:
            return _content(content)
        case {"type": "ToolResult", "result": [{"type": "TextResultContent", "content": text}], "is_error": is_error}:
            return f"error: {text}" if is_error else str(text)
        case _:
            return _content(value)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(one, dict) and "arguments" in one for one in content):
        return "calls " + ", ".join(f"{one.get('name')} {one['arguments']}" for one in content)
    return "" if content is None else json.dumps(content, ensure_ascii=False, default=str)


def _excerpt(text: str) -> str:
    return printable(excerpt(text, CONTENT_WIDTH))
