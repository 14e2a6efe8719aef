"""Convert HTML to Markdown: the visible content of a page, without navigation and other surroundings."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from support.tools.web.html.hooks import SeenPageHooks
from support.tools.web.html.kinds import UNSEEN
from support.tools.web.html.seen import SeenPage
from support.tools.web.html.sheets import Sheets
from support.tools.web.html.tree import parse
from support.tools.web.url import parse_url

if TYPE_CHECKING:
    from bs4 import Tag

MAX_ADDRESS = 2083  # the longest base address, in characters; pydantic's HttpUrl sets the same limit for a link

_SPACE = re.compile("[ \t\r\n\f\u00a0\u2007\u202f]+")
_IN_LINK = str.maketrans({"(": "%28", ")": "%29"})


def html_to_markdown(html: str, url: str, *, xml: bool = False) -> tuple[str, bool]:
    """Return the page's content as Markdown, and whether the whole page was read. Set `xml` for XHTML."""
    page = parse(html, unseen=UNSEEN, xml=xml)
    base_url = _base_url(page.base, url)
    for rules in (Sheets(page.sheets), Sheets([])):
        content = SeenPage(page.root, rules, lambda address: _absolute(base_url, address), _element_maker()).content
        markdown, complete = _markdown(content)
        if markdown.strip():
            break
        # The style sheets hide everything until a script runs. Convert the page again, without the sheets.
    title = _SPACE.sub(" ", page.title).strip()
    if title and markdown.strip() and content.find("h1") is None:
        markdown = f"# {title}\n\n{markdown}"
    return markdown, complete and page.complete


def _base_url(base: str | None, url: str) -> str:
    """Return the base address of the page's relative links, or "" if that address is too long."""
    if base is None:
        return url
    href = base.strip()
    if len(href) > MAX_ADDRESS:
        return ""
    try:
        joined = urljoin(url, href)
    except ValueError:  # ignore an invalid base, as browsers do
        return url
    return joined if joined.startswith(("http:", "https:")) else url


def _absolute(base_url: str, address: str) -> str | None:
    try:
        return parse_url(urljoin(base_url, address.strip())).translate(_IN_LINK)
    except ValueError:
        return None


def _element_maker() -> Callable[[str], Tag]:
    from bs4 import Tag

    class Element(Tag):
        def find_parent(self, *args: object, **more: object) -> None:
            """Return None, because no element of a seen page is within a `pre`.

            markdownify looks for a `pre` around each element. A real search would take most of the conversion's time.
            """

    return lambda name: Element(name=name)


def _markdown(content: Tag) -> tuple[str, bool]:
    from markdownify import ATX, MarkdownConverter

    class Converter(SeenPageHooks, MarkdownConverter):
        pass

    # Don't escape characters of the text, so that sentences can be quoted verbatim.
    converter = Converter(
        heading_style=ATX, bullets="-", escape_asterisks=False, escape_underscores=False, escape_misc=False
    )
    return str(converter.convert_soup(content)), converter.complete
