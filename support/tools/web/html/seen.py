"""Build the tree of a parsed page's visible content.

The tree is flat and has few kinds of elements: the boxes around a paragraph are left out. The tree is built in one
pass, and nothing in it is moved or removed later. So the work is linear in the page's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from support.tools.web.html.attributes import classes_of, code_language, list_markers, number
from support.tools.web.html.controls import CONTROLS
from support.tools.web.html.hooks import is_tag
from support.tools.web.html.kinds import (
    BLOCK_DISPLAYS,
    BLOCKS,
    HEADINGS,
    LISTS,
    MARKS,
    PREFORMATTED,
    SECTIONS,
    UNDRAWN,
    WHOLES,
    is_layout,
    is_unseen,
    part_name,
)
from support.tools.web.html.math import MATHS, Raised, formula
from support.tools.web.html.paragraphs import Paragraphs
from support.tools.web.html.places import (
    Mark,
    OpenTable,
    Place,
    around_name,
    holds_line_breaks,
    is_flow,
    keeps_lines,
    mark_of,
    marked,
)
from support.tools.web.html.sheets import Sheets
from support.tools.web.html.style import Sight, Style, look, parse_style
from support.tools.web.html.tree import Element

if TYPE_CHECKING:
    from bs4 import Tag

# A form is dropped unless it holds more than this share of the page's text. If `main` or the only article holds more
# than this share of the remaining text, everything else is dropped, too.
MOST = 0.5
NEARLY_ALL = 2 / 3  # a header, footer or aside is dropped unless it holds more than this share of the page's text
MAX_LEVELS = 24  # levels of nested lists and quotes; a deeper list or quote counts as the last level
MAX_TABLES = 4  # levels of nested tables; a row of a deeper table is a paragraph
MAX_SPAN = 1_000  # columns that one cell may span, as in browsers


_Node = object  # an Element or a text of the parsed page, or a Raised part of a formula


@dataclass
class _Frame:
    nodes: Iterator[_Node]
    place: Place
    close: Callable[[], None] | None = None


@dataclass
class _Span:
    """A part of the page that may be content or may be dropped. `start` and `end` are offsets in the page's text."""

    element: Tag
    start: int
    end: int = 0

    @property
    def length(self) -> int:
        return self.end - self.start


class SeenPage:
    """The visible content of a page.

    `content` is the root of the tree that `hooks.py` converts. `absolute` returns the full address of a link or a
    picture, or None if that address is not a web address. `new_element` makes an element from its name.
    """

    def __init__(
        self,
        page: Element,
        sheets: Sheets,
        absolute: Callable[[str], str | None],
        new_element: Callable[[str], Tag],
    ) -> None:
        self._sheets = sheets
        self._absolute = absolute
        self._text = Paragraphs(new_element)
        self._code: list[str] | None = None  # the pieces of the open preformatted text
        self._controls: list[tuple[Element, Sight]] = []  # controls, such as buttons, within the text `_code`
        self._quotes = 0
        self._around: list[_Span] = []  # the parts that may be dropped: forms, headers, footers and asides
        self._parts: dict[str, _Span] = {}
        self._articles = 0  # the number of articles that are not within another element of WHOLES
        self._frames: list[_Frame] = []
        root = new_element("div")
        self._build(page, root)
        self.content = self._choose(root)

    def _build(self, page: Element, root: Tag) -> None:
        self._frames = [_Frame(iter([page]), Place(root))]
        while self._frames:
            frame = self._frames[-1]
            node = next(frame.nodes, None)
            if node is None:
                self._frames.pop()
                if frame.close:
                    frame.close()
            else:
                self._add(node, frame.place)
        self._text.flush()

    def _choose(self, root: Tag) -> Tag:
        """Return the page's main part. Mark the parts in `_around` as dropped, except a part with most of the text."""
        dropped: list[_Span] = []
        for span in self._around:  # in the page's order: an outer span comes before the spans in it
            share = MOST if span.element.name == "form" else NEARLY_ALL
            if span.length <= share * self._text.length:
                span.element["data-dropped"] = "yes"
                if not dropped or span.start >= dropped[-1].end:
                    dropped.append(span)
        whole = self._text.length - sum(span.length for span in dropped)
        for name in ("main", "role=main", "article"):
            part = self._parts.get(name)
            if part is None or (name == "article" and self._articles > 1):
                continue
            within = (span.length for span in dropped if part.start <= span.start and span.end <= part.end)
            if part.length - sum(within) > MOST * whole:
                return part.element
        return root

    # One node

    def _add(self, node: _Node, place: Place) -> None:
        if isinstance(node, Raised):
            self._enter([node.part], marked(place, Mark(node.name)))
        elif isinstance(node, Element):
            self._add_element(node, place)
        elif isinstance(node, str) and not place.drawn:
            self._add_text(node, place)

    def _enter(self, nodes: Iterable[_Node], place: Place, close: Callable[[], None] | None = None) -> None:
        self._frames.append(_Frame(iter(nodes), place, close))

    def _add_element(self, element: Element, place: Place) -> None:
        name = element.name
        style = parse_style(element.attrs["style"]) if "style" in element.attrs else {}
        style = self._sheets.style_of(name, element.attrs.get("id", ""), classes_of(element), style)
        if place.drawn:
            style = {key: element.attrs[key] for key in ("display", "visibility") if key in element.attrs} | style
        if is_unseen(element, style) or (place.drawn and name in UNDRAWN):
            return
        if style:
            place = replace(place, sight=look(style, place.sight), keeps_lines=keeps_lines(style, place))
        self._articles += name == "article" and not place.whole
        if name in WHOLES or element.attrs.get("role") == "main":
            place = replace(place, whole=True)
        if name == "svg" or (place.drawn and name in ("text", "foreignobject")):
            self._enter([" ", *element.contents, " "], replace(place, drawn=name == "svg"))
        elif place.drawn:
            self._add_inline(element, style, place)
        elif place.preformatted:
            self._add_within_code(element, style, place)
        elif name in _INLINE_HANDLERS:
            _INLINE_HANDLERS[name](self, element, place)
        elif name in MATHS:
            self._enter(formula(element), place)
        elif name in PREFORMATTED or holds_line_breaks(element, place):
            self._add_code(element, place)
        elif name in BLOCKS or style.get("display") in BLOCK_DISPLAYS:
            self._add_block(element, style, place)
        else:
            self._add_inline(element, style, place)

    # Text

    def _add_text(self, text: str, place: Place) -> None:
        if not place.sight.seen:
            return
        if self._code is not None:
            self._code.append(text)
            self._text.length += len(text.strip())
            return
        if place.keeps_lines and "\n" in text:
            first, *lines = text.split("\n")
            self._text.add_words(first, place)
            for line in lines:
                self._text.add_line_break(place)
                self._text.add_words(line, place)
            return
        self._text.add_words(text, place)

    # Blocks

    def _add_block(self, element: Element, style: Style, place: Place) -> None:
        self._text.end(place)

        def close() -> None:
            self._text.end(place)

        if place.in_line:
            self._enter(element.contents, place, close)
            return
        if element.name == "tr" and (table := place.table):

            def close() -> None:
                self._text.end(place)
                table.row = None

        inner = self._inner_place(element, style, place)
        part = part_name(element)
        if part and part not in self._parts and is_flow(place):
            inner = replace(place, container=self._text.new("div", place.container))
            close = self._measured(self._parts.setdefault(part, _Span(inner.container, self._text.length)), close)
        elif (around := around_name(element.name, place)) and is_flow(place):
            inner = replace(place, container=self._text.new(around, place.container), around=(*place.around, around))
            self._around.append(_Span(inner.container, self._text.length))
            close = self._measured(self._around[-1], close)
        self._enter(element.contents, inner, close)

    def _measured(self, span: _Span, close: Callable[[], None]) -> Callable[[], None]:
        def measure() -> None:
            close()
            span.end = self._text.length

        return measure

    def _inner_place(self, element: Element, style: Style, place: Place) -> Place:
        """Return the place for a block's children: a new element, or `place` if the block is a mere box."""
        name = element.name
        if name == "table":
            return self._table(element, place)
        if name in SECTIONS and place.table:
            place.table.groups += 1
            place.table.row = None
            return replace(place, section=SECTIONS[name], group=place.table.groups)
        if name == "tr" and place.table:
            place.table.row = self._row(place.table, place)
            return place
        if name in ("td", "th") and place.table:
            return self._cell(element, place, place.table)
        if name == "caption" and place.table:
            return replace(place, container=self._text.new("caption", place.table.element), in_line=True, table=None)
        if name in HEADINGS or name == "dt":
            return replace(place, container=self._text.new(name, place.container), in_line=True)
        if name == "li":
            return self._item(element, place)
        if place.levels >= MAX_LEVELS:
            return replace(place, markers=None) if name in LISTS else place
        inside = replace(place, levels=place.levels + 1, markers=None, table=None)
        if name in LISTS:
            return replace(inside, container=self._new_list(name, place), markers=list_markers(element, style))
        if name in ("blockquote", "dd"):
            return replace(inside, container=self._text.new(name, place.container))
        return place

    def _new_list(self, name: str, place: Place) -> Tag:
        parent = place.container
        if place.markers is not None and parent.name in ("ul", "ol"):
            # If a list is directly within a list, put the inner list into the outer list's newest item.
            before = parent.contents[-1] if parent.contents else None
            parent = before if is_tag(before, "li") else self._new_item(parent, "")
        return self._text.new(LISTS[name], parent)

    def _item(self, element: Element, place: Place) -> Place:
        container = place.container
        if container.name not in ("ul", "ol"):
            if place.levels >= MAX_LEVELS:
                return place
            place = replace(place, levels=place.levels + 1)
            if container.name == "li":
                container = self._text.new("ul", container)  # put a list around an item that is directly within an item
        marker = place.markers.next(number(element.attrs.get("value"))) if place.markers else "-"
        return replace(place, container=self._new_item(container, marker))

    def _new_item(self, parent: Tag, marker: str) -> Tag:
        return self._text.new("li", parent, **{"data-marker": marker})

    # Tables

    def _table(self, element: Element, place: Place) -> Place:
        if place.tables >= MAX_TABLES or is_layout(element):
            return replace(place, table=None)
        table = self._text.new("table", place.container)
        return replace(place, container=table, table=OpenTable(table), tables=place.tables + 1, markers=None, group=0)

    def _row(self, table: OpenTable, place: Place) -> Tag:
        return self._text.new("row", table.element, **{"data-section": place.section, "data-group": str(place.group)})

    def _cell(self, element: Element, place: Place, table: OpenTable) -> Place:
        if table.row is None:
            table.row = self._row(table, place)
        columns, rows = number(element.attrs.get("colspan")), number(element.attrs.get("rowspan"))
        cell = self._text.new(
            "cell",
            table.row,
            **{"data-columns": str(min(columns or 1, MAX_SPAN) if columns and columns > 0 else 1)},
            **{"data-rows": str(rows if rows is not None and rows >= 0 else 1)},
            **({"data-head": "yes"} if element.name == "th" else {}),
        )
        return replace(place, container=cell, table=None)

    # Preformatted text

    def _add_code(self, element: Element, place: Place) -> None:
        if place.in_line or place.container.name in ("ul", "ol", "table") or any(m.name == "code" for m in place.marks):
            self._enter(element.contents, replace(place, keeps_lines=not place.in_line))
            return
        self._text.end(place)
        self._code = []

        def close() -> None:
            lines = "".join(self._code or []).replace("\r\n", "\n").replace("\r", "\n").split("\n")
            self._code = None
            first = next((n for n, line in enumerate(lines) if line.strip()), len(lines))
            last = next((n for n in range(len(lines), first, -1) if lines[n - 1].strip()), first)
            if first < last:
                language = code_language(element)
                pre = self._text.new("pre", place.container, **({"data-language": language} if language else {}))
                pre.append("\n".join(lines[first:last]))
            self._text.end(place)
            controls, self._controls = self._controls, []
            for control, sight in reversed(controls):
                self._enter([control], replace(place, sight=sight), lambda: self._text.end(place))

        self._enter(element.contents, replace(place, preformatted=True), close)

    def _add_within_code(self, element: Element, style: Style, place: Place) -> None:
        assert self._code is not None
        name = element.name
        if name in ("button", "select", "input"):
            self._controls.append((element, place.sight))  # a control, such as a button "Copy", is not part of the code
            return
        if name in ("br", "img"):
            self._add_text("\n" if name == "br" else _alt(element), place)
            return
        mark = MARKS.get(name)
        if mark in ("sup", "sub"):
            self._enter([f"<{mark}>", *element.contents, f"</{mark}>"], place)
        elif mark == "del":
            self._enter(["~~", *element.contents, "~~"], place)
        elif name in BLOCKS or style.get("display") in BLOCK_DISPLAYS:
            in_row = name in ("td", "th")
            self._add_code_boundary(in_row)
            self._enter(element.contents, place, lambda: self._add_code_boundary(in_row))
        else:
            self._enter(element.contents, place)

    def _add_code_boundary(self, in_row: bool) -> None:
        assert self._code is not None
        if self._code and self._code[-1] and not self._code[-1].endswith("\n"):
            self._code.append(" " if in_row else "\n")

    # Inline elements and their visible text

    def _add_inline(self, element: Element, style: Style, place: Place) -> None:
        self._enter(element.contents, marked(place, mark_of(element, style, self._absolute)))

    def _add_rule(self, element: Element, place: Place) -> None:
        self._text.end(place)
        if not place.in_line and is_flow(place):
            self._text.new("hr", place.container)

    def _add_br(self, element: Element, place: Place) -> None:
        self._text.add_line_break(place)

    def _add_quote(self, element: Element, place: Place) -> None:
        mark = '"' if self._quotes % 2 == 0 else "'"
        self._quotes += 1

        def close() -> None:
            self._quotes -= 1

        self._enter([mark, *element.contents, mark], place, close)

    def _add_reading(self, element: Element, place: Place) -> None:
        if any(isinstance(node, Element) or node.strip() for node in element.contents):
            self._enter(["(", *element.contents, ")"], place)

    def _add_picture(self, element: Element, place: Place) -> None:
        if not place.sight.seen:
            return
        address = self._absolute(element.attrs["src"]) if "src" in element.attrs else None
        alt = _alt(element)
        if address is None or not alt:
            self._text.add_words(alt, place)
        else:
            self._text.add_picture(address, alt, place)

    def _add_control(self, element: Element, place: Place) -> None:
        """Add the words of a control, with blanks around the words in place of the control's border."""
        text = CONTROLS[element.name](element)
        if text is not None:
            self._add_text(f" {text.strip()} ", place)
        if element.name == "input":
            self._enter(element.contents, place)  # an `input` in a formula may hold words

    def _add_button(self, element: Element, place: Place) -> None:
        self._enter([" ", *element.contents, " "], place)


def _alt(picture: Element) -> str:
    return " ".join(picture.attrs.get("alt", "").split())


_INLINE_HANDLERS: dict[str, Callable[[SeenPage, Element, Place], None]] = {
    "hr": SeenPage._add_rule,
    "br": SeenPage._add_br,
    "q": SeenPage._add_quote,
    "rt": SeenPage._add_reading,
    "img": SeenPage._add_picture,
    "button": SeenPage._add_button,
    **dict.fromkeys(CONTROLS, SeenPage._add_control),
}
