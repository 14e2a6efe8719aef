"""The bounds of a fetch: deadline, byte limit and accepted encodings."""

from __future__ import annotations

import gzip
import socket
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from loopback_fetcher import PUBLIC, fetcher
from web_servers import LoopbackServer, endless, page, redirect

from nexum_engine.errors import FinalError
from support.tools.web import WebError
from support.tools.web.decompress import read_body


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as running:
        yield running


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [endless(HEAD, b"x", pause=0.05), endless(b"HTTP/1.1 200 OK\r\nx: ", b"x", pause=0.05), endless(b"", b"", 0.05)],
    ids=["body", "headers", "silence"],
)
def test_a_server_that_drips_ends_at_the_deadline(server: LoopbackServer, answer: Any) -> None:
    server.answers["/"] = answer
    with pytest.raises(WebError, match=r"longer than 1 s"):
        fetcher(deadline=1.0).fetch(f"http://public.test:{server.port}/")
    assert server.connections == 1


def test_redirects_share_one_deadline(server: LoopbackServer) -> None:
    def late(connection: socket.socket) -> None:
        threading.Event().wait(0.2)
        connection.sendall(redirect("/"))

    server.answers["/"] = late
    with pytest.raises(WebError, match=r"longer than 1\.5 s"):
        fetcher(deadline=1.5, max_redirects=100).fetch(f"http://public.test:{server.port}/")
    assert server.connections > 1


def test_a_resolver_that_hangs_ends_at_the_deadline() -> None:
    hung = threading.Event()
    try:
        with pytest.raises(WebError, match=r"longer than 0\.2 s"):
            fetcher(deadline=0.2, resolver=lambda host: [PUBLIC] if hung.wait() else []).fetch("http://public.test/")
    finally:
        hung.set()


def test_a_tls_server_that_stays_silent_ends_at_the_deadline(server: LoopbackServer) -> None:
    with pytest.raises(WebError, match=r"longer than 1\.5 s"):
        fetcher(deadline=1.5).fetch(f"https://public.test:{server.port}/")
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
    ids=["gzip", "x-gzip of two parts", "GZIP with padding", "deflate", "raw deflate", "identity"],
)
def test_known_encodings_are_decompressed(server: LoopbackServer, encoding: str, body: bytes) -> None:
    server.answers["/"] = page(body, content_encoding=encoding)
    assert fetcher().fetch(f"http://public.test:{server.port}/").body == b"hello " * 50


@pytest.mark.parametrize("size", [1, 2, 3, 20, 21, 22, 1000])
def test_parts_of_a_gzip_file_may_end_with_any_packet(size: int) -> None:
    data = b"".join(gzip.compress(word) for word in (b"one ", b"", b"two ", b"three"))
    packets = [data[begin : begin + size] for begin in range(0, len(data), size)]
    assert read_body(packets, "gzip", 1000) == (b"one two three", False)
    assert read_body([*packets, b"\0" * 9], "gzip", 1000) == (b"one two three", False)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "evil"])
def test_encoding_that_was_not_accepted_is_refused(server: LoopbackServer, encoding: str) -> None:
    server.answers["/"] = page(b"?", content_encoding=encoding)
    with pytest.raises(FinalError, match="encoding that was not accepted"):
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
def test_broken_compressed_data_may_be_retried(server: LoopbackServer, body: bytes) -> None:
    server.answers["/"] = page(body, content_encoding="gzip")
    with pytest.raises(WebError, match="compressed data"):
        fetcher().fetch(f"http://public.test:{server.port}/")


def test_a_binary_body_is_not_read(server: LoopbackServer) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: video/mp4\r\n\r\n"
    server.answers["/"] = endless(head, b"", pause=0.05)  # reading this endless body would end at the deadline
    found = fetcher(deadline=5.0).fetch(f"http://public.test:{server.port}/")
    assert (found.content_type, found.body) == ("video/mp4", b"")


@pytest.mark.parametrize(
    "answer",
    [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\ncontent-type: text/plain\r\n\r\nshort"],
    ids=["nothing", "not HTTP", "cut off"],
)
def test_broken_response_may_be_retried(server: LoopbackServer, answer: bytes) -> None:
    server.answers["/"] = answer
    with pytest.raises(WebError, match="could not be read"):
        fetcher().fetch(f"http://public.test:{server.port}/")
