"""The offline web: search and fetch the pages of one folder. BM25 ranks the hits of a search.

Put a Markdown or HTML file into the folder to add a page. The file's name is the page's address.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from nexum_engine.errors import FinalError
from support.offline.reading import best_passage, words
from support.tools import Page, SearchHit
from support.tools.web import WebError
from support.tools.web.page import heading, page_to_markdown

logger = logging.getLogger(__name__)

HOST = "offline.example"  # not a real site: RFC 2606 reserves .example
PAGES = Path(__file__).parent / "pages"
MAX_BODY = 2 * 1024 * 1024  # bytes; a live page has an equal limit
EXCERPT_LENGTH = 300  # characters
CONTENT_TYPES = {
    ".md": "text/markdown; charset=utf-8",
    ".markdown": "text/markdown; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".htm": "text/html; charset=utf-8",
}

# K1 and B have BM25's usual values. K1 bounds the weight of a repeated word. B is the penalty for a long page.
K1 = 1.2
B = 0.75
TITLE_WEIGHT = 4  # a word in the title counts as this many occurrences in the text

COVERED = 0.66  # a page covers a query if it holds this share of the query's words, by weight
COVERED_LONG = 0.5  # replaces COVERED for a long query: some words of a long query don't matter
LONG_QUERY = 5  # a query of this many content words or more is long


@dataclass(frozen=True)
class _Indexed:
    url: str
    title: str
    text: str
    counts: Counter[str]
    length: int


class OfflineWeb:
    """A `Web` that reads the pages of one folder. Each call reads the files again, so it finds new pages at once."""

    def __init__(self, folder: Path = PAGES) -> None:
        self.folder = folder

    def search(self, query: str, max_results: int) -> list[SearchHit]:
        """Return the pages that cover the query, best first."""
        index = self._index()
        ranked = [(score, page) for page in index if (score := _score(query, page, index)) > 0]
        ranked.sort(key=lambda entry: (-entry[0], entry[1].url))
        return [
            SearchHit(title=page.title, href=page.url, body=best_passage(query, page.text, EXCERPT_LENGTH))
            for _, page in ranked[:max_results]
        ]

    def fetch(self, url: str) -> Page:
        """Return the file at this address as a page, or a page with status 404."""
        parts = urlsplit(url)
        slug = unquote(parts.path).strip("/")
        # Never join the address to the folder's path: it could lead out of the folder.
        path = next((path for path in self._files() if path.stem == slug), None)
        if parts.hostname != HOST or path is None:
            return Page(url, 404, "text/plain; charset=utf-8", b"Not found\n")
        return _page(url, path)

    def topics(self) -> list[str]:
        """Return the pages' titles in alphabetical order."""
        return sorted((page.title for page in self._index()), key=str.lower)

    def _files(self) -> list[Path]:
        try:
            files = sorted(self.folder.iterdir())
        except OSError as error:
            raise WebError(f"the offline pages can't be read: {error.strerror}") from error
        return [path for path in files if path.suffix.lower() in CONTENT_TYPES and not path.name.startswith(".")]

    def _index(self) -> list[_Indexed]:
        pages: dict[str, _Indexed] = {}
        for path in self._files():
            url = f"https://{HOST}/{quote(path.stem)}"
            try:
                text = page_to_markdown(_page(url, path))
            except (OSError, FinalError) as error:
                logger.warning("the offline page %s is left out: %s", path.name, error)
                continue
            title = heading(text) or path.stem.replace("-", " ")
            counts = Counter(words(text))
            for word in words(title):
                counts[word] += TITLE_WEIGHT - 1  # minus 1: the title also counts as a part of the text
            pages.setdefault(url, _Indexed(url, title, text, counts, counts.total()))
        return list(pages.values())


def _page(url: str, path: Path) -> Page:
    with path.open("rb") as file:
        body = file.read(MAX_BODY + 1)
    return Page(url, 200, CONTENT_TYPES[path.suffix.lower()], body[:MAX_BODY], truncated=len(body) > MAX_BODY)


def _score(query: str, page: _Indexed, index: Sequence[_Indexed]) -> float:
    """Return a page's Okapi BM25 score, or 0 if the page doesn't cover the query.

    Don't use a library for BM25: libraries need numpy. Besides, ranking, coverage and the choice of sentences must all
    split words as `reading.words` does.
    """
    asked = sorted(set(words(query)))
    weights = {word: _weight(word, index) for word in asked}
    held = [word for word in asked if page.counts[word]]
    needed = COVERED if len(asked) < LONG_QUERY else COVERED_LONG
    if not held or sum(weights[word] for word in held) < needed * sum(weights.values()):
        return 0.0
    mean_length = sum(other.length for other in index) / len(index)
    held_back = K1 * (1 - B + B * page.length / mean_length)
    return sum(
        weights[word] * page.counts[word] * (K1 + 1) / (page.counts[word] + held_back)
        for word in held  # sorted, so that the sum is the same in every process
    )


def _weight(word: str, index: Sequence[_Indexed]) -> float:
    """Return a word's inverse document frequency. The fewer pages hold the word, the greater its weight."""
    holding = sum(1 for page in index if page.counts[word])
    return math.log(1 + (len(index) - holding + 0.5) / (holding + 0.5))
