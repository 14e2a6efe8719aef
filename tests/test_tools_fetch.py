"""The guarded fetch against real servers on loopback, which an injected resolver and policy make "public"."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest
import trustme
from web_servers import LoopbackServer, endless, page, redirect, response

from nexum_engine.errors import FinalError
from tools.addresses import Address
from tools.guarded_fetch import GuardedFetcher
from tools.web import WebError

PUBLIC = IPv4Address("127.0.0.1")  # what the tests' policy lets through
FORBIDDEN = IPv4Address("127.0.0.2")  # loopback too, and refused


def resolve_to(*addresses: Address) -> Any:
    return lambda host: list(addresses)


def fetcher(**settings: Any) -> GuardedFetcher:
    defaults: dict[str, Any] = {
        "resolver": resolve_to(PUBLIC),
        "address_policy": lambda address: address == PUBLIC,
        "deadline": 20.0,
    }
    return GuardedFetcher(**(defaults | settings))


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as running:
        yield running


@pytest.fixture
def trap() -> Iterator[LoopbackServer]:
    """A server that must not be reached."""
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


def test_the_trap_counts_who_reaches_it(trap: LoopbackServer) -> None:
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
    from tools.addresses import is_public

    server.answers["/"] = redirect("http://169.254.169.254/latest/meta-data/")
    guarded = fetcher(address_policy=lambda address: address == PUBLIC or is_public(address))
    with pytest.raises(FinalError, match=r"169\.254\.169\.254 is not a public address"):
        guarded.fetch(f"http://public.test:{server.port}/")


def test_redirects_without_an_end_are_given_up(server: LoopbackServer) -> None:
    server.answers["/"] = redirect("/")
    with pytest.raises(FinalError, match="redirects more than 3 times"):
        fetcher(max_redirects=3).fetch(f"http://public.test:{server.port}/")
    assert server.connections == 4


def test_a_name_is_resolved_once_per_connection_so_that_it_cannot_change_in_between(
    server: LoopbackServer, trap: LoopbackServer
) -> None:
    answers = iter([[PUBLIC], [FORBIDDEN]])
    server.answers["/"] = page("first answer")
    assert fetcher(resolver=lambda host: next(answers)).fetch(f"http://public.test:{server.port}/").status == 200
    assert next(answers) == [FORBIDDEN]  # nobody took it
    assert (server.connections, trap.connections) == (1, 0)


def test_a_name_that_rebinds_between_redirects_is_refused(server: LoopbackServer, trap: LoopbackServer) -> None:
    answers = iter([[PUBLIC], [FORBIDDEN]])
    server.answers["/"] = redirect(f"http://public.test:{trap.port}/")
    with pytest.raises(FinalError, match=r"public\.test is not a public address") as refused:
        fetcher(resolver=lambda host: next(answers)).fetch(f"http://public.test:{server.port}/")
    assert str(FORBIDDEN) not in str(refused.value)
    assert trap.connections == 0


def test_one_forbidden_address_among_public_ones_refuses_the_name(server: LoopbackServer, trap: LoopbackServer) -> None:
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


def test_a_dead_address_gives_way_to_the_next(server: LoopbackServer) -> None:
    server.answers["/"] = page("second")
    dead = ip_address("127.0.0.3")  # nothing listens on this port there, or the address doesn't exist
    both = fetcher(resolver=resolve_to(dead, PUBLIC), address_policy=lambda address: True)
    assert both.fetch(f"http://public.test:{server.port}/").body == b"second"


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [endless(HEAD, b"x", pause=0.05), endless(b"HTTP/1.1 200 OK\r\nx: ", b"x", pause=0.05), endless(b"", b"", 0.05)],
    ids=["body", "headers", "silence"],
)
def test_a_server_that_drips_ends_at_the_deadline(server: LoopbackServer, answer: Any) -> None:
    server.answers["/"] = answer
    with pytest.raises(WebError, match=r"longer than 0\.4 s"):
        fetcher(deadline=0.4).fetch(f"http://public.test:{server.port}/")
    assert server.connections == 1


def test_redirects_share_one_deadline(server: LoopbackServer) -> None:
    def late(connection: socket.socket) -> None:
        threading.Event().wait(0.2)
        connection.sendall(redirect("/"))

    server.answers["/"] = late
    with pytest.raises(WebError, match=r"longer than 0\.5 s"):
        fetcher(deadline=0.5, max_redirects=100).fetch(f"http://public.test:{server.port}/")
    assert server.connections > 1


def test_a_resolver_that_hangs_ends_at_the_deadline() -> None:
    hung = threading.Event()
    try:
        with pytest.raises(WebError, match=r"longer than 0\.2 s"):
            fetcher(deadline=0.2, resolver=lambda host: [PUBLIC] if hung.wait() else []).fetch("http://public.test/")
    finally:
        hung.set()


def test_a_tls_server_that_stays_silent_ends_at_the_deadline(server: LoopbackServer) -> None:
    with pytest.raises(WebError, match=r"longer than 0\.3 s"):
        fetcher(deadline=0.3).fetch(f"https://public.test:{server.port}/")
    assert server.connections == 1


def test_an_endless_body_is_cut_at_the_limit(server: LoopbackServer) -> None:
    server.answers["/"] = endless(HEAD, b"x" * 10_000)
    found = fetcher(max_bytes=100_000).fetch(f"http://public.test:{server.port}/")
    assert (len(found.body), found.truncated) == (100_000, True)


def test_a_body_of_exactly_the_limit_is_whole(server: LoopbackServer) -> None:
    server.answers["/"] = page(b"x" * 1000)
    server.answers["/z"] = page(gzip.compress(b"x" * 1000), content_encoding="gzip")
    for path in ("/", "/z"):
        found = fetcher(max_bytes=1000).fetch(f"http://public.test:{server.port}{path}")
        assert (found.body, found.truncated) == (b"x" * 1000, False)


def deflated(data: bytes, window_bits: int) -> bytes:
    deflater = zlib.compressobj(wbits=window_bits)
    return deflater.compress(data) + deflater.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(b"hello " * 50)),
        ("x-gzip", gzip.compress(b"hello " * 20) + gzip.compress(b"hello " * 30)),
        ("GZIP", gzip.compress(b"hello " * 50) + b"\0\0 padding"),
        ("deflate", deflated(b"hello " * 50, 15)),
        ("deflate", deflated(b"hello " * 50, -15)),
        ("identity", b"hello " * 50),
    ],
)
def test_known_encodings_are_decompressed(server: LoopbackServer, encoding: str, body: bytes) -> None:
    server.answers["/"] = page(body, content_encoding=encoding)
    assert fetcher().fetch(f"http://public.test:{server.port}/").body == b"hello " * 50


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "evil"])
def test_an_encoding_that_was_not_asked_for_is_refused(server: LoopbackServer, encoding: str) -> None:
    server.answers["/"] = page(b"?", content_encoding=encoding)
    with pytest.raises(FinalError, match="encoding that was not asked for"):
        fetcher().fetch(f"http://public.test:{server.port}/")


def test_a_gzip_bomb_is_refused_without_being_unpacked(server: LoopbackServer) -> None:
    bomb = gzip.compress(b"\0" * 60_000_000)
    server.answers["/"] = page(bomb, content_encoding="gzip")
    tracemalloc.start()
    try:
        with pytest.raises(FinalError, match="compression bomb"):
            fetcher(max_bytes=1_000_000).fetch(f"http://public.test:{server.port}/")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("body", [b"not gzip at all", gzip.compress(b"hello " * 5000)[:-20]], ids=["broken", "cut"])
def test_broken_compressed_data_may_be_tried_again(server: LoopbackServer, body: bytes) -> None:
    server.answers["/"] = page(body, content_encoding="gzip")
    with pytest.raises(WebError, match="compressed data"):
        fetcher().fetch(f"http://public.test:{server.port}/")


def test_a_binary_body_is_not_read(server: LoopbackServer) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: video/mp4\r\n\r\n"
    server.answers["/"] = endless(head, b"", pause=0.05)  # reading it would end at the deadline
    found = fetcher(deadline=5.0).fetch(f"http://public.test:{server.port}/")
    assert (found.content_type, found.body) == ("video/mp4", b"")


@pytest.mark.parametrize(
    "answer",
    [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\ncontent-type: text/plain\r\n\r\nshort"],
    ids=["nothing", "not HTTP", "cut off"],
)
def test_a_server_that_breaks_off_may_be_tried_again(server: LoopbackServer, answer: bytes) -> None:
    server.answers["/"] = answer
    with pytest.raises(WebError, match="could not be read"):
        fetcher().fetch(f"http://public.test:{server.port}/")


def test_a_refused_connection_and_an_unknown_host_may_be_tried_again() -> None:
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
