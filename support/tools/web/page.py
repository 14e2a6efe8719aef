"""Convert a page of the live or the offline web to the Markdown that a model reads."""

from __future__ import annotations

import json
import re
from typing import Any

from nexum_engine.errors import FinalError
from support.tools.clean_text import cleaned, shortened
from support.tools.web import Page, WebError
from support.tools.web.charset import BodyKind, decoded, kind_of, media_type
from support.tools.web.html import html_to_markdown

MAX_TEXT = 20_000  # characters

_TRY_AGAIN = (408, 425, 429)
_MEANINGS = {401: "it asks for a login", 403: "it refuses access", 404: "there is no such page", 410: "it is gone"}


def page_to_markdown(page: Page, *, limit: int = MAX_TEXT) -> str:
    """Return the page's content, up to `limit` characters, with a note if it was cut.

    Raises FinalError if the page holds no readable text, WebError if a retry may succeed.
    """
    _check_status(page)
    kind = kind_of(page.content_type)
    name = shortened(page.url)
    if kind is None:
        media = shortened(media_type(page.content_type))
        raise FinalError(f"{name} is not a page but {media}; only HTML, text, JSON and XML can be read")
    try:
        text = decoded(page.body, page.content_type)
    except ValueError as error:
        raise FinalError(f"{name} {error}") from None
    complete = not page.truncated
    if kind is BodyKind.HTML:
        text, all_read = _markdown(text, page)
        complete = complete and all_read
    elif kind is BodyKind.JSON and complete and len(text) <= limit:
        text = _pretty(text)
    text = _tidy(cleaned(text))
    if not text:
        raise FinalError(f"{name} holds no text; it may need a browser that runs its scripts")
    return _bounded(text, limit, complete)


def heading(markdown: str) -> str:
    """Return the first heading of the highest level, or ""."""
    return next((line[2:].strip() for line in markdown.split("\n") if line.startswith("# ")), "")


def _check_status(page: Page) -> None:
    if 200 <= page.status < 300:
        return
    name = shortened(page.url)
    if page.status in _TRY_AGAIN or page.status >= 500:
        raise WebError(f"{name} could not be read: the server answered HTTP {page.status}")
    meaning = f" ({_MEANINGS[page.status]})" if page.status in _MEANINGS else ""
    raise FinalError(f"{name} was not read: the server answered HTTP {page.status}{meaning}")


def _markdown(html: str, page: Page) -> tuple[str, bool]:
    try:
        return html_to_markdown(html, page.url, xml=media_type(page.content_type) == "application/xhtml+xml")
    except MemoryError:
        raise
    except Exception as error:  # any error is final: a parser fails again on an unchanged page
        reason = f"{type(error).__name__}: {error}"
        raise FinalError(f"{shortened(page.url)} could not be converted to text ({shortened(reason)})") from error


def _pretty(text: str) -> str:
    """Return a JSON text with indentation, or unchanged if indenting would change a value."""

    def number(digits: str) -> float:
        value = float(digits)
        if repr(value) != digits:
            raise ValueError(digits)
        return value

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    def constant(name: str) -> float:
        raise ValueError(name)

    try:
        value = json.loads(text, parse_float=number, object_pairs_hook=members, parse_constant=constant)
        return json.dumps(value, indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _tidy(text: str) -> str:
    lines = (line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n").rstrip()


def _bounded(text: str, limit: int, complete: bool) -> str:
    if complete and len(text) <= limit:
        return text
    shown = min(len(text), limit)
    total = f" of {len(text):,}" if complete else ""
    more = "" if complete else "; the page continues"
    return f"{text[:limit]}\n\n[cut: the first {shown:,}{total} characters{more}]"
