"""Read and decompress the body of a response, up to a size limit."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from nexum_engine.errors import FinalError
from support.tools.web import WebError

ACCEPTED_ENCODINGS = "gzip, deflate"
# A body that exceeds the size limit is refused as a compression bomb if it is more than this many times as large as its
# compressed form. Most pages compress to a tenth of their size, and few to a hundredth. At best, zlib
# compresses data to about 1/1030 of its size.
BOMB_RATIO = 250
_GZIP_MAGIC = b"\x1f\x8b"


def read_body(chunks: Iterable[bytes], encoding: str, max_bytes: int) -> tuple[bytes, bool]:
    """Return the decompressed body, up to `max_bytes`, and whether the body was cut."""
    match encoding.strip().lower():
        case "" | "identity":
            return _plain(chunks, max_bytes)
        case "gzip" | "x-gzip":
            return _inflated(chunks, max_bytes, zlib.MAX_WBITS | 16)
        case "deflate":
            return _inflated(chunks, max_bytes, zlib.MAX_WBITS)
        case other:
            raise FinalError(f"the server sent the page in an encoding that was not accepted ({other[:40]!r})")


def _plain(chunks: Iterable[bytes], max_bytes: int) -> tuple[bytes, bool]:
    body = bytearray()
    for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            return bytes(body[:max_bytes]), True
    return bytes(body), False


def _inflated(chunks: Iterable[bytes], max_bytes: int, window_bits: int) -> tuple[bytes, bool]:
    body = bytearray()
    received = 0
    data = b""
    inflater = zlib.decompressobj(window_bits)
    for chunk in chunks:
        received += len(chunk)
        # Look for zlib's header in the first byte: servers send "deflate" with the header or without it.
        if received == len(chunk) and window_bits == zlib.MAX_WBITS and chunk and chunk[0] & 0x0F != 8:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data += chunk
        # A gzip file may have several members. Between two of them, wait for the first bytes of the next one.
        while data and not (inflater.eof and len(data) < len(_GZIP_MAGIC)):
            if inflater.eof:
                if not data.startswith(_GZIP_MAGIC):
                    return bytes(body), False
                inflater = zlib.decompressobj(window_bits)
            try:
                body += inflater.decompress(data, max_bytes + 1 - len(body))
            except zlib.error as error:
                raise WebError(f"the page's compressed data is broken ({error})") from error
            if len(body) > max_bytes:
                used = received - len(inflater.unconsumed_tail)
                if len(body) > BOMB_RATIO * used:
                    raise FinalError(f"the page is a compression bomb: {used:,} bytes hold more than {max_bytes:,}")
                return bytes(body[:max_bytes]), True
            data = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        if received > max_bytes:
            return bytes(body), True
    if received and not inflater.eof:
        raise WebError("the page's compressed data ended too early")
    return bytes(body), False
