"""Build the paragraphs of a seen page: runs of text with emphasis, links, pictures and line breaks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from support.tools.web.html.places import Mark, Place

if TYPE_CHECKING:
    from bs4 import Tag

_SPACE = re.compile("[ \t\r\n\f\v\x1c-\x1f\x85\u00a0\u2007\u2028\u2029\u202f]+")
_MARKUP_AT_START = re.compile(r"(?:#{1,6}|[-+*])(?: |$)|>|```|~~~")


class Paragraphs:
    """The open paragraph of a page. `new_element` makes an element from its name.

    `length` is the number of characters of the page's text so far.
    """

    def __init__(self, new_element: Callable[[str], Tag]) -> None:
        self.length = 0
        self._new_element = new_element
        self._run: Tag | None = None  # the paragraph to which text is added
        self._open: list[tuple[Mark, Tag]] = []  # the open inline elements of the paragraph `_run`
        self._linked: set[Mark] = set()  # the links that have words
        self._text: list[str] = []
        self._text_place: Place | None = None
        self._after_blank = True
        self._at_line_start = True

    def add_words(self, text: str, place: Place) -> None:
        text = _SPACE.sub(" ", text)
        if self._after_blank:
            text = text.lstrip(" ")
        if not text:
            return
        if self._text_place is not None and self._text_place.marks != place.marks:
            self.flush()
        self._text.append(text)
        self._text_place = place
        self._after_blank = text.endswith(" ")
        self.length += len(text.strip())

    def flush(self) -> None:
        """Add the collected text to the tree."""
        if self._text_place is None:
            return
        text, place = "".join(self._text), self._text_place
        self._text, self._text_place = [], None
        target = self.target(place, text)
        if self._at_line_start and target.name in ("p", "li", "dd") and _MARKUP_AT_START.match(text):
            text = f"\\{text}"  # without the backslash the text would become a heading, a list or a quote
        if text.strip():
            self._at_line_start = False
        target.append(text)

    def target(self, place: Place, text: str) -> Tag:
        """Return the element to which the next text or inline element is added.

        If needed, open a paragraph and the inline elements of the place first.
        """
        if self._run is None:
            self._run = place.container
            bare = place.in_line or (place.container.name in ("li", "dd", "cell") and not place.container.contents)
            if not bare:
                self._run = self.new("p", place.container)
            self._open = []
        kept = 0
        for (mark, _), wanted in zip(self._open, place.marks, strict=False):
            if mark is not wanted:
                break
            kept += 1
        del self._open[kept:]
        target = self._open[-1][1] if self._open else self._run
        for mark in place.marks[kept:]:
            if mark.name == "a":
                if mark in self._linked:
                    continue
                if text.strip():
                    self._linked.add(mark)
            target = self.new(mark.name, target, **({"href": mark.address} if mark.address else {}))
            self._open.append((mark, target))
        return target

    def new(self, name: str, parent: Tag, **attributes: str) -> Tag:
        element = self._new_element(name)
        element.attrs.update(attributes)
        parent.append(element)
        return element

    def end(self, place: Place) -> None:
        """End the paragraph."""
        if place.in_line:
            self.add_words(" ", place)
            return
        self.flush()
        self._run = None
        self._after_blank = self._at_line_start = True

    def add_line_break(self, place: Place) -> None:
        if place.in_line:
            self.add_words(" ", place)
            return
        self.flush()
        if self._run is not None:
            self.new("br", self.target(place, ""))
            self._after_blank = self._at_line_start = True

    def add_picture(self, address: str, alt: str, place: Place) -> None:
        self.flush()
        self.new("img", self.target(place, ""), src=address, alt=alt)
        self.length += len(alt)
        self._after_blank = self._at_line_start = False
