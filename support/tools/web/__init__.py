"""The web as the tools see it: the live one, or the offline one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict

from support.tools.clean_text import one_line
from support.tools.web.url import parse_url

TITLE_LENGTH = 300  # characters
EXCERPT_LENGTH = 2_000  # characters


class WebError(RuntimeError):
    """The web didn't answer as it should: another attempt may succeed."""


class SearchHit(BaseModel):
    """One result of a search: visible characters only, and an address that visit_webpage would accept."""

    model_config = ConfigDict(frozen=True)

    title: Annotated[str, AfterValidator(lambda text: one_line(text, TITLE_LENGTH))]
    href: Annotated[str, AfterValidator(parse_url)]
    body: Annotated[str, AfterValidator(lambda text: one_line(text, EXCERPT_LENGTH))]


@dataclass(frozen=True)
class Page:
    """An HTTP response, as far as it was read."""

    url: str  # after redirects
    status: int
    content_type: str  # the header's value, "" if there was none
    body: bytes
    truncated: bool = False  # the body went on, past the limit


class Web(Protocol):
    """Both calls block; they run in a tool's own thread."""

    def search(self, query: str, max_results: int) -> list[SearchHit]:
        """What a search engine finds; an empty list only if it says that there is nothing."""
        ...

    def fetch(self, url: str) -> Page:
        """The response at a checked address. FinalError if it may not be read, WebError if it can't be now."""
        ...
