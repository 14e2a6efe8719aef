"""The interface to the web that the tools use, live or offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict

from support.tools.clean_text import one_line
from support.tools.web.url import parse_url

TITLE_LENGTH = 300  # characters
EXCERPT_LENGTH = 2_000  # characters


class WebError(RuntimeError):
    """A search or a page could not be had now; a retry may succeed."""


class SearchHit(BaseModel):
    """One result of a search, with visible characters only and an address that visit_webpage accepts."""

    model_config = ConfigDict(frozen=True)

    title: Annotated[str, AfterValidator(lambda text: one_line(text, TITLE_LENGTH))]
    href: Annotated[str, AfterValidator(parse_url)]
    body: Annotated[str, AfterValidator(lambda text: one_line(text, EXCERPT_LENGTH))]


@dataclass(frozen=True)
class Page:
    """An HTTP response, with the part of its body that was read."""

    url: str  # after redirects
    status: int
    content_type: str  # the header's value, "" if there was none
    body: bytes
    truncated: bool = False  # the body is longer than the limit


class Web(Protocol):
    """The live or the offline web. Both methods block; they run in a tool's thread."""

    def search(self, query: str, max_results: int) -> list[SearchHit]:
        """Return the hits of a search engine; [] only if the engine reports that there are none."""
        ...

    def fetch(self, url: str) -> Page:
        """Return the response from a checked address. Raises FinalError if it may not be read, else WebError."""
        ...
