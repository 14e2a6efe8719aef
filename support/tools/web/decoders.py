"""Decode bytes as browsers do, by the labels and decoders of the WHATWG Encoding standard.

Python's decoders know most characters, but they accept bytes that the standard refuses, and some drop an ASCII byte
after a bad byte. So the patterns here find each unit (the bytes of one character), and Python decodes one unit at a
time.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from functools import lru_cache

import webencodings

REPLACEMENT = "replacement"  # the standard's name for all encodings that browsers refuse, because attacks use them

_ERROR = "\ufffd"
_KNOWN_UNITS = 1 << 16  # the number of units whose texts are cached
_UTF = frozenset({"utf-8", "utf-16le", "utf-16be"})

# The patterns are applied to the bytes as Latin-1 text. Each match is one unit, or one byte that begins no unit. A unit
# that is a single ASCII character is not matched.
_ONE_BYTE = re.compile("[\x80-\xff]")
_TWO_BYTES = re.compile("[\x81-\xfe][\x40-\xff]?|[\x80\xff]")
_UNITS = {
    "big5": _TWO_BYTES,
    "euc-jp": re.compile("\x8f[\xa1-\xfe][\x80-\xff]?|[\x8e\x8f\xa1-\xfe][\x80-\xff]?|[\x80-\xff]"),
    "euc-kr": _TWO_BYTES,
    "gb18030": re.compile("[\x81-\xfe](?:[0-9][\x81-\xfe][0-9]|[0-9][\x81-\xfe]?\\Z|[\x40-\xff])?|[\x80\xff]"),
    "shift_jis": re.compile("[\x81-\x9f\xe0-\xfc][\x40-\xff]?|[\xa0-\xff]"),
}

# ISO-2022-JP text consists of parts. Each part begins with an escape sequence.
_ESCAPE = re.compile(r"(\x1b(?:\([BJI]|\$[@B]))")
_ASCII, _ROMAN, _KATAKANA = "\x1b(B", "\x1b(J", "\x1b(I"
_NOT_ASCII = re.compile("[\x0e\x0f\x1b\x80-\xff]")
_IN_ROMAN = str.maketrans("\\~", "¥‾")
_IN_KATAKANA = {byte: chr(0xFF40 + byte) if 0x21 <= byte <= 0x5F else _ERROR for byte in range(256)}
_PAIR = re.compile("([\x21-\x7e]{2})|[\x21-\x7e][^\x1b]?|[^\x21-\x7e]")
_IN_EUC_JP = {byte: byte + 0x80 for byte in range(0x21, 0x7F)}


def encoding_name(label: str) -> str | None:
    """Return the standard's name for the encoding with this label, or None if the standard has no such label."""
    encoding = webencodings.lookup(label)
    return None if encoding is None else encoding.name


def decode(body: bytes, name: str) -> str:
    """Return the text of a body in the encoding with this name. Undecodable bytes become U+FFFD."""
    if name in _UTF:
        return body.decode(name, "replace")
    characters = body.decode("latin-1")
    if name == "iso-2022-jp":
        return _iso_2022_jp(characters)
    if name == "gbk":
        name = "gb18030"  # the decoder for gb18030 also reads gbk
    return _UNITS.get(name, _ONE_BYTE).sub(lambda unit: _text(unit[0], name), characters)


@lru_cache(_KNOWN_UNITS)
def _text(unit: str, name: str) -> str:
    """Return the text of a unit. An ASCII byte after a bad byte stays, because it may be markup."""
    text = _MORE.get(name, {}).get(unit) or _from_python(unit.encode("latin-1"), name)
    if text:
        return text
    return _ERROR + unit[-1] if "\x40" <= unit[-1] <= "\x7f" else _ERROR


def _from_python(unit: bytes, name: str) -> str:
    """Return the text that Python's decoders give for a unit, or "" if they can't decode the unit."""
    if name == "euc-jp" and len(unit) == 2:
        unit, name = _shift_jis(*unit), "shift_jis"
    decoders = [webencodings.lookup(name).codec_info, *([codecs.lookup("cp950")] if name == "big5" else [])]
    for decoder in decoders:
        try:
            return str(decoder.decode(unit, "strict")[0])
        except UnicodeDecodeError:
            continue
    # Windows code pages leave some bytes undefined. The standard decodes those bytes as control characters.
    return unit.decode("latin-1") if name.startswith("windows-") and unit < b"\xa0" else ""


def _shift_jis(lead: int, trail: int) -> bytes:
    """Return the Shift_JIS form of two bytes of EUC-JP, or b"" if they are not valid.

    Both encodings number a character by its row and column in one table.
    """
    if lead == 0x8E:
        return bytes((trail,)) if 0xA1 <= trail <= 0xDF else b""
    row, column = lead - 0x80, trail - 0x80
    if not (0x21 <= row <= 0x7E and 0x21 <= column <= 0x7E):
        return b""
    return bytes(
        (
            (row + 1) // 2 + (0x70 if row <= 0x5E else 0xB0),
            column + (0x7E if row % 2 == 0 else 0x1F if column <= 0x5F else 0x20),
        )
    )


def _iso_2022_jp(characters: str) -> str:
    _, *parts = _ESCAPE.split(_ASCII + characters)  # the text begins as ASCII
    text: list[str] = []
    for index, (escape, part) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if index > 1 and parts[2 * index - 1] == "":
            text.append(_ERROR)  # the standard makes two escape sequences without a character between them an error
        if escape == _KATAKANA:
            text.append(part.translate(_IN_KATAKANA))
        elif escape == _ASCII:
            text.append(_NOT_ASCII.sub(_ERROR, part))
        elif escape == _ROMAN:
            text.append(_NOT_ASCII.sub(_ERROR, part).translate(_IN_ROMAN))
        else:
            text.append(_PAIR.sub(_text_of_pair, part))
    return "".join(text)


def _text_of_pair(pair: re.Match[str]) -> str:
    return _text(pair[1].translate(_IN_EUC_JP), "euc-jp") if pair[1] else _ERROR


def _runs(text: str) -> Iterator[tuple[str, str]]:
    """Yield each unit with its character. In "a1f2⊕⊙", ⊕ belongs to the unit a1f2, and ⊙ to the unit after a1f2."""
    for run in text.split(" "):
        characters = run.lstrip("0123456789abcdef")
        unit = bytes.fromhex(run.removesuffix(characters))
        for character in characters:
            yield unit.decode("latin-1"), character
            unit = unit[:-1] + bytes((0xA1 if unit[-1] == 0x7E else unit[-1] + 1,))


# Units that Python's decoders refuse, and units for which Python's decoders and the standard give different characters.
_BIG5 = (
    "877a㡵𡵓𣚞𦀡㻬𥣞㫵竼龗𤅡𨤍𣇪𠪊𣉞䌊蒄龖鐯䤰蘓墖靊鈘秐稲晠権袝瑌篅枂稬剏遆㓦珄 "
    "87c0𥶹瓆鿇垳䤯呌䄱𣚎堘穲𧭥讏䚮𦺈䆁𥶙箮𢒼鿈𢓁𢓉𢓌鿉蔄𣖻䂴鿊䓡𪷿拁灮鿋 8e69箸 8e6f簆 8e7e糎 8eab緒 8eb4縝 "
    "8ecd者 8ed0耨 8f57菁 8f69蒨 8f6e萏 8fcb覦覩 8ffe起 906d都 907a銹 90dc靜 90f1響 91bf鼖 9244蔃 92af兙兛兝兞 "
    "92c8鍮 92d1瑹 9447浧 94ca禛 95d9邗 9644靝 96ed瀞 96fc嬨 9b76爁 9b78矗 9b7b纇 9bc6駖 9bde釔 9bec惞 9bf6澶 "
    "9c42輶 9c53侻 9c62營 9c68鄄 9c6b鷰 9c77菏 9cbc尐秣 9cd0婧 9d57輋 9d5a筑 9dc4拐 9ea9恢 9eef痹 9efd汊 9f60鬮 "
    "9f66鼗 9fcb僭 9fd8弌 a063蠏 a077拎 a0d5瑨 a0df煢 a0e4牐 a145‧ a14e﹑ a1c2¯ a1e3～ a1f2⊕⊙ a241∕﹨ a244￥ "
    "a246￠￡ a3c0␀␁␂␃␄␅␆␇␈␉␊␋␌␍␎␏␐␑␒␓␔␕␖␗␘␙␚␛␜␝␞␟␡ c6cf廴 c6d3无 c6d5癶 c6d7隶 c6de〃仝 fa5f倩 fa66偽 fabd包 "
    "fac5卄 fad5卿 fb48嘅 fbb8婷 fbf3幵 fbf9廐 fc4f彘 fc6c悤 fcb9撐 fce2晴 fcf1杞 fdb7沜渝 fdbb港 fdf1煮 fe52猪 "
    "fe6f瑜 feaa瓩 fedd砉"
)
_GB18030 = (
    "80€ a3a0\u3000 a6d9︐︒︑︓︔︕︖ a6ec︗︘ a6f3︙ a8bcḿ 8135f437\ue7c7 "
    "fe59龴 fe61龵 fe66龶龷 fe6d龸 fe7e龹 fe90龺 fea0龻"
)
_MORE = {
    "big5": dict(_runs(_BIG5)),
    "euc-jp": {"\x8f\xa2\xb7": "～"},
    "gb18030": dict(_runs(_GB18030)),
    "koi8-u": {"\xae": "ў", "\xbe": "Ў"},
    "shift_jis": dict.fromkeys("\xa0\xfd\xfe\xff", _ERROR),
    "windows-1255": {"\xca": "\u05ba"},
}
