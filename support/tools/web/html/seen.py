"""Build the tree of a parsed page's visible content.

The tree is flat and has few kinds of elements: the boxes around a paragraph are left out. The tree is built in one
pass, and nothing in it is moved or removed later. So the work is linear in the page's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from support.tools.web.html.attributes import (
    ItemMarks,
    classes_of,
    code_language,
    elements,
    is_element,
    is_float,
    item_marks,
    names,
    number,
)
from support.tools.web.html.hooks import mark_raised
from support.tools.web.html.math import MATHS, Raised, formula
from support.tools.web.html.sheets import Sheets
from support.tools.web.html.style import Sight, Style, hides_all, look, parse_style

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

MOST = 0.5  # an element that holds more than this share of a page's text is content
NEARLY_ALL = 2 / 3  # a header that holds more than this share is content; other headers are dropped
MAX_LEVELS = 24  # levels of nested lists and quotes; a deeper list or quote counts as the last level
MAX_TABLES = 4  # levels of nested tables; a row of a deeper table is a paragraph
MAX_MARKS = 12  # levels of nested emphasis, links and raised text; deeper text is plain
# A table without heading cells is a layout if one of its cells exceeds one of these limits.
LAYOUT_CELL = 1_000  # characters
LAYOUT_NODES = 100  # texts and elements
MAX_SPAN = 1_000  # columns, as in browsers

_SPACE = re.compile("[ \t\r\n\f\v\x1c-\x1f\x85\u00a0\u2007\u2028\u2029\u202f]+")
_MARKUP_AT_START = re.compile(r"(?:#{1,6}|[-+*])(?: |$)|>|```|~~~")
_UNSEEN = names(
    "head title script style noscript template svg iframe object canvas audio video datalist map area param"
    " noframes noembed embed applet rp annotation annotation-xml mphantom base link meta"
)
_AROUND = frozenset({"header", "footer", "aside"})  # around the page's content, unless within an article
_WHOLES = frozenset({"main", "article", "blockquote", "figure"})
_BLOCKS = names(
    "address article aside body center details dialog dir div dl fieldset figcaption figure footer form frameset header"
    " hgroup html legend li main menu optgroup p search section summary table tbody td textarea tfoot th thead tr"
    " blockquote caption dd dt h1 h2 h3 h4 h5 h6 ol ul pre listing xmp plaintext isindex"
)
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_LISTS = {"ul": "ul", "menu": "ul", "dir": "ul", "ol": "ol"}
_PREFORMATTED = frozenset({"pre", "listing", "xmp", "plaintext", "textarea"})
_MARKS = {"b": "strong", "strong": "strong", "i": "em", "em": "em", "sup": "sup", "sub": "sub"}
_MARKS |= {"del": "del", "s": "del", "strike": "del", "code": "code", "kbd": "code", "samp": "code", "tt": "code"}
_NESTING = frozenset({"sup", "sub"})  # one may stand within another of its kind, as a power of a power
_SECTIONS = {"thead": "head", "tbody": "body", "tfoot": "foot"}
_BLOCK_DISPLAYS = frozenset({"block", "flex", "grid", "table", "list-item", "flow-root", "table-row"})
_KEPT_LINES = frozenset({"pre", "pre-wrap", "pre-line", "break-spaces"})
_VALUES_OF_INPUT = names(
    "text number date time datetime-local month week email url tel search range color submit reset button"
)


@dataclass(frozen=True, eq=False)
class _Mark:
    """An open inline element. If the element covers several paragraphs, each paragraph gets an element of its own."""

    name: str
    address: str = ""


@dataclass(eq=False)
class _Table:
    """An open table, and its newest row."""

    element: Tag
    row: Tag | None = None
    groups: int = 0


@dataclass(frozen=True)
class _Place:
    """The place in the tree for the children of an open element, with the look that the children inherit."""

    container: Tag
    sight: Sight = Sight()  # noqa: RUF009  (frozen)
    marks: tuple[_Mark, ...] = ()
    in_line: bool = False  # on one line, such as a heading, a term or a caption
    keeps_lines: bool = False
    preformatted: bool = False
    whole: bool = False  # within an article
    around: tuple[str, ...] = ()  # the kinds of the outer elements that may be dropped
    levels: int = 0
    tables: int = 0
    items: ItemMarks | None = None  # the marks of the list's items
    table: _Table | None = None
    section: str = "body"
    group: int = 0


_Node = object  # a node of the parsed page, a piece of text, or Raised


@dataclass
class _Frame:
    nodes: Iterator[_Node]
    place: _Place
    close: Callable[[], None] | None = None


@dataclass
class _Span:
    """A part of the page that is content or is dropped. Start and end count the characters of text."""

    element: Tag
    start: int
    end: int = 0

    @property
    def length(self) -> int:
        return self.end - self.start


class SeenPage:
    """The visible content of a page.

    `content` is the root of the tree that `hooks.py` converts. `absolute` returns the full address of a link or a
    picture, or None if that is no web address. `new_element` makes an element from its name.
    """

    def __init__(
        self,
        soup: BeautifulSoup,
        sheets: Sheets,
        absolute: Callable[[str], str | None],
        new_element: Callable[[str], Tag],
    ) -> None:
        self._soup = soup
        self._sheets = sheets
        self._absolute = absolute
        self._new_element = new_element
        self._run: Tag | None = None  # the paragraph to which text is added
        self._open: list[tuple[_Mark, Tag]] = []  # the open inline elements of that paragraph
        self._linked: set[int] = set()  # ids of the links that have words
        self._text: list[str] = []
        self._text_place: _Place | None = None
        self._after_blank = True
        self._at_line_start = True
        self._code: list[str] | None = None  # the pieces of the open preformatted text
        self._controls: list[tuple[Tag, Sight]] = []  # controls, such as buttons, within that preformatted text
        self._quotes = 0
        self._length = 0  # characters of text so far
        self._around: list[_Span] = []  # the parts that may be dropped: forms, headers, footers and asides
        self._parts: dict[str, _Span] = {}
        self._articles = 0  # articles that are not within another one
        self._frames: list[_Frame] = []
        root = new_element("div")
        self._build(root)
        self.content = self._choose(root)

    def _build(self, root: Tag) -> None:
        self._frames = [_Frame(iter(self._soup.contents), _Place(root))]
        while self._frames:
            frame = self._frames[-1]
            node = next(frame.nodes, None)
            if node is None:
                self._frames.pop()
                if frame.close:
                    frame.close()
            else:
                self._add(node, frame.place)
        self._flush()

    def _choose(self, root: Tag) -> Tag:
        """Return the main part of the page. Mark forms, headers and the like as dropped, unless they hold most text."""
        dropped: list[_Span] = []
        for span in self._around:  # in the order of the page, in which outer spans precede inner spans
            share = MOST if span.element.name == "form" else NEARLY_ALL
            if span.length <= share * self._length:
                span.element["data-dropped"] = "yes"
                if not dropped or span.start >= dropped[-1].end:
                    dropped.append(span)
        whole = self._length - sum(span.length for span in dropped)
        for name in ("main", "role=main", "article"):
            part = self._parts.get(name)
            if part is None or (name == "article" and self._articles > 1):
                continue
            within = (span.length for span in dropped if part.start <= span.start and span.end <= part.end)
            if part.length - sum(within) > MOST * whole:
                return part.element
        return root

    # One node

    def _add(self, node: _Node, place: _Place) -> None:
        if isinstance(node, Raised):
            mark = _Mark(node.name)
            self._enter([node.part], replace(place, marks=(*place.marks, mark)))
        elif is_element(node):
            self._add_element(node, place)
        elif isinstance(node, str) and not getattr(node, "PREFIX", ""):  # comments and doctypes have a PREFIX
            self._add_text(str(node), place)

    def _enter(self, nodes: Iterable[_Node], place: _Place, close: Callable[[], None] | None = None) -> None:
        self._frames.append(_Frame(iter(nodes), place, close))

    def _add_element(self, element: Tag, place: _Place) -> None:
        name = element.name.lower()
        style = parse_style(str(element["style"])) if element.has_attr("style") else {}
        style = self._sheets.style_of(name, str(element.get("id", "")), classes_of(element), style)
        if _is_unseen(element, name, style, place):
            return
        if style:
            place = replace(place, sight=look(style, place.sight), keeps_lines=_keeps_lines(style, place))
        self._articles += name == "article" and not place.whole
        if name in _WHOLES or element.get("role") == "main":
            place = replace(place, whole=True)
        if place.preformatted:
            self._add_within_code(element, name, style, place)
        elif name in _INLINE_HANDLERS:
            _INLINE_HANDLERS[name](self, element, place)
        elif name in MATHS:
            self._enter(formula(element, name), place)
        elif name in _PREFORMATTED or _holds_line_breaks(element, name, place):
            self._add_code(element, place)
        elif name in _BLOCKS or style.get("display") in _BLOCK_DISPLAYS:
            self._add_block(element, name, style, place)
        else:
            mark = _mark_of(element, name, style, self._absolute)
            if mark is not None and _may_stand(mark, place):
                place = replace(place, marks=(*place.marks, mark))
            self._enter(element.contents, place)

    # Text

    def _add_text(self, text: str, place: _Place) -> None:
        if not place.sight.seen:
            return
        if self._code is not None:
            self._code.append(text)
            self._length += len(text.strip())
            return
        if place.keeps_lines and "\n" in text:
            first, *lines = text.split("\n")
            self._add_words(first, place)
            for line in lines:
                self._add_line_break(place)
                self._add_words(line, place)
            return
        self._add_words(text, place)

    def _add_words(self, text: str, place: _Place) -> None:
        text = _SPACE.sub(" ", text)
        if self._after_blank:
            text = text.lstrip(" ")
        if not text:
            return
        if self._text_place is not None and self._text_place.marks != place.marks:
            self._flush()
        self._text.append(text)
        self._text_place = place
        self._after_blank = text.endswith(" ")
        self._length += len(text.strip())

    def _flush(self) -> None:
        """Add the collected text to the tree."""
        if self._text_place is None:
            return
        text, place = "".join(self._text), self._text_place
        self._text, self._text_place = [], None
        target = self._target(place, text)
        if self._at_line_start and target.name in ("p", "li", "dd") and _MARKUP_AT_START.match(text):
            text = f"\\{text}"  # without the backslash the text would become a heading, a list or a quote
        if text.strip():
            self._at_line_start = False
        target.append(text)

    def _target(self, place: _Place, text: str) -> Tag:
        """Return the element that gets the next text or inline element. Open its paragraph and its marks if needed."""
        if self._run is None:
            self._run = place.container
            bare = place.in_line or (place.container.name in ("li", "dd", "cell") and not place.container.contents)
            if not bare:
                self._run = self._new("p", place.container)
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
                if id(mark) in self._linked:
                    continue
                if text.strip():
                    self._linked.add(id(mark))
            target = self._new(mark.name, target, **({"href": mark.address} if mark.address else {}))
            self._open.append((mark, target))
        return target

    def _new(self, name: str, parent: Tag, **attributes: str) -> Tag:
        element = self._new_element(name)
        element.attrs.update(attributes)
        parent.append(element)
        return element

    def _break(self, place: _Place) -> None:
        """End the paragraph."""
        if place.in_line:
            self._add_words(" ", place)
            return
        self._flush()
        self._run = None
        self._after_blank = self._at_line_start = True

    def _add_line_break(self, place: _Place) -> None:
        if place.in_line:
            self._add_words(" ", place)
            return
        self._flush()
        if self._run is not None:
            self._new("br", self._target(place, ""))
            self._after_blank = self._at_line_start = True

    # Blocks

    def _add_block(self, element: Tag, name: str, style: Style, place: _Place) -> None:
        self._break(place)

        def close() -> None:
            self._break(place)

        if place.in_line:
            self._enter(element.contents, place, close)
            return
        if name == "tr" and (table := place.table):

            def close() -> None:
                self._break(place)
                table.row = None

        inner = self._inner_place(element, name, style, place)
        part = _part_name(element, name)
        if part and part not in self._parts and _is_flow(place):
            inner = replace(place, container=self._new("div", place.container))
            close = self._measured(self._parts.setdefault(part, _Span(inner.container, self._length)), close)
        elif (around := _around_name(name, place)) and _is_flow(place):
            inner = replace(place, container=self._new(around, place.container), around=(*place.around, around))
            self._around.append(_Span(inner.container, self._length))
            close = self._measured(self._around[-1], close)
        self._enter(element.contents, inner, close)

    def _measured(self, span: _Span, close: Callable[[], None]) -> Callable[[], None]:
        def measure() -> None:
            close()
            span.end = self._length

        return measure

    def _inner_place(self, element: Tag, name: str, style: Style, place: _Place) -> _Place:
        """Return the place for a block's children: a new element, or `place` if the block is a mere box."""
        if name == "table":
            return self._table(element, place)
        if name in _SECTIONS and place.table:
            place.table.groups += 1
            place.table.row = None
            return replace(place, section=_SECTIONS[name], group=place.table.groups)
        if name == "tr" and place.table:
            place.table.row = self._row(place.table, place)
            return place
        if name in ("td", "th") and place.table:
            return self._cell(element, name, place, place.table)
        if name == "caption" and place.table:
            return replace(place, container=self._new("caption", place.table.element), in_line=True, table=None)
        if name in _HEADINGS or name == "dt":
            return replace(place, container=self._new(name, place.container), in_line=True)
        if name == "li":
            return self._item(element, place)
        if place.levels >= MAX_LEVELS:
            return replace(place, items=None) if name in _LISTS else place
        inside = replace(place, levels=place.levels + 1, items=None, table=None)
        if name in _LISTS:
            return replace(inside, container=self._new_list(name, place), items=item_marks(element, name, style))
        if name in ("blockquote", "dd"):
            return replace(inside, container=self._new(name, place.container))
        return place

    def _new_list(self, name: str, place: _Place) -> Tag:
        parent = place.container
        if place.items is not None and parent.name in ("ul", "ol"):
            # Put a list that is directly within a list into the item before the inner list.
            before = parent.contents[-1] if parent.contents else None
            parent = before if is_element(before) and before.name == "li" else self._new_item(parent, "")
        return self._new(_LISTS[name], parent)

    def _item(self, element: Tag, place: _Place) -> _Place:
        if place.items is None:  # outside a list
            if place.levels >= MAX_LEVELS:
                return place
            place = replace(place, levels=place.levels + 1)
        mark = place.items.mark(number(element.get("value"))) if place.items else "-"
        return replace(place, container=self._new_item(place.container, mark), items=None)

    def _new_item(self, parent: Tag, mark: str) -> Tag:
        return self._new("li", parent, **{"data-mark": mark})

    # Tables

    def _table(self, element: Tag, place: _Place) -> _Place:
        if place.tables >= MAX_TABLES or _is_layout(element):
            return replace(place, table=None)
        table = self._new("table", place.container)
        return replace(place, container=table, table=_Table(table), tables=place.tables + 1, items=None, group=0)

    def _row(self, table: _Table, place: _Place) -> Tag:
        return self._new("row", table.element, **{"data-section": place.section, "data-group": str(place.group)})

    def _cell(self, element: Tag, name: str, place: _Place, table: _Table) -> _Place:
        if table.row is None:
            table.row = self._row(table, place)
        columns, rows = number(element.get("colspan")), number(element.get("rowspan"))
        cell = self._new(
            "cell",
            table.row,
            **{"data-columns": str(min(columns or 1, MAX_SPAN) if columns and columns > 0 else 1)},
            **{"data-rows": str(rows if rows is not None and rows >= 0 else 1)},
            **({"data-head": "yes"} if name == "th" else {}),
        )
        return replace(place, container=cell, table=None)

    # Preformatted text

    def _add_code(self, element: Tag, place: _Place) -> None:
        if place.in_line or place.container.name in ("ul", "ol", "table") or any(m.name == "code" for m in place.marks):
            self._enter(element.contents, replace(place, keeps_lines=not place.in_line))
            return
        self._break(place)
        self._code = []

        def close() -> None:
            lines = "".join(self._code or []).replace("\r\n", "\n").replace("\r", "\n").split("\n")
            self._code = None
            first = next((n for n, line in enumerate(lines) if line.strip()), len(lines))
            last = next((n for n in range(len(lines), first, -1) if lines[n - 1].strip()), first)
            if first < last:
                language = code_language(element)
                pre = self._new("pre", place.container, **({"data-language": language} if language else {}))
                pre.append("\n".join(lines[first:last]))
            self._break(place)
            controls, self._controls = self._controls, []
            for control, sight in reversed(controls):
                self._enter([control], replace(place, sight=sight), lambda: self._break(place))

        self._enter(element.contents, replace(place, preformatted=True), close)

    def _add_within_code(self, element: Tag, name: str, style: Style, place: _Place) -> None:
        assert self._code is not None
        if name in ("button", "select", "input"):
            self._controls.append((element, place.sight))  # for example "Copy", which is not part of the code
            return
        if name == "br":
            self._add_text("\n", place)
            return
        mark = _MARKS.get(name)
        if mark in ("sup", "sub"):
            opening, closing = mark_raised("|", mark).split("|")
            self._enter([opening, *element.contents, closing], place)
        elif mark == "del":
            self._enter(["~~", *element.contents, "~~"], place)
        elif name in _BLOCKS or style.get("display") in _BLOCK_DISPLAYS:
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

    def _add_rule(self, element: Tag, place: _Place) -> None:
        self._break(place)
        if not place.in_line and _is_flow(place):
            self._new("hr", place.container)

    def _add_br(self, element: Tag, place: _Place) -> None:
        self._add_line_break(place)
        # Add the children of the `br`: an old parser may have put the following nodes there.
        self._enter(element.contents, place)

    def _add_quote(self, element: Tag, place: _Place) -> None:
        mark = '"' if self._quotes % 2 == 0 else "'"
        self._quotes += 1

        def close() -> None:
            self._quotes -= 1

        self._enter([mark, *element.contents, mark], place, close)

    def _add_reading(self, element: Tag, place: _Place) -> None:
        if any(is_element(node) or str(node).strip() for node in element.children):
            self._enter(["(", *element.contents, ")"], place)

    def _add_picture(self, element: Tag, place: _Place) -> None:
        if not place.sight.seen:
            return
        address = self._absolute(str(element.get("src", "")))
        text = _SPACE.sub(" ", str(element.get("alt", ""))).strip()
        if address is None or not text:
            self._add_words(text, place)
            return
        self._flush()
        self._new("img", self._target(place, ""), src=address, alt=text)
        self._length += len(text)
        self._after_blank = self._at_line_start = False

    def _add_apart(self, text: str, place: _Place) -> None:
        """Add the words of a control, with blanks around the words in place of the control's border."""
        if text.strip():
            self._add_text(f" {text.strip()} ", place)

    def _add_input(self, element: Tag, place: _Place) -> None:
        kind = str(element.get("type", "text")).strip().lower() or "text"
        chosen = element.has_attr("checked")
        if kind == "checkbox":
            self._add_apart("[x]" if chosen else "[ ]", place)
        elif kind == "radio":
            self._add_apart("(x)" if chosen else "( )", place)
        elif kind == "image":
            self._add_apart(str(element.get("alt", "")), place)
        elif kind in _VALUES_OF_INPUT or kind not in ("hidden", "password", "file"):
            self._add_apart(str(element.get("value", "")), place)

    def _add_select(self, element: Tag, place: _Place) -> None:
        options = [option for option in element.find_all("option") if not option.has_attr("hidden")]
        chosen = [option for option in options if option.has_attr("selected")]
        if element.has_attr("multiple") or (number(element.get("size")) or 1) > 1:
            marked = (f"{'[x]' if option.has_attr('selected') else '[ ]'} {_label(option)}" for option in options)
            self._add_apart(", ".join(marked), place)
        else:
            self._add_apart(_label((chosen or options)[-1 if chosen else 0]) if options else "", place)

    def _add_button(self, element: Tag, place: _Place) -> None:
        self._enter([" ", *element.contents, " "], place)

    def _add_gauge(self, element: Tag, place: _Place) -> None:
        value, most = (str(element.get(name, "")).strip() for name in ("value", "max"))
        if is_float(value):
            self._add_apart(f"{value} of {most if is_float(most) else '1'}", place)


_INLINE_HANDLERS: dict[str, Callable[[SeenPage, Tag, _Place], None]] = {
    "hr": SeenPage._add_rule,
    "br": SeenPage._add_br,
    "q": SeenPage._add_quote,
    "rt": SeenPage._add_reading,
    "img": SeenPage._add_picture,
    "input": SeenPage._add_input,
    "select": SeenPage._add_select,
    "button": SeenPage._add_button,
    "progress": SeenPage._add_gauge,
    "meter": SeenPage._add_gauge,
}


def _is_unseen(element: Tag, name: str, style: Style, place: _Place) -> bool:
    if name in _UNSEEN or name == "nav" or element.has_attr("hidden") or element.has_attr("popover"):
        return True
    if name == "dialog" and not element.has_attr("open"):
        return True
    # Skip what is hidden from screen readers, but not a picture: a formula's picture is often hidden from them.
    if element.get("aria-hidden") == "true" and name != "img":
        return True
    return bool(style) and hides_all(style)


def _keeps_lines(style: Style, place: _Place) -> bool:
    space = style.get("white-space")
    return place.keeps_lines if space is None else space in _KEPT_LINES


def _is_flow(place: _Place) -> bool:
    """Return whether the place accepts any block."""
    return place.container.name not in ("ul", "ol", "table") and place.table is None


def _around_name(name: str, place: _Place) -> str:
    """Return "form" or "aside" for an element that may be dropped as a whole, and "" for any other."""
    kind = "form" if name == "form" else "aside" if name in _AROUND and not place.whole else ""
    return "" if kind in place.around else kind


def _part_name(element: Tag, name: str) -> str:
    if name in ("main", "article"):
        return name
    return "role=main" if element.get("role") == "main" else ""


def _mark_of(element: Tag, name: str, style: Style, absolute: Callable[[str], str | None]) -> _Mark | None:
    if name == "a":
        href = str(element.get("href", ""))
        address = None if href.startswith("#") else absolute(href)
        return _Mark("a", address) if address else None
    if name in _MARKS:
        return _Mark(_MARKS[name])
    if style.get("vertical-align") in ("super", "sub"):
        return _Mark("sup" if style["vertical-align"] == "super" else "sub")
    if "line-through" in style.get("text-decoration", "") + style.get("text-decoration-line", ""):
        return _Mark("del")
    return None


def _may_stand(mark: _Mark, place: _Place) -> bool:
    if len(place.marks) >= MAX_MARKS:
        return False
    return mark.name in _NESTING or all(other.name != mark.name for other in place.marks)


def _is_layout(table: Tag) -> bool:
    """Return whether the table only lays out parts of the page. The cells of such a table are no values."""
    if table.get("role") in ("presentation", "none"):
        return True
    parts: list[Tag] = []
    for child in elements(table):
        parts += elements(child) if child.name in _SECTIONS else [child]
    rows = [elements(part) for part in parts if part.name == "tr"]
    if any(part.name in ("caption", "th") for part in parts) or any(cell.name == "th" for r in rows for cell in r):
        return False
    if rows and all(len(row) <= 1 for row in rows) and all(part.name == "tr" for part in parts):
        return True
    return any(_is_long(cell) for row in rows for cell in row)


def _is_long(cell: Tag) -> bool:
    # Don't use `descendants`, which first goes to the end of the cell: in nested tables that takes quadratic time.
    length = count = 0
    open_nodes = [iter(cell.contents)]
    while open_nodes:
        node = next(open_nodes[-1], None)
        if node is None:
            open_nodes.pop()
            continue
        count += 1
        if is_element(node):
            open_nodes.append(iter(node.contents))
        else:
            length += len(str(node).strip())
        if length > LAYOUT_CELL or count > LAYOUT_NODES:
            return True
    return False


def _holds_line_breaks(element: Tag, name: str, place: _Place) -> bool:
    """Return whether the element is code of several lines. Don't search code within code: that takes quadratic time."""
    if name != "code" or len(place.marks) >= MAX_MARKS or any(mark.name == "code" for mark in place.marks):
        return False
    return element.find("br") is not None


def _label(option: Tag) -> str:
    return str(option.get("label", "")).strip() or option.get_text().strip()
