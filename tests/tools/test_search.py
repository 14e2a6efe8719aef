"""The real ddgs client, through a CONNECT proxy that plays the search engines."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from web_servers import LoopbackServer, endless, page, received, response

from nexum_engine.errors import FinalError
from support.tools import ToolContext, web_search
from support.tools.web import WebError
from support.tools.web.live import LiveWeb

DUCKDUCKGO = "html.duckduckgo.com"
BRAVE = "search.brave.com"


def duckduckgo_page(*hits: tuple[str, str, str]) -> bytes:
    found = "".join(
        f'<div class="result__body"><h2><a>{title}</a></h2><a href="{href}">{body}</a></div>'
        for title, href, body in hits
    )
    return page(f"<html><body>{found or '<p>No results.</p>'}</body></html>", "text/html; charset=utf-8")


def brave_page(*hits: tuple[str, str, str]) -> bytes:
    found = "".join(
        f'<div data-type="web"><a href="{href}"><div class="title">{title}</div></a>'
        f'<div class="snippet"><div class="content">{body}</div></div></div>'
        for title, href, body in hits
    )
    return page(f"<html><body>{found}</body></html>", "text/html; charset=utf-8")


RUST = ("Rust", "https://www.rust-lang.org/", "A language that is fast and safe.")


class SearchEngines(LoopbackServer):
    """A CONNECT proxy that answers for every host."""

    def __init__(self, authority: trustme.CA) -> None:
        super().__init__()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(DUCKDUCKGO, BRAVE).configure_cert(self.tls)
        self.asked: list[str] = []

    def serve(self, connection: socket.socket) -> None:
        host = received(connection).split(b" ", 2)[1].decode().partition(":")[0]
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with contextlib.suppress(ssl.SSLError), self.tls.wrap_socket(connection, server_side=True) as secured:
            if request := received(secured):
                self.requests.append(request)
                self.asked.append(host)
                answer = self.answers[host]
                if callable(answer):
                    answer(secured)
                else:
                    secured.sendall(answer)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SearchEngines]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    running = SearchEngines(authority)
    with running:
        monkeypatch.setenv("PRIMP_CA_BUNDLE", str(tmp_path / "authority.pem"))
        monkeypatch.setenv("DDGS_PROXY", f"http://127.0.0.1:{running.port}")
        running.answers = {DUCKDUCKGO: duckduckgo_page(), BRAVE: brave_page()}
        yield running


async def search(query: str = "rust language", max_results: int = 5) -> object:
    context = ToolContext(idempotency_key="key", attempt=1, web=LiveWeb())
    return json.loads(await web_search.run({"query": query, "max_results": max_results}, context))


async def test_results_are_a_json_list_of_title_href_and_body(engines: SearchEngines) -> None:
    engines.answers[DUCKDUCKGO] = duckduckgo_page(RUST)
    assert await search() == [{"title": RUST[0], "href": RUST[1], "body": RUST[2]}]
    assert engines.asked == [DUCKDUCKGO]
    assert b"rust" in engines.requests[0]


async def test_search_returns_at_most_the_requested_results(engines: SearchEngines) -> None:
    hits = [(f"Rust {number}", f"https://example.org/{number}", "rust language") for number in range(8)]
    engines.answers[DUCKDUCKGO] = duckduckgo_page(*hits)
    found = await search(max_results=3)
    assert isinstance(found, list)
    assert len(found) == 3


async def test_links_that_cannot_be_visited_are_dropped_and_invisible_characters_too(engines: SearchEngines) -> None:
    hidden = "Ru\u200bst \u202eis\u2066 fast\U000e0041"
    engines.answers[DUCKDUCKGO] = duckduckgo_page(
        ("Rust", "javascript:alert(1)", "rust language"),
        ("Rust", "/internal", "rust language"),
        ("Rust", "http://localhost/rust", "rust language"),
        (hidden, "https://example.org/Ünicode page", hidden),
    )
    assert await search() == [
        {"title": "Rust is fast", "href": "https://example.org/%C3%9Cnicode+page", "body": "Rust is fast"}
    ]


async def test_empty_result_is_checked_on_a_second_engine(engines: SearchEngines) -> None:
    engines.answers[BRAVE] = brave_page(RUST)
    assert await search() == [{"title": RUST[0], "href": RUST[1], "body": RUST[2]}]
    assert engines.asked == [DUCKDUCKGO, BRAVE]


async def test_no_results_on_both_engines_are_an_empty_list_and_a_warning(
    engines: SearchEngines, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="support.tools.web.search"):
        assert await search() == []
    assert engines.asked == [DUCKDUCKGO, BRAVE]
    assert "limit how often" in caplog.text


@pytest.mark.parametrize("status", ["202 Accepted", "403 Forbidden", "429 Too Many Requests", "500 Internal"])
async def test_refusal_by_both_engines_may_be_retried(engines: SearchEngines, status: str) -> None:
    engines.answers = dict.fromkeys((DUCKDUCKGO, BRAVE), response("<html><p>busy</p></html>", status=status))
    with pytest.raises(
        WebError, match=f"duckduckgo: the server answered HTTP {status[:3]}; brave: .* HTTP {status[:3]}"
    ):
        await search()


async def test_a_refusal_by_one_engine_and_nothing_on_the_other_is_an_error(engines: SearchEngines) -> None:
    engines.answers[DUCKDUCKGO] = response(status="429 Too Many Requests")
    with pytest.raises(WebError, match="duckduckgo: the server answered HTTP 429"):
        await search()
    assert engines.asked == [DUCKDUCKGO, BRAVE]


async def test_a_refusal_by_the_first_engine_and_results_on_the_other_are_results(engines: SearchEngines) -> None:
    engines.answers = {DUCKDUCKGO: response(status="429 Too Many Requests"), BRAVE: brave_page(RUST)}
    assert await search() == [{"title": RUST[0], "href": RUST[1], "body": RUST[2]}]


@pytest.mark.parametrize("garbage", [b"not HTTP\r\n\r\n", b""], ids=["not HTTP", "nothing"])
async def test_garbage_from_both_engines_is_an_error_with_its_reason(engines: SearchEngines, garbage: bytes) -> None:
    engines.answers = dict.fromkeys((DUCKDUCKGO, BRAVE), garbage)
    with pytest.raises(WebError, match=r"the web search failed \(duckduckgo: \S+.*; brave: \S+"):
        await search()


async def test_engines_that_never_answer_are_an_error_and_not_an_empty_list(
    engines: SearchEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.tools.web.search.TIMEOUT", 1)
    engines.answers = dict.fromkeys((DUCKDUCKGO, BRAVE), endless(b"", b"", pause=0.05))
    with pytest.raises(WebError, match=r"the web search failed \(duckduckgo: \S+.*; brave: \S+"):
        await search()
    assert engines.asked == [DUCKDUCKGO, BRAVE]


async def test_an_unreachable_network_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DDGS_PROXY", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(WebError, match=r"the web search failed \(duckduckgo: \S+.*; brave: \S+"):
            await search()


@pytest.mark.parametrize("query", ["", "  \n"])
async def test_empty_query_is_a_final_error_without_a_search(engines: SearchEngines, query: str) -> None:
    with pytest.raises(FinalError, match="the query is empty"):
        await search(query)
    assert engines.connections == 0
