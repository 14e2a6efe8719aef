"""Implement the tools' interface `Web` for the live web."""

from __future__ import annotations

from functools import cached_property
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
        self._given_fetcher = fetcher
        self._hosts = AllowedHosts.from_environment()

    @cached_property
    def _fetcher(self) -> GuardedFetcher:
        from support.tools.web.fetch import GuardedFetcher

        return self._given_fetcher or GuardedFetcher(hosts=self._hosts)

    def search(self, query: str, max_results: int) -> list[SearchHit]:
        from support.tools.web.search import search

        return search(query, max_results)

    def fetch(self, url: str) -> Page:
        return self._fetcher.fetch(url)
