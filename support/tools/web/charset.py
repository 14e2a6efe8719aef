"""Tell the kind of a response, and decode its body."""

from __future__ import annotations

import codecs
import re
from enum import Enum
from typing import Literal

_DEFAULT = "utf-8"
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # must precede UTF-16: this mark begins with UTF-16's mark
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECLARED_WITHIN = 4096  # bytes
_META = re.compile(rb"<meta[^>]{0,200}?charset\s{0,9}=\s{0,9}[\"']?\s{0,9}([\w.:-]{1,40})", re.IGNORECASE)
_XML = re.compile(rb"^\s{0,9}<\?xml[^>]{0,200}?encoding\s{0,9}=\s{0,9}[\"']([\w.:-]{1,40})", re.IGNORECASE)
# Accept only these encodings: Python's codecs also include punycode, unicode_escape, zip and others.
_CHARSET = re.compile(
    r"utf-(8|16|32)(-[bl]e)?|iso8859-\d+|cp\d+|koi8-\w|euc_\w+|gb\w+|big5\w*|shift_j\w+|mac-\w+|tis-620"
)
# Decode with a superset of the declared encoding, as browsers do: most such pages use the superset's characters.
_SUPERSETS = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "tis-620": "cp874"}


class Kind(Enum):
    """The kind of a body, which decides how the body is read."""

    HTML = "html"
    JSON = "json"
    TEXT = "text"  # includes XML, because its tags are part of its content


def media_type(content_type: str) -> str:
    """Return the media type of a Content-Type header: text/html for `Text/HTML; charset=x`."""
    return content_type.partition(";")[0].strip().lower()


def kind_of(content_type: str) -> Kind | None:
    """Return the kind of a body, or None if the body is not text. A body without a type counts as HTML."""
    match media_type(content_type):
        case "" | "text/html" | "application/xhtml+xml":
            return Kind.HTML
        case "application/json" | "text/json":
            return Kind.JSON
        case "application/xml" | "application/x-ndjson" | "application/yaml" | "application/javascript":
            return Kind.TEXT
        case media if media.startswith("text/"):
            return Kind.TEXT
        case media if media.startswith("application/") and media.endswith("+json"):
            return Kind.JSON
        case media if media.startswith("application/") and media.endswith("+xml"):
            return Kind.TEXT
        case _:
            return None


def is_readable(content_type: str) -> bool:
    """Return whether a body of this type can be read as text."""
    return kind_of(content_type) is not None


def decoded(body: bytes, content_type: str) -> str | Literal[False]:
    """Return the body's text, or False if the body is binary.

    The encoding comes from the byte order mark, from the header, or from the page's declaration. The default is UTF-8.
    """
    encoding = _encoding(body, content_type)
    if not encoding.startswith(("utf-16", "utf-32")) and b"\0" in body[:_DECLARED_WITHIN]:
        return False
    return body.decode(encoding, "replace")


def _encoding(body: bytes, content_type: str) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if body.startswith(mark):
            return encoding
    header = re.search(r"charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", content_type, re.IGNORECASE)
    if header and (charset := _charset(header[1])):
        return charset
    head = body[:_DECLARED_WITHIN]
    declared = _XML.search(head) or (_META.search(head) if kind_of(content_type) is Kind.HTML else None)
    if declared and (charset := _charset(declared[1].decode("ascii", "replace"))):
        # Ignore a declared UTF-16 or UTF-32: the declaration itself was read as single bytes, so it can't be true.
        return _DEFAULT if charset.startswith(("utf-16", "utf-32")) else charset
    return _DEFAULT


def _charset(label: str) -> str | None:
    try:
        name = codecs.lookup(label).name
    except LookupError:
        return None
    name = _SUPERSETS.get(name, name)
    return name if _CHARSET.fullmatch(name) else None
