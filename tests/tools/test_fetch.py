"""The guarded fetch with real servers on loopback. An injected policy accepts one loopback address as public."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
import trustme
from loopback_fetcher import FORBIDDEN, PUBLIC, fetcher, resolve_to
from web_servers import LoopbackServer, page, redirect, response

from nexum_engine.errors import FinalError
from support.tools.web import WebError
from support.tools.web.addresses import Address


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as running:
        yield running


@pytest.fixture
def trap() -> Iterator[LoopbackServer]:
    """Yield a server that must not be reached."""
    try:
        running = LoopbackServer({"/": page("secret")}, address=str(FORBIDDEN))
    except OSError:
        pytest.skip(f"this system has no {FORBIDDEN}")
    with running:
        yield running


def test_a_page_is_read_with_the_host_name_of_its_url(server: LoopbackServer) -> None:
    server.answers["/a?b=c"] = page("hello")
    url = f"http://public.test:{server.port}/a?b=c"
    found = fetcher().fetch(url + "#part")
    assert (found.url, found.status, found.body, found.truncated) == (url + "#part", 200, b"hello", False)
    assert found.content_type == "text/plain; charset=utf-8"
    assert f"host: public.test:{server.port}".encode() in server.requests[0].lower()


def test_trap_counts_connections(trap: LoopbackServer) -> None:
    open_to_it = fetcher(resolver=resolve_to(FORBIDDEN), address_policy=lambda address: True)
    assert open_to_it.fetch(f"http://public.test:{trap.port}/").body == b"secret"
    assert trap.connections == 1


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed_to_the_final_address(server: LoopbackServer, status: str) -> None:
    server.answers["/"] = redirect("/next?x=ü", status)
    server.answers["/next?x=%C3%BC"] = page("there")
    found = fetcher().fetch(f"http://public.test:{server.port}/")
    assert found.body == b"there"
    assert found.url == f"http://public.test:{server.port}/next?x=%C3%BC"


def test_a_redirect_in_an_old_charset_is_followed(server: LoopbackServer) -> None:
    server.answers["/"] = b"HTTP/1.1 302 Found\r\nlocation: /\xfc\r\ncontent-length: 0\r\n\r\n"
    server.answers["/%C3%BC"] = page("there")
    assert fetcher().fetch(f"http://public.test:{server.port}/").body == b"there"


def test_a_redirect_to_a_forbidden_address_is_refused_before_connecting(
    server: LoopbackServer, trap: LoopbackServer
) -> None:
    for host in (str(FORBIDDEN), f"[::ffff:{FORBIDDEN}]", "2130706434", "0x7f000002", "0177.0.0.2"):
        server.answers["/"] = redirect(f"http://{host}:{trap.port}/")
        with pytest.raises(FinalError, match="not a public address"):
            fetcher().fetch(f"http://public.test:{server.port}/")
    assert server.connections == 5
    assert trap.connections == 0


@pytest.mark.parametrize(
    "location", ["file:///etc/hostname", "ftp://public.test/x", "javascript:alert(1)", "http://user:pw@public.test/"]
)
def test_a_redirect_away_from_http_is_refused(server: LoopbackServer, location: str) -> None:
    server.answers["/"] = redirect(location)
    with pytest.raises(FinalError, match="it redirects to"):
        fetcher().fetch(f"http://public.test:{server.port}/")
    assert server.connections == 1


def test_a_redirect_to_the_metadata_address_is_refused_by_the_real_policy(server: LoopbackServer) -> None:
    from support.tools.web.addresses import is_public

    server.answers["/"] = redirect("http://169.254.169.254/latest/meta-data/")
    guarded = fetcher(address_policy=lambda address: address == PUBLIC or is_public(address))
    with pytest.raises(FinalError, match=r"169\.254\.169\.254 is not a public address"):
        guarded.fetch(f"http://public.test:{server.port}/")


def test_endless_redirects_are_refused(server: LoopbackServer) -> None:
    server.answers["/"] = redirect("/")
    with pytest.raises(FinalError, match="redirects more than 3 times"):
        fetcher(max_redirects=3).fetch(f"http://public.test:{server.port}/")
    assert server.connections == 4


def test_name_is_resolved_once_per_connection(server: LoopbackServer, trap: LoopbackServer) -> None:
    answers = iter([[PUBLIC], [FORBIDDEN]])
    server.answers["/"] = page("first answer")
    assert fetcher(resolver=lambda host: next(answers)).fetch(f"http://public.test:{server.port}/").status == 200
    assert next(answers) == [FORBIDDEN]  # the second answer was not used
    assert (server.connections, trap.connections) == (1, 0)


def test_a_name_that_rebinds_between_redirects_is_refused(server: LoopbackServer, trap: LoopbackServer) -> None:
    answers = iter([[PUBLIC], [FORBIDDEN]])
    server.answers["/"] = redirect(f"http://public.test:{trap.port}/")
    with pytest.raises(FinalError, match=r"public\.test is not a public address") as refused:
        fetcher(resolver=lambda host: next(answers)).fetch(f"http://public.test:{server.port}/")
    assert str(FORBIDDEN) not in str(refused.value)
    assert trap.connections == 0


def test_name_with_one_forbidden_address_is_refused(server: LoopbackServer, trap: LoopbackServer) -> None:
    with pytest.raises(FinalError, match="not a public address"):
        fetcher(resolver=resolve_to(PUBLIC, FORBIDDEN)).fetch(f"http://public.test:{server.port}/")
    assert (server.connections, trap.connections) == (0, 0)


def test_environment_proxies_are_not_used(
    server: LoopbackServer, trap: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://{FORBIDDEN}:{trap.port}")
    server.answers["/"] = page("direct")
    assert fetcher().fetch(f"http://public.test:{server.port}/").body == b"direct"
    assert trap.connections == 0


def test_dead_address_is_skipped_for_the_next(server: LoopbackServer) -> None:
    server.answers["/"] = page("second")
    dead = ip_address("127.0.0.3")  # nothing listens on this port there, or the address doesn't exist
    both = fetcher(resolver=resolve_to(dead, PUBLIC), address_policy=lambda address: True)
    assert both.fetch(f"http://public.test:{server.port}/").body == b"second"


def test_refused_connection_and_unknown_host_may_be_retried() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(WebError, match="connecting failed"):
            fetcher().fetch(f"http://public.test:{unused.getsockname()[1]}/")

    def unknown(host: str) -> list[Address]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(WebError, match=r"host public\.test was not found"):
        fetcher(resolver=unknown).fetch("http://public.test/")
    with pytest.raises(WebError, match="has no address"):
        fetcher(resolver=resolve_to()).fetch("http://public.test/")


def test_an_error_page_keeps_its_status(server: LoopbackServer) -> None:
    server.answers["/"] = response("busy", status="503 Service Unavailable")
    assert fetcher().fetch(f"http://public.test:{server.port}/").status == 503


def test_certificates_are_checked_against_the_name_of_the_url() -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("public.test").configure_cert(tls)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with LoopbackServer({"/": page("over TLS")}, tls=tls) as server:
        assert fetcher(ssl_context=trusting).fetch(f"https://public.test:{server.port}/").body == b"over TLS"
        with pytest.raises(FinalError, match="certificate is not valid"):
            fetcher(ssl_context=trusting).fetch(f"https://other.test:{server.port}/")
        with pytest.raises(FinalError, match="certificate is not valid"):
            fetcher().fetch(f"https://public.test:{server.port}/")
        assert len(server.requests) == 1
