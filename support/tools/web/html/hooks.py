"""Hooks for markdownify's converter that write the elements of a seen page, each at linear cost.

`seen.py` builds the elements. A hook replaces a method of markdownify that would lose a value, break a table or take
quadratic time.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeGuard

if TYPE_CHECKING:
    from bs4 import Tag

# The text of a cell that spans rows is repeated in each row, if the text has at most this many characters.
REPEATED_TEXT = 200
SPANNED_TEXT = 500_000  # characters that the repeated texts of spanning cells may add to a page
_CELL = "cell"

_BACKTICKS = re.compile("`+")
_ORDINAL = re.compile(r"st|nd|rd|th", re.IGNORECASE)


def _mark_raised(text: str, tag: str) -> str:
    """Put a raised text into tags, as in `<sup>2</sup>`. Without a mark, 10² would read as 102."""
    return f"<{tag}>{text}</{tag}>"


def is_tag(node: object, name: str) -> TypeGuard[Tag]:
    """Return whether a node of a seen page is an element with this name."""
    return getattr(node, "name", None) == name


@dataclass
class _Row:
    """The cells of a row. Each cell consists of its first column, the column after its last column, and its text."""

    section: str
    is_head: bool
    cells: list[tuple[int, int, str]] = field(default_factory=list)


@dataclass
class _Carried:
    """A cell that spans into rows below its first row."""

    begin: int
    end: int
    text: str
    rows: int


class SeenPageHooks:
    """Hooks that convert a seen page. List this base class before markdownify's `MarkdownConverter`."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.complete = True  # False if text is missing, because cells of tables span too much
        # The texts of cells and captions, by `id(element)`. They are kept until their table is written.
        self._texts: dict[int, str] = {}
        self._spare = SPANNED_TEXT

    # Inline elements

    def convert_sup(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        """Mark raised text, except text that reads well without a mark: a note in brackets, or the "th" of "5th"."""
        before, word, after = _chomped(text)
        if not word:
            return text
        shown = el.get_text(strip=True)
        if shown.startswith("[") and shown.endswith("]"):
            return text
        if _ORDINAL.fullmatch(word) and _text_beside(el, "previous_sibling")[-1:].isdigit():
            return text
        return f"{before}{_mark_raised(word, 'sup')}{after}"

    def convert_sub(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        before, word, after = _chomped(text)
        return f"{before}{_mark_raised(word, 'sub')}{after}" if word else text

    def convert_del(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        before, words, after = _chomped(text)
        return f"{before}~~{words}~~{after}" if words else text

    def convert_strong(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        return _emphasized(el, text, "**")

    def convert_em(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        return _emphasized(el, text, "*")

    def convert_code(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        before, words, after = _chomped(text)
        return f"{before}{_code_span(words)}{after}" if words else text

    def convert_a(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        if not el.get_text(strip=True):
            return text  # write no link around a picture, because the picture is written with its own address
        before, words, after = _chomped(text)
        address = str(el["href"])
        return f"{before}<{address}>{after}" if words == address else f"{before}[{words}]({address}){after}"

    def convert_img(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        alt = str(el["alt"])
        return alt if "_inline" in parent_tags or _CELL in parent_tags else f"![{alt}]({el['src']})"

    # Blocks

    def convert_hN(self, n: int, el: Tag, text: str, parent_tags: Set[str]) -> str:
        mark = "" if _CELL in parent_tags else "#" * n + " "
        return f"\n\n{mark}{text.strip()}\n\n" if text.strip() else ""

    def convert_pre(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        lines = text.split("\n")
        if _CELL in parent_tags:
            return "\n\n" + "\n".join(_code_span(line) for line in lines if line.strip()) + "\n\n"
        fence = "`" * max(3, _longest_backticks(text) + 1)
        return f"\n\n{fence}{el.get('data-language', '')}\n{text}\n{fence}\n\n"

    def convert_blockquote(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        return f"\n\n{_indented(text.strip(), '> ', '> ')}\n\n" if text.strip() else ""

    def convert_list(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        if "li" not in parent_tags:
            return f"\n\n{text}\n\n"
        # Put no empty line between an item's words and its inner list. Text after the inner list is a new paragraph.
        return f"\n{text.rstrip()}" + ("\n\n" if el.next_sibling else "\n")

    convert_ul = convert_list
    convert_ol = convert_list

    def convert_li(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        marker = str(el["data-marker"])
        words = text.strip() if marker else text.strip("\n")
        before = f"{marker} " if marker else "  "
        return _indented(words, before, " " * len(before)) + "\n" if words else "\n"

    def convert_dd(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        return _indented(text.strip(), ":   ", "    ") + "\n" if text.strip() else "\n"

    def convert_form(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        return "" if el.get("data-dropped") else f"\n\n{text.strip()}\n\n"

    convert_aside = convert_form

    # Tables

    def convert_cell(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        self._texts[id(el)] = text
        return ""

    convert_caption = convert_cell

    def convert_row(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        return text

    def convert_table(self, el: Tag, text: str, parent_tags: Set[str]) -> str:
        """Write a table from the texts of its cells. As in a browser, text outside the cells comes first."""
        captions = [self._texts[id(child)].strip() for child in _children(el, "caption")]
        rows = self._rows(el)
        in_one_line = _CELL in parent_tags or "_inline" in parent_tags
        table = _as_lines(rows) if in_one_line else self._as_table(rows)
        parts = [part for part in (text.strip(), *captions, table) if part]
        return "\n\n" + "\n\n".join(parts) + "\n\n"

    def _rows(self, table: Tag) -> list[_Row]:
        """Return the rows from top to bottom. A row includes the cells that span into it from above."""
        rows: list[_Row] = []
        elements = sorted(_children(table, "row"), key=lambda row: _ORDER[str(row["data-section"])])
        for _, grouped in groupby(elements, key=lambda row: str(row["data-group"])):
            group = list(grouped)
            carried: list[_Carried] = []  # starts empty in each group of rows, because no cell spans beyond its group
            for index, element in enumerate(group):
                row, carried = self._row(element, carried, len(group) - index)
                rows.append(row)
        return [row for row in rows if row.cells]

    def _row(self, element: Tag, carried: list[_Carried], left: int) -> tuple[_Row, list[_Carried]]:
        cells = list(_children(element, _CELL))
        section = str(element["data-section"])
        row = _Row(section, bool(cells) and all(cell.get("data-head") for cell in cells))
        below: list[_Carried] = []
        waiting = iter(carried)
        above = next(waiting, None)
        column = 0

        def pass_over() -> None:
            nonlocal above, column
            while above is not None and above.begin <= column:
                self._spend(above.text)
                row.cells.append((above.begin, above.end, above.text))
                column = max(column, above.end)
                if above.rows > 1 and self._spare > 0:
                    below.append(_Carried(above.begin, above.end, above.text, above.rows - 1))
                above = next(waiting, None)

        for cell in cells:
            pass_over()
            text = self._texts[id(cell)]
            begin, column = column, column + int(str(cell["data-columns"]))
            row.cells.append((begin, column, text))
            rows = min(int(str(cell["data-rows"])) or left, left)
            if rows > 1:
                again = text if len(text) <= REPEATED_TEXT else ""
                below.append(_Carried(begin, column, again, rows - 1))
        while above is not None:
            column = above.begin
            pass_over()
        below.sort(key=lambda cell: cell.begin)
        return row, below

    def _spend(self, text: str) -> bool:
        self._spare -= len(text) + len(" |")
        if self._spare <= 0:
            self.complete = False
        return self._spare > 0

    def _as_table(self, rows: list[_Row]) -> str:
        # Leave out each column in which no cell begins: authors write "colspan=100" for the whole width of a table.
        columns = sorted({begin for row in rows for begin, _, _ in row.cells})
        if not columns:
            return ""
        lines = [self._line(row, columns) for row in rows]
        if not (rows[0].section == "head" or rows[0].is_head):
            lines.insert(0, [])
        lines[0] += [""] * (len(columns) - len(lines[0]))
        written = ["| " + " | ".join(line) + " |" for line in lines]
        written.insert(1, "| " + " | ".join(["---"] * len(columns)) + " |")
        return "\n".join(written)

    def _line(self, row: _Row, columns: list[int]) -> list[str]:
        """Return the texts of a row, one per column. A heading cell that spans columns is repeated in each column."""
        line: list[str] = []
        is_head = row.is_head or row.section == "head"
        for begin, end, text in row.cells:
            first = bisect_left(columns, begin)
            last = bisect_left(columns, end)
            shown = _cell_text(text)
            while len(line) < first and self._spend(""):
                line.append("")
            line.append(shown)
            again = shown if is_head and len(shown) <= REPEATED_TEXT else ""
            for _ in range(first + 1, last):
                if not self._spend(again):
                    break
                line.append(again)
        return line


_ORDER = {"head": 0, "body": 1, "foot": 2}


def _as_lines(rows: list[_Row]) -> str:
    """Return a table as text, one line per row. Use this form for a table within a cell or a heading."""
    lines = ("; ".join(words for *_, text in row.cells if (words := _one_line(text, " "))) for row in rows)
    return "\n".join(line for line in lines if line)


def _cell_text(text: str) -> str:
    return _one_line(text, "<br>").replace("|", "\\|")


def _one_line(text: str, separator: str) -> str:
    return separator.join(line.rstrip() for line in text.strip().split("\n") if line.strip())


def _children(element: Tag, name: str) -> Iterator[Tag]:
    return (child for child in element.children if is_tag(child, name))


def _indented(text: str, first: str, rest: str) -> str:
    first_line, *lines = text.split("\n")
    return "\n".join([first + first_line, *(f"{rest}{line}" if line else rest.rstrip() for line in lines)])


def _chomped(text: str) -> tuple[str, str, str]:
    """Split a text into leading blank, words and trailing blank, because a Markdown mark must touch its words."""
    return " " if text[:1] == " " else "", text.strip(), " " if text[-1:] == " " else ""


def _emphasized(el: Tag, text: str, mark: str) -> str:
    """Put the mark around the text, unless the text is a part of a word or of a number.

    For example, a 106 whose 6 is bold stays 106, because 10**6** would read as a power.
    """
    before, words, after = _chomped(text)
    if not words:
        return text
    within_word = (not before and _is_of_word(_text_beside(el, "previous_sibling")[-1:])) or (
        not after and _is_of_word(_text_beside(el, "next_sibling")[:1])
    )
    return text if within_word else f"{before}{mark}{words}{mark}{after}"


def _is_of_word(character: str) -> bool:
    # Exclude Chinese and the other scripts from U+2E80 on. They put no blanks between words, so a Markdown mark may
    # stand between any two characters.
    return character.isalnum() and character < "\u2e80"


_INLINE = frozenset({"a", "strong", "em", "del", "code", "sup", "sub"})


def _text_beside(el: Tag, side: Literal["previous_sibling", "next_sibling"]) -> str:
    """Return the text next to the element, or "" if the element is at the start or end of its line."""
    while getattr(el, side) is None and el.parent is not None and el.parent.name in _INLINE:
        el = el.parent
    beside = getattr(el, side)
    is_inline = beside is not None and getattr(beside, "name", None) in (None, *_INLINE)
    return str(beside.get_text()) if is_inline else ""


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in _BACKTICKS.findall(text)), default=0)


def _code_span(text: str) -> str:
    longest = _longest_backticks(text)
    mark = "`" * (longest + 1)
    return f"{mark} {text} {mark}" if longest else f"{mark}{text}{mark}"
