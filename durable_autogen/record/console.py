"""Recording of `input()`: the lines that a person types at the console.

`input()` isn't asynchronous, so it can't wait for the server. A typed line is recorded before the session's next call,
or at the session's end. A replay returns the recorded line at once, without waiting for earlier events.

If standard input is a file or a pipe, as in `script < answers`, a re-run gets all answers again. So a replayed answer
is skipped there. Otherwise the next question would get an old answer.
"""

from __future__ import annotations

import builtins
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from durable_autogen.record.events import Call, Kind, Returned
from durable_autogen.record.place import at, current, late_call
from durable_autogen.record.recorder import Recorder
from durable_autogen.record.storable import representable
from durable_autogen.record.while_open import replaced, while_open


@while_open
def recorded_console() -> Iterator[None]:
    """Record `input()` inside sessions."""
    with replaced(builtins, "input", lambda original: lambda prompt="", /: _input(original, prompt)):
        yield


def _input(original: Callable[[Any], str], prompt: Any) -> str:
    place = current.get()
    if place is None or place.in_call:
        return original(prompt)
    if place.session.is_over:
        raise late_call(place.session)
    recorder: Recorder = place.session.recorder
    position = recorder.next_position(place.agent, "console")
    call = Call(Kind.CONSOLE, place.agent, position, {"prompt": representable(str(prompt))})
    recorded = recorder.typed_before(call)
    if recorded is not None:
        # Print the prompt. On a terminal, print the line, too: a terminal echoes what a person types.
        sys.stdout.write(f"{prompt}{recorded}\n" if sys.stdin.isatty() else str(prompt))
        sys.stdout.flush()
        skip_answer(recorded)
        return recorded
    with at(replace(place, in_call=True)):
        typed = original(prompt)
    recorder.typed(call, Returned(value=representable(typed)))
    return typed


def skip_answer(answer: str) -> None:
    """Read a replayed answer from standard input, if the answer is the next line that already waits there.

    Leave any other line. It may be a new answer, from a program that knows which questions are answered.
    """
    with suppress(AttributeError, OSError, ValueError):  # a closed standard input, or one that is no file or pipe
        if sys.stdin.isatty():
            return
        line = ""
        while not line.endswith("\n") and (waiting := _peek()):
            part = waiting[: waiting.find(b"\n") + 1] or waiting
            line += part.decode(sys.stdin.encoding, "replace")
            # A line may reach beyond what waits. Then compare its beginning.
            if line.strip() != answer.strip()[: None if line.endswith("\n") else len(line.strip())]:
                return
            sys.stdin.buffer.read(len(part))


def _peek() -> bytes:
    """Return what waits in standard input, without reading it, and without waiting for more."""
    buffer: Any = sys.stdin.buffer
    descriptor = buffer.fileno()
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return bytes(buffer.peek())
    waiting = b""  # on Windows, Python before 3.12 can't read from a pipe without waiting for more
    if sys.platform != "win32" or sys.version_info >= (3, 12):
        was_blocking = os.get_blocking(descriptor)
        os.set_blocking(descriptor, False)
        try:
            waiting = bytes(buffer.peek())
        finally:
            os.set_blocking(descriptor, was_blocking)
    return waiting
