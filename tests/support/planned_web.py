"""A web with planned answers, for the tests of the tools."""

from __future__ import annotations

from support.tools import Page, SearchHit, ToolContext


class PlannedWeb:
    """A web that returns these hits and this page, and keeps the requests in `asked`."""

    def __init__(self, *hits: SearchHit, page: Page | None = None) -> None:
        self.hits = list(hits)
        self.page = page
        self.asked: list[object] = []

    def search(self, query: str, max_results: int) -> list[SearchHit]:
        self.asked.append((query, max_results))
        return self.hits

    def fetch(self, url: str) -> Page:
        self.asked.append(url)
        assert self.page is not None
        return self.page


def context(web: PlannedWeb | None = None) -> ToolContext:
    return ToolContext(idempotency_key="key-1", attempt=2, web=web or PlannedWeb())
