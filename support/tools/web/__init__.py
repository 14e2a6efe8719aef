"""Define the interface `Web`, through which the tools use the live or the offline web."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict

from support.tools.clean_text import one_line
from support.tools.web.url import parse_url

TITLE_LENGTH = 300  # characters
EXCERPT_LENGTH = 2_000  # characters


class WebError(RuntimeError):
    """A search failed or a page could not be read; a retry may succeed."""


class SearchHit(BaseModel):
    """One result of a search. Its text has only visible characters, and visit_webpage accepts its address."""

    model_config = ConfigDict(frozen=True)

    title: Annotated[str, AfterValidator(lambda text: one_line(text, TITLE_LENGTH))]
    href: Annotated[str, AfterValidator(parse_url)]
    body: Annotated[str, AfterValidator(lambda text: one_line(text, EXCERPT_LENGTH))]


@dataclass(frozen=True)
class Page:
    """An HTTP response, with the part of its body that was read."""

    url: str  # after redirects
    status: int
    content_type: str  # the value of the Content-Type header, or "" without one
    body: bytes
    truncated: bool = False  # the body is longer than the limit

    # Write the body as base64 in JSON: a page is passed as JSON to the process that converts it.
    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")


class Web(Protocol):
    """The live or the offline web. Both methods block, so call them in a tool's thread."""

    def search(self, query: str, max_results: int) -> list[SearchHit]:
        """Return the hits of a search. Return [] only if the search engine reports that there are none."""
        ...

    def fetch(self, url: str) -> Page:
        """Return the response from a checked address. Raises WebError if a retry may succeed, else FinalError."""
        ...
