"""Implement the tools' interface `Web` for the live web."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.tools.web import Page, SearchHit
from support.tools.web.hosts import AllowedHosts

if TYPE_CHECKING:
    from support.tools.web.fetch import GuardedFetcher


class LiveWeb:
    """The live web: ddgs searches, and GuardedFetcher reads public pages. Both are imported at first use.

    If NEXUM_ALLOWED_HOSTS lists hosts, only their pages can be read. Raises InvalidRequest if the list is wrong.
    """

    def __init__(self, fetcher: GuardedFetcher | None = None) -> None:
        self._fetcher = fetcher
        self._hosts = AllowedHosts.from_environment()

    def search(self, query: str, max_results: int) -> list[SearchHit]:
        from support.tools.web.search import search

        return search(query, max_results)

    def fetch(self, url: str) -> Page:
        if self._fetcher is None:
            from support.tools.web.fetch import GuardedFetcher

            self._fetcher = GuardedFetcher(hosts=self._hosts)
        return self._fetcher.fetch(url)
