"""A view that is refreshed. On a terminal it is redrawn in place; elsewhere, only new lines are printed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence

_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
_END_OF_LINE, _END_OF_SCREEN = "\x1b[K", "\x1b[J"


class Screen:
    """The view on standard output. With `in_place`, a new view is drawn over the old one.

    `say` is a function that prints a text and flushes the output.

    Line wrapping is off only during a drawing, and after each drawing the cursor is below the view. So a program that
    is killed leaves a usable terminal.
    """

    def __init__(self, say: Callable[[str], None], *, in_place: bool) -> None:
        self._say = say
        self._in_place = in_place and os.environ.get("TERM") != "dumb"
        self._height = 0
        self._keys: set[str] = set()
        self._notes: set[str] = set()
        self._lines: Sequence[str] = ()
        if self._in_place and sys.platform == "win32":
            os.system("")  # makes the console obey escape sequences

    def show(self, lines: Sequence[str], news: Iterable[tuple[str, str]]) -> None:
        """Show `lines` in place. If that is impossible, print the new texts in `news`, which holds pairs (key, text).

        A text is new if the previous call had no text with its key.
        """
        self._lines = lines
        if self._in_place:
            self._draw(lines)
            return
        before, self._keys = self._keys, set()
        for key, text in news:
            if key not in before:
                self._say(text)
            self._keys.add(key)

    def note(self, text: str) -> None:
        """Show a note: below a view that is redrawn in place, else once on standard error."""
        if self._in_place:
            self._draw(self._lines, text)
        elif text not in self._notes:
            self._notes.add(text)
            print(text, file=sys.stderr, flush=True)

    def _draw(self, lines: Sequence[str], *notes: str) -> None:
        # Leave a line for the cursor, and cut what doesn't fit: if the terminal scrolled, the next view would be drawn
        # at the wrong line.
        shown = [*lines[: max(1, shutil.get_terminal_size().lines - 1 - len(notes))], *notes]
        up = f"\x1b[{self._height}F" if self._height else ""
        self._height = len(shown)
        text = "\n".join(f"{line}{_END_OF_LINE}" for line in shown)
        self._say(f"{up}{_NO_WRAP}{text}{_WRAP}{_END_OF_SCREEN}")
