"""Drop scripts and style sheets from an HTML page before it is cut to size and parsed."""

from __future__ import annotations

import re
from html import escape
from typing import NamedTuple

# Browsers read the contents of these elements as plain characters, and don't show them.
_UNSEEN = frozenset({"script", "style", "iframe", "noembed", "noframes", "noscript"})
# Browsers read the contents of these elements as plain characters, and show them. Entities are decoded, except in xmp.
_SEEN = frozenset({"textarea", "title", "xmp"})
_FOREIGN = frozenset({"svg", "math"})  # within these elements, "/>" closes any element
_HTML_WITHIN = frozenset({"foreignobject", "desc", "annotation-xml"})  # within these, HTML begins again
# An unclosed drawing ends where one of these elements begins.
_NOT_DRAWN = frozenset(
    {"blockquote", "body", "br", "center", "code", "dd", "div", "dl", "dt", "em", "h1", "h2", "h3", "h4", "h5", "h6"}
    | {"hr", "img", "li", "menu", "ol", "p", "pre", "ruby", "span", "strong", "sub", "sup", "table", "ul", "var"}
)
_NEAR = 8  # the number of open drawings that one end tag may close

# Replace each old name by a newer name of equal look. libxml2 closes an element with an old name where a paragraph or a
# cell begins. The contents of that element would lose their look, such as struck out or hidden.
_OTHER_NAMES = {"s": "del", "strike": "del", "b": "strong", "i": "em", "tt": "code"}
_OTHER_NAMES |= dict.fromkeys(("font", "u", "big", "small"), "span")

_MARKUP = re.compile(r"<(?:(!--)|([!?]|/[^a-zA-Z])|(/?)([a-zA-Z][^ \t\n\f\r/>]*))")
_COMMENT_END = re.compile(r"--!?>")
_RAW_END = {name: re.compile(rf"</{name}(?=[ \t\n\f\r/>])", re.IGNORECASE) for name in _UNSEEN | _SEEN}
# No pattern matches a character that the next pattern could match, so that no input causes backtracking.
_BETWEEN = re.compile(r"[ \t\n\f\r/]*")
_NAME = re.compile(r"=?[^ \t\n\f\r/>=]*")
_EQUALS = re.compile(r"[ \t\n\f\r]*=[ \t\n\f\r]*")
_NOT_ON_SCREEN = re.compile(r"[ \t\n\f\r]media=[\"']?(?:print|speech)[\"' >]", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"([^ \t\n\f\r/>=]+)[ \t\n\f\r]*=[ \t\n\f\r]*(\"[^\"]*\"|'[^']*'|[^ \t\n\f\r>]*)")
_BARE_VALUE = re.compile(r"[^ \t\n\f\r>]*")


class Tag(NamedTuple):
    """The place of a tag in a page's source."""

    name: str  # in lower case
    closing: bool
    start: int
    name_end: int
    end: int


def next_tag(html: str, position: int) -> Tag | None:
    """Return the next tag from a position on, or None. As the HTML standard says, skip comments and the like."""
    while markup := _MARKUP.search(html, position):
        comment, bogus, closing, name = markup.groups()
        if name:
            return Tag(name.lower(), bool(closing), markup.start(), markup.end(), _tag_end(html, markup.end()))
        if comment:
            ending = _COMMENT_END.search(html, markup.start() + 2)
            position = ending.end() if ending else len(html)
        if bogus:
            position = (html.find(">", markup.start()) + 1) or len(html)
    return None


def attributes_of(html: str, tag: Tag) -> list[tuple[str, str]]:
    """Return the attributes of a tag, with names in lower case. Entities in values aren't decoded."""
    found = _ATTRIBUTE.findall(html, tag.name_end, tag.end)
    return [(name.lower(), value.strip("\"'")) for name, value in found]


def source_of_seen(html: str, *, xml: bool = False) -> tuple[str, list[str]]:
    """Return the page without scripts, style sheets and frames (they may be large), and return the style sheets.

    Newer names replace old names of formatting elements. One pass tells tags from comments, attributes and plain
    text, as the HTML standard says. With `xml`, "/>" closes a script, as in XHTML.
    """
    kept: list[str] = []
    sheets: list[str] = []
    foreign: list[str] = []
    position = start = 0
    while tag := next_tag(html, position):
        name, closing, position = tag.name, tag.closing, tag.end
        self_closed = html.endswith("/>", tag.start, position)
        new_name = "desc" if name == "title" and foreign else _OTHER_NAMES.get(name, name)
        left = _follow(foreign, new_name, closing, self_closed)
        if left:
            kept += html[start : tag.start], *(f"</{drawing}>" for drawing in left)
            start = tag.start
        drawn = bool(foreign) and foreign[-1] in _FOREIGN
        if closing and name in ("body", "html"):
            kept.append(html[start : tag.start])  # drop the end tag, because browsers show what follows
            start = position
        elif name == "plaintext" and not closing:
            kept += html[start : tag.start], "<pre>", escape(html[position:])
            return "".join(kept), sheets
        elif new_name in (_UNSEEN if drawn else _RAW_END) and not closing and not (self_closed and (xml or drawn)):
            ending = _RAW_END[name].search(html, position)
            inner_end = ending.start() if ending else len(html)
            if name == "style" and not _NOT_ON_SCREEN.search(html, tag.start, position):
                sheets.append(html[position:inner_end])
            plain = _plain(name, html[tag.start : position], html[position:inner_end])
            kept += html[start : tag.start], plain
            position = start = _tag_end(html, ending.end()) if ending else len(html)
        elif new_name != name:
            kept += html[start : tag.name_end - len(name)], new_name
            start = tag.name_end
    kept.append(html[start:])
    return "".join(kept), sheets


def _follow(foreign: list[str], name: str, closing: bool, self_closed: bool) -> list[str]:
    """Update `foreign`, the open drawings and formulas, for a tag. Return the names that the tag closes implicitly."""
    if closing:
        near = foreign[-_NEAR:]
        if name in near:
            del foreign[len(foreign) - 1 - near[::-1].index(name) :]
    elif foreign and foreign[-1] == "svg" and name in _NOT_DRAWN:
        left = foreign[-_NEAR:][::-1]
        foreign.clear()
        return left
    elif not self_closed and (name in _FOREIGN or (foreign and name in _HTML_WITHIN)):
        foreign.append(name)
    return []


def _plain(name: str, tag: str, text: str) -> str:
    """Return an element of plain characters in a form that every parser reads correctly, even libxml2 before 2.14."""
    if name in _UNSEEN:
        return ""
    if name == "xmp":
        return f"<pre>{escape(text)}</pre>"
    return f"{tag}{text.replace('<', '&lt;')}</{name}>"


def _tag_end(html: str, position: int) -> int:
    """Return the position after the ">" of the tag whose name ends here. A ">" in a quoted value doesn't count."""
    while True:
        position = _end(_BETWEEN, html, position)
        if position >= len(html):
            return len(html)
        if html[position] == ">":
            return position + 1
        position = _end(_NAME, html, position)
        equals = _EQUALS.match(html, position)
        if equals is None:
            continue
        position = equals.end()
        quote = html[position : position + 1]
        if quote in ('"', "'"):
            position = (html.find(quote, position + 1) + 1) or len(html)
        else:
            position = _end(_BARE_VALUE, html, position)


def _end(pattern: re.Pattern[str], html: str, position: int) -> int:
    found = pattern.match(html, position)
    return found.end() if found else position
