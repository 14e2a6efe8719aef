"""HTML to Markdown: the page's content, without what surrounds it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from support.tools.web.url import parse_url

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

MAX_HTML = 512_000  # characters; markdownify takes about 5 s a million
MAX_DEPTH = 250  # tags within tags; markdownify's recursion fails from 328 on
MOST = 0.5  # the share of a page's text that makes an element its content

_RAW = re.compile(r"<(script|style)\b", re.IGNORECASE)
_RAW_END = {name: re.compile(rf"</{name}\b[^>]*>", re.IGNORECASE) for name in ("script", "style")}
_NOT_CONTENT = (
    *("script", "style", "noscript", "template", "svg", "iframe", "object", "canvas", "audio", "video", "dialog"),
    *("nav", "aside", "footer", "button", "select", "textarea", "head"),
)
_HIDING = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_SPACE = re.compile("[ \t\r\n\f\u00a0\u2007\u202f]+")
_IN_LINK = str.maketrans({"(": "%28", ")": "%29"})


def html_to_markdown(html: str, url: str) -> tuple[str, bool]:
    """The content as Markdown, and whether all of the page was read."""
    from bs4 import BeautifulSoup

    html = _without_raw_text(html)
    soup = BeautifulSoup(html[:MAX_HTML], "lxml")
    title = _SPACE.sub(" ", soup.title.get_text()).strip() if soup.title else ""
    base = soup.find("base", href=True)
    base_url = urljoin(url, str(base["href"])) if base else url
    all_read = len(html) <= MAX_HTML
    if _depth(soup) > MAX_DEPTH:
        return _flat_text(soup), all_read
    _drop_what_is_not_content(soup)
    content = _main_content(soup)
    _keep_http_links(content, base_url)
    _join_lines(content)
    markdown = _markdown(content)
    if title and markdown.strip() and not re.search(r"^# ", markdown, re.MULTILINE):
        markdown = f"# {title}\n\n{markdown}"
    return markdown, all_read


def _without_raw_text(html: str) -> str:
    """Drop scripts and styles before the page is cut to size: they may fill it, and stand before the content."""
    kept: list[str] = []
    position = 0
    while opening := _RAW.search(html, position):
        kept.append(html[position : opening.start()])
        closing = _RAW_END[opening[1].lower()].search(html, opening.end())
        if closing is None:
            return "".join(kept)
        position = closing.end()
    return "".join(kept) + html[position:]


def _depth(soup: BeautifulSoup) -> int:
    from bs4 import Tag

    deepest = 0
    waiting: list[tuple[Tag, int]] = [(soup, 0)]
    while waiting:
        element, depth = waiting.pop()
        deepest = max(deepest, depth)
        waiting += [(child, depth + 1) for child in element.children if isinstance(child, Tag)]
    return deepest


def _flat_text(soup: BeautifulSoup) -> str:
    for element in soup.find_all(_NOT_CONTENT):
        if not element.decomposed:
            element.decompose()
    return "\n".join(line for line in map(str.strip, soup.get_text("\n").splitlines()) if line)


def _drop_what_is_not_content(soup: BeautifulSoup) -> None:
    from bs4.element import PreformattedString

    for text in list(soup.descendants):
        if isinstance(text, PreformattedString):  # comments, processing instructions, the doctype
            text.extract()
    for element in soup.find_all(_is_not_content):
        if not element.decomposed:
            element.decompose()
    length = _length(soup)
    for form in soup.find_all("form"):
        # Some frameworks put the whole page into one form.
        if _length(form) > MOST * length:
            form.unwrap()
        else:
            form.decompose()


def _is_not_content(element: Tag) -> bool:
    if element.name in _NOT_CONTENT or element.has_attr("hidden") or element.get("aria-hidden") == "true":
        return True
    if element.name == "header":
        # A page's header is navigation, an article's holds its headline.
        return element.find_parent(["main", "article"]) is None
    return bool(_HIDING.search(str(element.get("style", ""))))


def _main_content(soup: BeautifulSoup) -> Tag:
    whole = soup.body or soup
    for candidate in (soup.find("main"), soup.find(True, {"role": "main"}), soup.find("article")):
        if candidate is not None and _length(candidate) > MOST * _length(whole):
            return candidate
    return whole


def _length(element: Tag) -> int:
    return sum(len(text.strip()) for text in element.strings)


def _keep_http_links(content: Tag, base_url: str) -> None:
    for link in content.find_all("a"):
        href = str(link.get("href", ""))
        target = None if href.startswith("#") else _absolute(base_url, href)
        if target is None or not link.get_text(strip=True):
            link.unwrap()
        else:
            link.attrs = {"href": target}
    for image in content.find_all("img"):
        target = _absolute(base_url, str(image.get("src", "")))
        text = str(image.get("alt", "")).strip()
        if target is None or not text:
            image.replace_with(text)
        else:
            image.attrs = {"src": target, "alt": text}


def _absolute(base_url: str, href: str) -> str | None:
    try:
        return parse_url(urljoin(base_url, href.strip())).translate(_IN_LINK)
    except ValueError:
        return None


def _join_lines(content: Tag) -> None:
    """A line break in the source is a space on the page; without this, sentences would be broken across lines."""
    content.smooth()  # what was dropped has left neighbours, each with its own spaces
    for text in content.find_all(string=True):
        if text.find_parent(["pre", "listing", "xmp"]) is None:
            text.replace_with(_SPACE.sub(" ", text))


def _markdown(content: Tag) -> str:
    from markdownify import ATX, MarkdownConverter

    # No escaping: the text is for reading, and sentences stay quotable as they stand on the page.
    converter = MarkdownConverter(
        heading_style=ATX, bullets="-", escape_asterisks=False, escape_underscores=False, escape_misc=False
    )
    return str(converter.convert_soup(content))
