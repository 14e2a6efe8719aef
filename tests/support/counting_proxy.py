"""A TCP proxy that counts the RPCs and the messages of the gRPC connections through it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from counted import Counts
from proxy import TO_SERVER, Proxy

_PREFACE = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
_DATA, _HEADERS = 0, 1  # types of HTTP/2 frames: https://www.rfc-editor.org/rfc/rfc9113#name-frame-definitions
_FRAME_HEADER, _MESSAGE_HEADER = 9, 5


class _Direction:
    """One direction of a connection."""

    def __init__(self, counts: Counts, *, from_client: bool) -> None:
        self._counts = counts
        self._from_client = from_client
        self._skip = _PREFACE if from_client else 0
        self._bytes = b""
        self._streams: dict[int, bytes] = defaultdict(bytes)

    def feed(self, chunk: bytes) -> None:
        """Count the RPCs and messages that end in this chunk."""
        self._bytes += chunk
        if len(self._bytes) < self._skip:
            return
        self._bytes, self._skip = self._bytes[self._skip :], 0
        while len(self._bytes) >= _FRAME_HEADER:
            end = _FRAME_HEADER + int.from_bytes(self._bytes[:3], "big")
            if len(self._bytes) < end:
                return
            kind, stream = self._bytes[3], int.from_bytes(self._bytes[5:9], "big")
            if kind == _HEADERS and self._from_client:
                self._counts.add("RPCs")
            if kind == _DATA:
                self._count_messages(stream, self._bytes[_FRAME_HEADER:end])
            self._bytes = self._bytes[end:]

    def _count_messages(self, stream: int, data: bytes) -> None:
        data = self._streams[stream] + data
        while len(data) >= _MESSAGE_HEADER:
            end = _MESSAGE_HEADER + int.from_bytes(data[1:_MESSAGE_HEADER], "big")
            if len(data) < end:
                break
            self._counts.add("messages")
            data = data[end:]
        self._streams[stream] = data


class _CountingProxy(Proxy):
    def __init__(self, upstream: str, counts: Counts) -> None:
        super().__init__(upstream)
        self._counts = counts
        self._directions: dict[asyncio.StreamWriter, _Direction] = {}

    async def before_sending(self, writer: asyncio.StreamWriter, direction: str, chunk: bytes) -> None:
        if writer not in self._directions:
            self._directions[writer] = _Direction(self._counts, from_client=direction == TO_SERVER)
        self._directions[writer].feed(chunk)


@contextmanager
def counting_proxy(address: str, counts: Counts) -> Iterator[str]:
    """Run a proxy in front of the server at `address`, in a thread; yield the proxy's own address."""
    with _CountingProxy(address, counts) as proxy:
        yield proxy.address
