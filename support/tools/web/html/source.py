"""Drop scripts and style sheets from an HTML page before it is cut to size and parsed."""

from __future__ import annotations

import re
from html import escape

# A browser reads what stands in these up to their end tag as plain characters, and shows none of it.
_UNSEEN = frozenset({"script", "style", "iframe", "noembed", "noframes", "noscript"})
_SEEN = frozenset({"textarea", "title", "xmp"})  # plain characters too, but shown; entities count, except in xmp
_FOREIGN = frozenset({"svg", "math"})  # within these, "/>" closes any element
_HTML_WITHIN = frozenset({"foreignobject", "desc", "annotation-xml"})  # and within these, HTML begins again
# A drawing ends where one of these begins, whether or not it was closed.
_NOT_DRAWN = frozenset(
    {"blockquote", "body", "br", "center", "code", "dd", "div", "dl", "dt", "em", "h1", "h2", "h3", "h4", "h5", "h6"}
    | {"hr", "img", "li", "menu", "ol", "p", "pre", "ruby", "span", "strong", "sub", "sup", "table", "ul", "var"}
)
_NEAR = 8  # open drawings that an end tag may close at once

# libxml2 closes these where a paragraph or a cell begins, so that what it holds would be seen as not struck out, not
# hidden. It leaves alone what looks the same and has another name.
_OTHER_NAMES = {"s": "del", "strike": "del", "b": "strong", "i": "em", "tt": "code"}
_OTHER_NAMES |= dict.fromkeys(("font", "u", "big", "small"), "span")

_MARKUP = re.compile(r"<(?:(!--)|([!?]|/[^a-zA-Z])|(/?)([a-zA-Z][^ \t\n\f\r/>]*))")
_COMMENT_END = re.compile(r"--!?>")
_RAW_END = {name: re.compile(rf"</{name}(?=[ \t\n\f\r/>])", re.IGNORECASE) for name in _UNSEEN | _SEEN}
# Each pattern takes one piece, and nothing that the next one could take: no input makes them try again.
_BETWEEN = re.compile(r"[ \t\n\f\r/]*")
_NAME = re.compile(r"=?[^ \t\n\f\r/>=]*")
_EQUALS = re.compile(r"[ \t\n\f\r]*=[ \t\n\f\r]*")
_BARE_VALUE = re.compile(r"[^ \t\n\f\r>]*")


def source_of_seen(html: str, *, xml: bool = False) -> str:
    """Return the page without scripts, style sheets and frames, which may fill it and stand before its content.

    Old names of formatting elements become those of today. Tags are told from comments, attributes and plain text as
    the HTML standard says, in one pass. With `xml`, "/>" closes a script, as it does in XHTML.
    """
    kept: list[str] = []
    foreign: list[str] = []
    position = start = 0
    while markup := _MARKUP.search(html, position):
        comment, bogus, closing, name = markup.groups()
        if comment:
            ending = _COMMENT_END.search(html, markup.start() + 2)
            position = ending.end() if ending else len(html)
            continue
        if bogus:
            position = (html.find(">", markup.start()) + 1) or len(html)
            continue
        name = name.lower()
        position = _tag_end(html, markup.end())
        self_closed = html.endswith("/>", markup.start(), position)
        new_name = "desc" if name == "title" and foreign else _OTHER_NAMES.get(name, name)
        left = _follow(foreign, new_name, bool(closing), self_closed)
        if left:
            kept += html[start : markup.start()], *(f"</{drawing}>" for drawing in left)
            start = markup.start()
        drawn = bool(foreign) and foreign[-1] in _FOREIGN
        if closing and name in ("body", "html"):
            kept.append(html[start : markup.start()])  # what follows is still on the page
            start = position
        elif name == "plaintext" and not closing:
            kept += html[start : markup.start()], "<pre>", escape(html[position:])
            return "".join(kept)
        elif new_name in (_UNSEEN if drawn else _RAW_END) and not closing and not (self_closed and (xml or drawn)):
            ending = _RAW_END[name].search(html, position)
            inner_end = ending.start() if ending else len(html)
            plain = _plain(name, html[markup.start() : position], html[position:inner_end])
            kept += html[start : markup.start()], plain
            position = start = _tag_end(html, ending.end()) if ending else len(html)
        elif new_name != name:
            kept += html[start : markup.start(4)], new_name
            start = markup.end(4)
    kept.append(html[start:])
    return "".join(kept)


def _follow(foreign: list[str], name: str, closing: bool, self_closed: bool) -> list[str]:
    """Keep track of the drawings and formulas that a tag stands in, and return those that it ends unsaid."""
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
    """An element of plain characters so that every parser reads it as a browser does: libxml2 before 2.14 doesn't."""
    if name in _UNSEEN:
        return ""
    if name == "xmp":
        return f"<pre>{escape(text)}</pre>"
    return f"{tag}{text.replace('<', '&lt;')}</{name}>"


def _tag_end(html: str, position: int) -> int:
    """Behind the ">" of the tag whose name ends here: not behind one that stands in a quoted value."""
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
