"""Recording of `input()`: the lines that a person types at the console.

`input()` isn't asynchronous, so it can't wait for the server. A typed line is recorded before the session's next call,
or at the session's end. A replay returns the recorded line at once, without waiting for earlier events.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from durable_autogen.record.events import Call, Kind, Returned
from durable_autogen.record.place import at, current, has_ended
from durable_autogen.record.recorder import Recorder
from durable_autogen.record.surrogates import representable
from durable_autogen.record.while_open import while_open


@while_open
def recorded_console() -> Iterator[None]:
    """Record `input()` inside sessions."""
    original = builtins.input
    builtins.input = functools.wraps(original)(lambda prompt="", /: _input(original, prompt))
    try:
        yield
    finally:
        builtins.input = original


def _input(original: Callable[[Any], str], prompt: Any) -> str:
    place = current.get()
    if place is None or place.in_call:
        return original(prompt)
    if place.session.is_over:
        raise has_ended(place.session)
    recorder: Recorder = place.session.recorder
    position = f"console/{recorder.next_question(place.agent)}"
    call = Call(Kind.CONSOLE, place.agent, position, {"prompt": representable(str(prompt))})
    recorded = recorder.typed_before(call)
    if recorded is not None:
        # Print the prompt. On a terminal, print the line, too: a terminal echoes what a person types.
        sys.stdout.write(f"{prompt}{recorded}\n" if sys.stdin.isatty() else str(prompt))
        sys.stdout.flush()
        return recorded
    with at(replace(place, in_call=True)):
        typed = original(prompt)
    recorder.typed(call, Returned(value=representable(typed)))
    return typed
