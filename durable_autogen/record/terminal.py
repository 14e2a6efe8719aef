"""Questions to the person at the terminal: may this tool call be made?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import threading

from nexum_engine.event_loop import call_in

PROMPT = "approve it? Type yes, or no, or no and a reason, such as: no, too expensive"
_YES = re.compile("y|yes", re.IGNORECASE)
_NO = re.compile(r"(?:n|no)(?:[\s,.:;-]+(.*))?", re.IGNORECASE | re.DOTALL)
MAX_REPEATED = 40  # characters of an unclear answer


class Terminal:
    """The terminal of this process. It asks one question at a time."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._reading: asyncio.Future[str] | None = None
        """The line that a thread is reading or has read. None if no thread was started, or if its line was used.

        The thread can't be stopped. If its question is decided elsewhere, it keeps reading for the next question.
        """

    @staticmethod
    def is_there() -> bool:
        """Return whether a person can be asked here."""
        return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))

    async def ask(self, question: str) -> tuple[bool, str] | None:
        """Ask the person; return whether the call may be made, and a reason. Return None at the end of the input."""
        async with self._one_at_a_time:
            self._forget_earlier_lines()
            print(f"[Nexum] {question}", file=sys.stderr)
            while True:
                # End the line, so that the next line of a log doesn't run into the question.
                print(f"[Nexum] {PROMPT}", file=sys.stderr, flush=True)
                line = await self._line()
                if not line:
                    return None
                said = line.strip()
                if _YES.fullmatch(said):
                    return True, ""
                if (no := _NO.fullmatch(said)) is not None:
                    return False, no[1] or ""
                if said:
                    print(f"[Nexum] {said[:MAX_REPEATED]!r} is neither yes nor no", file=sys.stderr)

    def _forget_earlier_lines(self) -> None:
        """Drop what was typed before the question is shown: a "yes" to another question must not approve this one."""
        if self._reading is not None and self._reading.done():
            self._reading = None
        if sys.platform == "win32":
            import msvcrt

            while msvcrt.kbhit():
                msvcrt.getwch()
        else:
            import termios

            with contextlib.suppress(termios.error):  # the input isn't a terminal any more
                termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)

    async def _line(self) -> str:
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_future()
            # Use a daemon thread: a read from a terminal can't be stopped, and must not keep the process alive.
            threading.Thread(target=_read, args=(self._reading, asyncio.get_running_loop()), daemon=True).start()
        line = await asyncio.shield(self._reading)
        self._reading = None
        return line


def _read(line: asyncio.Future[str], loop: asyncio.AbstractEventLoop) -> None:
    try:
        # Don't read with sys.stdin: its lock would block the end of the process. And its encoding isn't the terminal's:
        # on Windows, it reads without an encoding, as UTF-16.
        descriptor = sys.stdin.fileno()
        text = os.read(descriptor, 65536).decode(os.device_encoding(descriptor) or "utf-8", "replace")
    except OSError:
        text = ""

    def set_line() -> None:
        if not line.done():
            line.set_result(text)

    call_in(loop, set_line)
