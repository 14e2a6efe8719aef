"""Parse HTML into a tree of elements, as the HTML standard says and browsers do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

# At most this many characters of a page are read. Text and tags count. Attributes, scripts and the contents of other
# elements that are never visible don't count. markdownify takes about 5 s for a million characters.
MAX_SIZE = 512_000

# An empty element of XHTML. The lookahead keeps the work linear.
_EMPTY = re.compile(r"<(?!br[\s/])([a-zA-Z][^\s/<>]*)(?=[\s/])([^<>]*)/>")


@dataclass(eq=False, slots=True)
class Element:
    """An element of a parsed page. Its name and the names of its attributes are in lower case."""

    name: str
    attrs: dict[str, str]
    parent: Element | None = None
    contents: list[Element | str] = field(default_factory=list)

    @property
    def elements(self) -> list[Element]:
        """The child elements."""
        return [node for node in self.contents if isinstance(node, Element)]

    @property
    def text(self) -> str:
        """The texts within the element."""
        return "".join(node for node in self.descendants() if isinstance(node, str))

    def descendants(self) -> Iterator[Element | str]:
        """Yield the elements and texts within this element, in the page's order."""
        open_nodes = [iter(self.contents)]
        while open_nodes:
            node = next(open_nodes[-1], None)
            if node is None:
                open_nodes.pop()
                continue
            yield node
            if isinstance(node, Element):
                open_nodes.append(iter(node.contents))


@dataclass(frozen=True)
class Document:
    """A parsed page. If `complete` is false, the page is longer than MAX_SIZE, and the rest is left out."""

    root: Element
    complete: bool
    title: str
    base: str | None  # the address in its `base` element
    sheets: list[str]


def parse(html: str, *, unseen: Set[str], xml: bool = False) -> Document:
    """Return the parsed page. Elements with names in `unseen` are empty. Set `xml` for XHTML."""
    from selectolax.lexbor import LexborDocumentOptions, LexborHTMLParser, SelectolaxError

    if xml:
        html = _html_of_xhtml(html)
    # With `scripting`, a `noscript` holds plain characters, as in browsers that run scripts. With WO_EVENTS, the parser
    # doesn't copy the selected option into a `selectedcontent` element: the option is read where it stands.
    try:
        page = LexborHTMLParser(html, options=LexborDocumentOptions.WO_EVENTS, scripting=True)
    except SelectolaxError as error:
        raise MemoryError from error  # this parser accepts any text, so it fails only for lack of memory
    assert page.root is not None
    root, complete = _tree(page.root, unseen)
    title = page.css_first("title:not(svg title)")
    base = page.css_first("base[href]")
    return Document(
        root,
        complete,
        title=title.text() if title else "",
        base=(base.attributes["href"] or "") if base else None,
        sheets=[one.text() for one in page.css("style") if one.attributes.get("media") not in ("print", "speech")],
    )


def _tree(root: LexborNode, unseen: Set[str]) -> tuple[Element, bool]:
    """Return the root as an element, and whether it holds the whole page."""
    top = Element("", {})
    size = 0
    open_nodes: list[tuple[Element, Iterator[LexborNode]]] = [(top, iter([root]))]
    while open_nodes and size <= MAX_SIZE:
        parent, nodes = open_nodes[-1]
        node = next(nodes, None)
        if node is None:
            open_nodes.pop()
        elif node.is_text_node:
            text = node.text_content or ""
            parent.contents.append(text[: MAX_SIZE - size])
            size += len(text)
        elif node.is_element_node:
            element = Element((node.tag or "").lower(), {k: v or "" for k, v in node.attributes.items()}, parent)
            parent.contents.append(element)
            if element.name == "template" and "shadowrootmode" in element.attrs:
                open_nodes.append((element, node.template_fragments()[0].iter(include_text=True)))
            elif element.name not in unseen:
                open_nodes.append((element, node.iter(include_text=True)))
                size += len(f"<{element.name}></>")
    return top.elements[0], size <= MAX_SIZE


def _html_of_xhtml(text: str) -> str:
    """Rewrite XHTML as HTML, which has no CDATA sections and no empty elements such as `<a/>`."""
    first, *sections = text.split("<![CDATA[")
    parts = (section.partition("]]>") for section in sections)
    return _EMPTY.sub(r"<\1\2></\1>", first + "".join(escape(plain) + rest for plain, _, rest in parts))
