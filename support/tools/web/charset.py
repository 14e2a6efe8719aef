"""Find out the kind of a response (HTML, JSON or other text), and decode its body."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from enum import Enum
from itertools import chain

from support.tools.web.decoders import REPLACEMENT, decode, encoding_name

_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16le"), (codecs.BOM_UTF16_BE, "utf-16be"))
_DECLARED_WITHIN = 4096  # bytes to search for a declaration; the HTML standard searches 1024, but browsers search more
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_XML = re.compile(r"\s{0,9}<\?xml[^>]{0,200}?encoding\s{0,9}=\s{0,9}[\"']([\w.:-]{1,40})", re.IGNORECASE)


class BodyKind(Enum):
    """The kind of a body, which decides how the body is read."""

    HTML = "html"
    JSON = "json"
    TEXT = "text"  # includes XML, because its tags are part of its content


def media_type(content_type: str) -> str:
    """Return the media type of a Content-Type header: text/html for `Text/HTML; charset=x`."""
    return content_type.partition(";")[0].strip().lower()


def kind_of(content_type: str) -> BodyKind | None:
    """Return the kind of a body, or None if the body is not text. A body without a type counts as HTML."""
    match media_type(content_type):
        case "" | "text/html" | "application/xhtml+xml":
            return BodyKind.HTML
        case "application/json" | "text/json":
            return BodyKind.JSON
        case "application/xml" | "application/x-ndjson" | "application/yaml" | "application/javascript":
            return BodyKind.TEXT
        case media if media.startswith("text/"):
            return BodyKind.TEXT
        case media if media.startswith("application/") and media.endswith("+json"):
            return BodyKind.JSON
        case media if media.startswith("application/") and media.endswith("+xml"):
            return BodyKind.TEXT
        case _:
            return None


def decoded(body: bytes, content_type: str) -> str:
    """Return the body's text. Raises ValueError, with the reason in words, if the body can't be read.

    As in the HTML standard, the encoding comes from the byte order mark, from the header, or from the page's own
    declaration. If none of these names an encoding, the text is read as UTF-8 or, if it isn't UTF-8, as windows-1252.
    """
    for mark, marked in _BYTE_ORDER_MARKS:
        if body.startswith(mark):
            return decode(body[len(mark) :], marked)
    labels = (found[1] for found in _CHARSET.finditer(content_type))
    encoding = next(filter(None, map(encoding_name, labels)), None) or _declared(body, kind_of(content_type))
    if encoding == REPLACEMENT:
        raise ValueError("is in an encoding that browsers refuse to read")
    if encoding not in ("utf-16le", "utf-16be") and b"\0" in body[:_DECLARED_WITHIN]:
        encoding = _utf_16(body)
    if encoding is not None:
        return decode(body, encoding)
    text = decode(body, "utf-8")
    undecodable = text.count("\ufffd")
    # `len(body) - len(text)` is the number of continuation bytes in valid UTF-8 sequences. If there are more errors
    # than continuation bytes, the text is not UTF-8.
    return text if undecodable <= len(body) - len(text) else decode(body, "windows-1252")


def _utf_16(body: bytes) -> str:
    """Return "utf-16be" or "utf-16le" for a body that holds NULs.

    Raises ValueError if the body is not Latin text in UTF-16.
    """
    head = body[:_DECLARED_WITHIN]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if min(even, odd) > 0 or max(even, odd) * 4 < len(head):
        raise ValueError("holds binary data; only HTML, text, JSON and XML can be read")
    return "utf-16be" if even else "utf-16le"


def _declared(body: bytes, kind: BodyKind | None) -> str | None:
    """Return the encoding that the body itself declares, in HTML or XML."""
    head = body[:_DECLARED_WITHIN].decode("latin-1")
    labels = _meta_labels(head) if kind is BodyKind.HTML else iter(())
    xml = _XML.match(head)
    for label in chain(labels, [xml[1]] if xml else []):
        match encoding_name(label):
            case None:
                continue
            case "utf-16le" | "utf-16be":
                return "utf-8"  # a declaration that is readable as single bytes can't be in UTF-16
            case "x-user-defined":
                return "windows-1252"
            case encoding:
                return encoding
    return None


def _meta_labels(head: str) -> Iterator[str]:
    """Return the labels in the `meta` elements of a page's head."""
    from selectolax.lexbor import LexborHTMLParser

    for meta in LexborHTMLParser(head, scripting=True).css("meta"):
        attributes = {name: value or "" for name, value in meta.attributes.items()}
        if "charset" in attributes:
            yield attributes["charset"]
        elif attributes.get("http-equiv", "").lower() == "content-type":
            yield from _CHARSET.findall(attributes.get("content", ""))[:1]
