"""Search the web with ddgs, one back-end after the other.

ddgs raises "No results found." for an empty result, for a refused request and for a timeout. The HTTP statuses of the
back-end's responses tell which of the three happened.
"""

from __future__ import annotations

import logging
from typing import Any

from ddgs.base import BaseSearchEngine

# Don't import ddgs.DDGS, which is a proxy: calling a subclass of the proxy creates a plain DDGS.
from ddgs.ddgs import DDGS
from ddgs.exceptions import DDGSException
from pydantic import ValidationError

from support.tools.clean_text import one_line
from support.tools.web import SearchHit, WebError

logger = logging.getLogger(__name__)

# Name each back-end, because ddgs's "auto" asks more than one back-end. DuckDuckGo uses Bing's index, and Brave uses an
# index of its own.
BACKENDS = ("duckduckgo", "brave")
TIMEOUT = 10  # seconds for each back-end
_NO_RESULTS = "No results found."


def search(query: str, max_results: int) -> list[SearchHit]:
    """Return the hits of the first back-end that has hits. Return [] only if every back-end reports no results."""
    failures: list[str] = []
    for backend in BACKENDS:
        try:
            hits = _search_one(backend, query, max_results)
        except WebError as error:
            logger.info("web search on %s failed: %s", backend, error)
            failures.append(f"{backend}: {error}")
            continue
        if hits:
            return hits
    if failures:
        raise WebError(f"the web search failed ({'; '.join(failures)})")
    logger.warning(
        "no results for %r on %s: there may be none, or the search engines limit how often this address may ask",
        query,
        " and ".join(BACKENDS),
    )
    return []


def _search_one(backend: str, query: str, max_results: int) -> list[SearchHit]:
    client = _WatchedDDGS(timeout=TIMEOUT)
    try:
        rows = client.text(query, max_results=max_results, backend=backend)
    except DDGSException as error:
        if str(error) != _NO_RESULTS:
            raise WebError(one_line(str(error), 300)) from error
        if not client.statuses:
            raise WebError(f"no answer within {TIMEOUT} s") from error
        # DuckDuckGo answers 202 to a client that sends too many requests.
        if refused := [status for status in client.statuses if status != 200]:
            raise WebError(f"the server answered HTTP {refused[0]}") from error
        return []
    return [hit for row in rows if (hit := _hit(row)) is not None]


def _hit(row: dict[str, Any]) -> SearchHit | None:
    try:
        return SearchHit.model_validate({name: row.get(name) for name in ("title", "href", "body")})
    except ValidationError:
        return None  # not a valid hit, such as an advertisement or a link within the search engine


class _WatchedDDGS(DDGS):
    """A DDGS client that keeps the HTTP statuses of its engines' responses."""

    def __init__(self, timeout: int) -> None:
        super().__init__(timeout=timeout)
        self.statuses: list[int] = []

    def _get_engines(self, category: str, backend: str) -> list[BaseSearchEngine[Any]]:
        engines = super()._get_engines(category, backend)
        for engine in engines:
            request = engine.http_client.request

            def watched(*args: Any, request: Any = request, **kwargs: Any) -> Any:
                response = request(*args, **kwargs)
                self.statuses.append(response.status_code)
                return response

            setattr(engine.http_client, "request", watched)  # noqa: B010  (mypy rejects a plain assignment)
        return engines
