"""Drop scripts and style sheets from an HTML page before it is cut to size and parsed."""

from __future__ import annotations

import re
from html import escape
from typing import NamedTuple

from support.tools.web.html.attributes import names
from support.tools.web.html.kinds import BLOCKS, HEADINGS

# Browsers read the contents of these elements as plain characters, and don't show them.
_UNSEEN = frozenset({"script", "style", "iframe", "noembed", "noframes", "noscript"})
# Browsers read the contents of these elements as plain characters, and show them. Entities are decoded, except in xmp.
_SEEN = frozenset({"textarea", "title", "xmp"})
_FOREIGN = frozenset({"svg", "math"})  # within these elements, "/>" closes any element
_HTML_WITHIN = frozenset({"foreignobject", "desc", "title", "annotation-xml"})  # within these, HTML begins again
# An unclosed drawing ends where one of these elements begins.
_NOT_DRAWN = names(
    "b big blockquote body br center code dd div dl dt em embed h1 h2 h3 h4 h5 h6 head hr i img li listing menu meta"
    " nobr ol p pre ruby s small span strong strike sub sup table tt u ul var"
)
_NEAR = 8  # the number of open drawings that one end tag may close
_READINGS = frozenset({"rb", "rt", "rtc", "rp"})  # the parts of a ruby, whose end tags may be left out
# An unclosed select ends where one of these elements begins.
_NOT_CHOSEN = names("input keygen textarea caption table tbody td tfoot th thead tr")
_VOID = names("area base br col embed hr img input link meta param source track wbr")

# Replace each old name by a newer name of equal look. libxml2 ends an element with an old name where a paragraph or a
# cell begins. The text after that point would lose the look of the element.
_OTHER_NAMES = {"s": "del", "strike": "del", "b": "strong", "i": "em", "tt": "code"}
_OTHER_NAMES |= dict.fromkeys(("font", "u", "big", "small"), "span") | {"image": "img"}

_MARKUP = re.compile(r"<(?:(!--)|([!?]|/[^a-zA-Z])|(/?)([a-zA-Z][^ \t\n\f\r/>]*))")
_COMMENT_END = re.compile(r"--!?>")
_RAW_END = {name: re.compile(rf"</{name}(?=[ \t\n\f\r/>])", re.IGNORECASE) for name in _UNSEEN | _SEEN}
_DRAWN_END = {name: re.compile(rf"</(?:{name}|(svg|math))(?=[ \t\n\f\r/>])", re.IGNORECASE) for name in _UNSEEN}
_SCRIPT_PART = re.compile(r"(<!--)|(-->)|<(/?)script(?=[ \t\n\f\r/>])", re.IGNORECASE)
_CDATA = "<![CDATA["
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


def next_tag(html: str, position: int, *, cdata: bool = False) -> Tag | None:
    """Return the next tag from a position on, or None. As the HTML standard says, skip comments and the like.

    With `cdata`, the start of a CDATA section counts as a tag, and its text as the tag's name.
    """
    while markup := _MARKUP.search(html, position):
        comment, bogus, closing, name = markup.groups()
        if name:
            return Tag(name.lower(), bool(closing), markup.start(), markup.end(), _tag_end(html, markup.end()))
        if comment:
            ending = _COMMENT_END.search(html, markup.start() + 2)
            position = ending.end() if ending else len(html)
        if bogus:
            if cdata and html.startswith(_CDATA, markup.start()):
                return Tag(_CDATA, False, markup.start(), markup.end(), markup.start() + len(_CDATA))
            position = (html.find(">", markup.start()) + 1) or len(html)
    return None


def attributes_of(html: str, tag: Tag) -> list[tuple[str, str]]:
    """Return the attributes of a tag, with names in lower case. Entities in values aren't decoded."""
    found = _ATTRIBUTE.findall(html, tag.name_end, tag.end)
    return [(name.lower(), value.strip("\"'")) for name, value in found]


def source_of_seen(html: str, *, xml: bool = False) -> tuple[str, list[str]]:
    """Return the page without scripts, style sheets, templates and frames, and the style sheets separately.

    Newer names replace old names of formatting elements, and tags are added that browsers imply and libxml2 doesn't.
    One pass tells tags from comments, attributes and plain text, as the HTML standard says. With `xml`, "/>" closes a
    script, as in XHTML.
    """
    kept: list[str] = []
    sheets: list[str] = []
    opened = _Open()
    position = start = 0
    while tag := next_tag(html, position, cdata=xml or opened.drawing):
        name, closing, position = tag.name, tag.closing, tag.end
        self_closed = html.endswith("/>", tag.start, position)
        within = bool(opened.foreign)
        implied = opened.follow(html, tag, self_closed)
        if implied:
            kept += html[start : tag.start], implied
            start = tag.start
        drawn = opened.drawing
        # The title of a drawing is not the title of the page.
        new_name = "drawing-title" if name == "title" and within else name if drawn else _OTHER_NAMES.get(name, name)
        if name == _CDATA:
            ending = html.find("]]>", position)
            kept += html[start : tag.start], escape(html[position : ending if ending >= 0 else len(html)])
            position = start = ending + len("]]>") if ending >= 0 else len(html)
        elif name == "embed" or (closing and name in ("body", "html")) or (name == "select" and implied):
            # Drop the tag, for one of three reasons. libxml2 would put the content after an `embed` into the `embed`.
            # Browsers show the content after the end of the body. A `select` within a `select` only ends the outer one.
            kept.append(html[start : tag.start])
            start = position
        elif name == "plaintext" and not closing and not drawn:
            kept += html[start : tag.start], "<pre>", escape(html[position:])
            return "".join(kept), sheets
        elif name == "template" and not (closing or drawn or (self_closed and xml) or _is_shadow_root(html, tag)):
            kept.append(html[start : tag.start])
            position = start = _template_end(html, position)
        elif new_name in (_UNSEEN if drawn else _RAW_END) and not closing and not (self_closed and (xml or drawn)):
            inner_end, end = _raw_end(html, name, position, drawn=drawn)
            if name == "style" and not _NOT_ON_SCREEN.search(html, tag.start, position):
                sheets.append(html[position:inner_end])
            kept += html[start : tag.start], _plain(name, html[tag.start : position], html[position:inner_end])
            position = start = end
        else:
            if new_name != name:
                kept += html[start : tag.name_end - len(name)], new_name
                start = tag.name_end
            if self_closed and not (xml or within or name in _FOREIGN or name in _VOID):
                kept += html[start : position - 1], " >"  # browsers ignore the slash, libxml2 only before a blank
                start = position
    kept.append(html[start:])
    return "".join(kept), sheets


class _Open:
    """The open elements that the tags of other elements may end."""

    def __init__(self) -> None:
        self.foreign: list[str] = []  # the open drawings and formulas, and the HTML within them
        self._reading: str | None = None  # the open part of a ruby, "" if none is open, or None outside a ruby
        self._select = False
        self._heading = ""
        self._paragraph = False

    @property
    def drawing(self) -> bool:
        return bool(self.foreign) and self.foreign[-1] in _FOREIGN

    def follow(self, html: str, tag: Tag, self_closed: bool) -> str:
        """Note which elements a tag begins and ends. Return the tags that browsers, unlike libxml2, imply before it."""
        if self.foreign or tag.name in _FOREIGN:
            return "".join(f"</{name}>" for name in self._follow_drawing(html, tag, self_closed))
        if tag.name in BLOCKS:
            return self._follow_block(tag.name, tag.closing)
        return self._follow_inline(tag.name, tag.closing)

    def _follow_block(self, name: str, closing: bool) -> str:
        in_paragraph, self._paragraph = self._paragraph, name == "p" and not closing
        if name == "p":
            return "<p>" if closing and not in_paragraph and not self._heading else ""
        if name in HEADINGS:
            heading, self._heading = self._heading, "" if closing else name
            paragraph = "</p>" if closing and in_paragraph else ""
            return f"{paragraph}</{heading}>" if closing and heading not in ("", name) else paragraph
        return self._select_end(name, closing)

    def _follow_inline(self, name: str, closing: bool) -> str:
        if name == "ruby":
            self._reading = None if closing else ""
        elif name in _READINGS and self._reading is not None:
            reading, self._reading = self._reading, "" if closing else name
            return f"</{reading}>" if reading and not closing else ""
        elif name == "select":
            ends, self._select = self._select and not closing, not self._select and not closing
            return "</select>" if ends else ""
        elif name == "br" and closing:
            return "<br>"
        return self._select_end(name, closing)

    def _select_end(self, name: str, closing: bool) -> str:
        if not self._select or closing or name not in _NOT_CHOSEN:
            return ""
        self._select = False
        return "</select>"

    def _follow_drawing(self, html: str, tag: Tag, self_closed: bool) -> list[str]:
        """Note which elements a tag in a drawing begins and ends. Return the names of the implicitly ended ones."""
        name, foreign = tag.name, self.foreign
        is_html = name in ("p", "br") if tag.closing else name in _NOT_DRAWN or _is_styled_font(html, tag)
        if foreign and foreign[-1] == "svg" and is_html:
            left = foreign[-_NEAR:][::-1]
            foreign.clear()
            return ["drawing-title" if one == "title" else one for one in left]
        if tag.closing:
            near = foreign[-_NEAR:]
            if name in near:
                del foreign[len(foreign) - 1 - near[::-1].index(name) :]
        elif not self_closed and (name in _FOREIGN or name in _HTML_WITHIN):
            foreign.append(name)
        return []


def _is_styled_font(html: str, tag: Tag) -> bool:
    return tag.name == "font" and any(name in ("color", "face", "size") for name, _ in attributes_of(html, tag))


def _is_shadow_root(html: str, template: Tag) -> bool:
    return any(name == "shadowrootmode" for name, _ in attributes_of(html, template))


def _template_end(html: str, position: int) -> int:
    """Return the position after the end tag of the template whose content begins here."""
    depth = 1
    while depth and (tag := next_tag(html, position)):
        position = tag.end
        if tag.name == "template":
            depth += -1 if tag.closing else 1
        elif tag.name in _RAW_END and not tag.closing:
            position = _raw_end(html, tag.name, position, drawn=False)[1]
    return position if depth == 0 else len(html)


def _raw_end(html: str, name: str, position: int, *, drawn: bool) -> tuple[int, int]:
    """Return the end of an element's plain characters, which begin here, and the position after its end tag."""
    if name == "script" and not drawn:
        ending = _script_end(html, position)
    else:
        ending = (_DRAWN_END if drawn else _RAW_END)[name].search(html, position)
    if ending is None:
        return len(html), len(html)
    ends_drawing = drawn and ending[1]
    return ending.start(), ending.start() if ends_drawing else _tag_end(html, ending.end())


def _script_end(html: str, position: int) -> re.Match[str] | None:
    """Return the match of a script's end tag. A comment in a script may hold a script with its own end tag."""
    in_comment = inner = False
    while part := _SCRIPT_PART.search(html, position):
        opening, closing, slash = part.groups()
        position = part.start() + 2 if opening else part.end()  # the comment's own dashes may end it, as in "<!-->"
        if opening:
            in_comment = True
        elif closing:
            in_comment = inner = False
        elif not slash:
            inner = in_comment
        elif inner:
            inner = False
        else:
            return part
    return None


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
