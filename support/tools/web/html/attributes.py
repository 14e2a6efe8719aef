"""Read attributes of HTML elements, such as numbers, the markers of list items, and the language of a code block."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain

from support.tools.web.html.style import Style
from support.tools.web.html.tree import Element

MAX_CLASSES = 20  # further classes of an element are ignored

_NUMBER = re.compile(r"[ \t\n\f\r]{0,9}([+-]?[0-9]{1,9})(?![0-9])")  # at most nine digits, as in browsers
_LANGUAGE = re.compile(r"(?:language|lang|highlight-source|highlight-text|highlight|src|brush:?)-?([a-z0-9+#.-]{1,30})")
_LANGUAGE_NAME = re.compile(r"[a-z0-9+#.-]{1,30}")
_NO_LANGUAGE = frozenset({"none", "plain", "plaintext", "text", "txt", "default", "source", "code", "nohighlight"})
_MARKERS = {
    "a": "a",
    "A": "A",
    "i": "i",
    "I": "I",
    "lower-alpha": "a",
    "lower-latin": "a",
    "upper-alpha": "A",
    "upper-latin": "A",
    "lower-roman": "i",
    "upper-roman": "I",
    "none": "-",
}


def names(text: str) -> frozenset[str]:
    """Return the names in a text as a set."""
    return frozenset(text.split())


def classes_of(element: Element) -> list[str]:
    """Return the classes of an element, MAX_CLASSES at most."""
    return element.attrs.get("class", "").split(maxsplit=MAX_CLASSES)[:MAX_CLASSES]


def number(value: object) -> int | None:
    """Read the number at the start of an attribute's value, as HTML specifies. Return None if there is no number."""
    found = _NUMBER.match(str(value)) if value is not None else None
    return int(found[1]) if found else None


def is_float(text: str) -> bool:
    try:
        return len(text) <= 20 and text.isascii() and float(text) >= 0
    except ValueError:
        return False


@dataclass(eq=False)
class ListMarkers:
    """The markers, such as "-" or "3.", for the next items of an open list."""

    kind: str  # "-", "1", "a", "A", "i" or "I"
    number: int = 1
    step: int = 1

    def next(self, value: int | None) -> str:
        if value is not None:
            self.number = value
        number, self.number = self.number, self.number + self.step
        return "-" if self.kind == "-" else f"{_numeral(number, self.kind)}."


def list_markers(element: Element, style: Style) -> ListMarkers:
    if element.name != "ol":
        return ListMarkers("-")
    wanted = style.get("list-style-type") or next(iter(style.get("list-style", "").split()), "")
    kind = _MARKERS.get(wanted) or _MARKERS.get(element.attrs.get("type", "").strip()) or "1"
    start = number(element.attrs.get("start"))
    if "reversed" not in element.attrs:
        return ListMarkers(kind, 1 if start is None else start)
    items = sum(1 for child in element.elements if child.name == "li")
    return ListMarkers(kind, items if start is None else start, -1)


_ROMAN = [(1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x")]
_ROMAN += [(9, "ix"), (5, "v"), (4, "iv"), (1, "i")]


def _numeral(number: int, kind: str) -> str:
    if kind == "1" or not 0 < number < 4000:
        return str(number)
    shown = ""
    if kind in "aA":
        while number:
            number, letter = divmod(number - 1, 26)
            shown = chr(ord("a") + letter) + shown
    else:
        for value, letters in _ROMAN:
            count, number = divmod(number, value)
            shown += letters * count
    return shown.upper() if kind.isupper() else shown


def code_language(element: Element) -> str:
    """Return the language of a code block, or "". Highlighters note the language on, within or around the block."""
    places = [element, *(child for child in element.elements if child.name == "code")]
    parent = element.parent
    around = [parent, parent.parent] if parent else []
    for place in chain(places, (other for other in around if other is not None)):
        for attribute in ("data-lang", "data-language"):
            if found := _LANGUAGE_NAME.fullmatch(place.attrs.get(attribute, "").strip().lower()):
                return found[0]
        classes = [name.lower() for name in classes_of(place)]
        for index, name in enumerate(classes):
            found = _LANGUAGE.fullmatch(name)
            if name in ("brush:", "hljs", "sourcecode") and index + 1 < len(classes):
                found = _LANGUAGE_NAME.fullmatch(classes[index + 1].rstrip(";"))
            if found and (language := found[found.re.groups]) not in _NO_LANGUAGE and "-" not in language[:1]:
                return language
    return ""
