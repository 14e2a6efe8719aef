"""Decode bytes as browsers do, by the labels and decoders of the WHATWG Encoding standard."""

from __future__ import annotations

import codecs

import webencodings

REPLACEMENT = "replacement"  # the standard's name of all encodings that browsers refuse, because attacks use them

# Python's decoders that are closer to the standard than those that webencodings uses.
_CODECS = {"gbk": "gb18030", "iso-2022-jp": "iso2022_jp_ext"}
_LIKE_BROWSERS = "like-browsers"


def encoding_name(label: str) -> str | None:
    """Return the standard's name of the encoding with this label, or None if the standard has no such label."""
    encoding = webencodings.lookup(label)
    return None if encoding is None else encoding.name


def decode(body: bytes, name: str) -> str:
    """Return the text of a body in the encoding with this name. Undecodable bytes become U+FFFD."""
    decoder = codecs.lookup(_CODECS[name]) if name in _CODECS else webencodings.lookup(name).codec_info
    text: str = decoder.decode(body, _LIKE_BROWSERS)[0]
    return text


def _like_browsers(error: UnicodeError) -> tuple[str | bytes, int]:
    """Decode one or two bytes that the standard accepts and Python's codec doesn't."""
    assert isinstance(error, UnicodeDecodeError)
    pair = error.object[error.start : error.start + 2]
    match error.encoding:
        case "gb18030" if pair.startswith(b"\x80"):
            return "€", error.start + 1
        case "big5hkscs" if text := _character(pair, "cp950"):
            return text, error.start + 2
        case "euc_jp" | "iso2022_jp_ext" if shift_jis := _shift_jis(pair):
            return _character(shift_jis, "cp932") or "\ufffd", error.start + 2
        case "iso2022_jp_ext":
            return "\ufffd", error.start + 1  # the next byte may begin an escape sequence
    return codecs.replace_errors(error)


def _character(pair: bytes, codec: str) -> str:
    try:
        text = pair.decode(codec)
    except UnicodeDecodeError:
        return ""
    return text if len(text) == 1 else ""


def _shift_jis(pair: bytes) -> bytes:
    """Return the Shift_JIS form of two bytes of EUC-JP or ISO-2022-JP, or b"" if they are not valid.

    All three encodings number a character by its row and column in one table.
    """
    row, column = (byte & 0x7F for byte in pair.ljust(2, b"\0"))
    if not (0x21 <= row <= 0x7E and 0x21 <= column <= 0x7E):
        return b""
    lead = (row + 1) // 2 + (0x70 if row <= 0x5E else 0xB0)
    trail = column + (0x7E if row % 2 == 0 else 0x1F if column <= 0x5F else 0x20)
    return bytes((lead, trail))


codecs.register_error(_LIKE_BROWSERS, _like_browsers)
