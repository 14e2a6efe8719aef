"""Describe the place in a seen page's tree to which the children of an open element are added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from support.tools.web.html.attributes import ListMarkers
from support.tools.web.html.kinds import AROUND, KEPT_LINES, MARKS, NESTING
from support.tools.web.html.style import Sight, Style
from support.tools.web.html.tree import Element

if TYPE_CHECKING:
    from bs4 import Tag

MAX_MARKS = 12  # levels of nested emphasis, links, superscripts and the like; text at deeper levels gets no more marks


@dataclass(frozen=True, eq=False)
class Mark:
    """An open inline element. If the element covers several paragraphs, each paragraph gets an element of its own."""

    name: str
    address: str = ""


@dataclass(eq=False)
class OpenTable:
    """An open table, and its newest row."""

    element: Tag
    row: Tag | None = None
    groups: int = 0


@dataclass(frozen=True)
class Place:
    """The place in the tree to which an open element's children are added, and the look that the children inherit."""

    container: Tag
    sight: Sight = Sight()  # noqa: RUF009  (frozen)
    marks: tuple[Mark, ...] = ()
    in_line: bool = False  # in a heading, a term, a caption or another element that is written on one line
    keeps_lines: bool = False
    preformatted: bool = False
    drawn: bool = False  # in a drawing, but in none of the drawing's texts
    whole: bool = False  # within an element of WHOLES, such as an article
    around: tuple[str, ...] = ()  # "form" or "aside" for each outer element that may be dropped
    levels: int = 0
    tables: int = 0
    markers: ListMarkers | None = None  # the bullets or numbers for the next items of the open list
    table: OpenTable | None = None
    section: str = "body"
    group: int = 0


def keeps_lines(style: Style, place: Place) -> bool:
    space = style.get("white-space")
    return place.keeps_lines if space is None else space in KEPT_LINES


def is_flow(place: Place) -> bool:
    """Return whether blocks of every kind can be added at the place."""
    return place.container.name not in ("ul", "ol", "table") and place.table is None


def around_name(name: str, place: Place) -> str:
    """Return "form" or "aside" for an element that may be dropped as a whole, and "" for other elements.

    Also return "" for an element within another element of the same kind.
    """
    kind = "form" if name == "form" else "aside" if name in AROUND and not place.whole else ""
    return "" if kind in place.around else kind


def mark_of(element: Element, style: Style, absolute: Callable[[str], str | None]) -> Mark | None:
    if element.name == "a":
        href = element.attrs.get("href", "#")
        address = None if href.startswith("#") else absolute(href)
        return Mark("a", address) if address else None
    if element.name in MARKS:
        return Mark(MARKS[element.name])
    if style.get("vertical-align") in ("super", "sub"):
        return Mark("sup" if style["vertical-align"] == "super" else "sub")
    if "line-through" in style.get("text-decoration", "") + style.get("text-decoration-line", ""):
        return Mark("del")
    return None


def marked(place: Place, mark: Mark | None) -> Place:
    """Return the place within an inline element with this mark. Leave out a repeated mark, or one beyond MAX_MARKS."""
    if mark is None or len(place.marks) >= MAX_MARKS:
        return place
    if mark.name not in NESTING and any(other.name == mark.name for other in place.marks):
        return place
    return replace(place, marks=(*place.marks, mark))


def holds_line_breaks(element: Element, place: Place) -> bool:
    """Return whether the element is code of several lines. Don't search code within code: that takes quadratic time."""
    if element.name != "code" or len(place.marks) >= MAX_MARKS or any(mark.name == "code" for mark in place.marks):
        return False
    return any(isinstance(node, Element) and node.name == "br" for node in element.descendants())
