"""Comparison of a recorded call with the program's call, by their fingerprints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from durable_autogen.autogen.fingerprints import EXCERPT, excerpt
from durable_autogen.record.events import Call, Event

Fingerprint = Mapping[str, Any]


def differences(recorded: Event, now: Call, find: Callable[[str], Event | None]) -> list[str]:
    """Return a line for each difference between a recorded event and the call `now`.

    This is where a replay compares each call. `find` returns the recorded event of an address.
    """
    if recorded.kind is not now.kind:
        return [f"it was a {recorded.kind.value}, now it is a {now.kind.value}"]
    if recorded.unnumbered_hash == now.unnumbered_hash:
        return []
    current = now.request if now.whole_request is None else now.whole_request()
    return fingerprint_differences(_whole(recorded, find), current)


def _whole(event: Event, find: Callable[[str], Event | None]) -> Fingerprint:
    """Return the whole fingerprint of `event`: its new parts, and the other parts from earlier requests."""
    chain = [event]
    while (base := chain[-1].request.get("base")) is not None:
        earlier = find(f"{event.agent}/{base}")
        if earlier is None or earlier in chain:
            break
        chain.append(earlier)
    whole: dict[str, Any] = {}
    for one in reversed(chain):
        messages = [*whole.get("messages", ())[: one.request.get("same", 0)], *one.request.get("messages", ())]
        whole = {**whole, **one.request, "messages": messages}
    return whole


def fingerprint_differences(recorded: Fingerprint, now: Fingerprint) -> list[str]:
    """Return a line for each difference between two whole fingerprints."""
    if recorded.get("hash") == now.get("hash"):
        return []
    found = [
        *_texts("the system message", recorded.get("system"), now.get("system")),
        *_tools(recorded.get("tools") or {}, now.get("tools") or {}),
        *_values("the model", recorded.get("model"), now.get("model")),
        *_options(recorded.get("options") or {}, now.get("options") or {}),
        *_messages(recorded.get("messages") or [], now.get("messages") or []),
        *_texts("the question", recorded.get("task"), now.get("task")),
        *_values("the text", recorded.get("said"), now.get("said")),
    ]
    names = ("tool", "workbench", "memory", "method", "arguments", "team", "prompt", "query", "code", "event")
    for name in names:
        found += _values(f"the {name}", recorded.get(name), now.get(name))
    return found or ["a part differs that is recorded only as a hash"]


def _values(what: str, recorded: object, now: object) -> list[str]:
    was, is_now = ("were", "they are") if what.endswith("s") else ("was", "it is")
    return [] if recorded == now else [f"{what} {was} {_shown(recorded)}, now {is_now} {_shown(now)}"]


def _shown(value: object) -> str:
    return "none" if value in (None, [], {}) else excerpt(value if isinstance(value, str) else json.dumps(value))


def _texts(what: str, recorded: Sequence[str] | None, now: Sequence[str] | None) -> list[str]:
    if recorded == now:
        return []
    one, other = "\n".join(recorded or ()), "\n".join(now or ())
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(0, at - EXCERPT // 4)
    lead = "..." if begin else ""
    was, is_now = (f"{lead}{excerpt(text[begin:])}" if text else "none" for text in (one, other))
    return [f"{what} was {was!r}, now it is {is_now!r} (they differ from character {at + 1})"]


def _tools(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    parts = [
        *(f"{name} is gone" for name in recorded if name not in now),
        *(f"{name} is new" for name in now if name not in recorded),
        *(
            f"{name} has another description or other parameters"
            for name in now
            if recorded.get(name, now[name]) != now[name]
        ),
    ]
    if not parts and list(recorded) != list(now):
        parts = [f"their order was {', '.join(recorded)}, now it is {', '.join(now)}"]
    return [f"the tools: {'; '.join(parts)}"] if parts else []


def _options(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = sorted({*recorded, *now})
    return [line for name in names for line in _values(f"the option {name}", recorded.get(name), now.get(name))]


def _messages(recorded: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]) -> list[str]:
    for number, (one, other) in enumerate(zip(recorded, now, strict=False), 1):
        if one["hash"] != other["hash"]:
            was, is_now = (f"{message['text']!r} ({message['from']})" for message in (one, other))
            what = f"it was {was}, now it is {is_now}"
            if was == is_now:  # only the beginning of a message is recorded
                what = f"it begins with {was} as before, but differs after that"
            return [f"the messages, from number {number} on: {what}"]
    if len(recorded) != len(now):
        return [f"the messages: there were {len(recorded)}, now there are {len(now)}"]
    return []
