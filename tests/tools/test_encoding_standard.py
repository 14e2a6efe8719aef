"""The rules of the WHATWG Encoding standard, and of the HTML standard's search for a page's encoding."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from itertools import product

import pytest

from support.tools.web import Page
from support.tools.web.charset import decoded
from support.tools.web.decoders import decode, encoding_name
from support.tools.web.page import page_to_markdown

HTML = "text/html"
BAD = "\ufffd"

# The labels of each encoding
LABELS = """
utf-8: unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf-8 utf8 x-unicode20utf8
ibm866: 866 cp866 csibm866 ibm866
iso-8859-2: csisolatin2 iso-8859-2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987 l2 latin2
iso-8859-3: csisolatin3 iso-8859-3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988 l3 latin3
iso-8859-4: csisolatin4 iso-8859-4 iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988 l4 latin4
iso-8859-5: csisolatincyrillic cyrillic iso-8859-5 iso-ir-144 iso8859-5 iso88595 iso_8859-5 iso_8859-5:1988
iso-8859-6: arabic asmo-708 csiso88596e csiso88596i csisolatinarabic ecma-114 iso-8859-6 iso-8859-6-e iso-8859-6-i
iso-8859-6: iso-ir-127 iso8859-6 iso88596 iso_8859-6 iso_8859-6:1987
iso-8859-7: csisolatingreek ecma-118 elot_928 greek greek8 iso-8859-7 iso-ir-126 iso8859-7 iso88597 iso_8859-7
iso-8859-7: iso_8859-7:1987 sun_eu_greek
iso-8859-8: csiso88598e csisolatinhebrew hebrew iso-8859-8 iso-8859-8-e iso-ir-138 iso8859-8 iso88598 iso_8859-8
iso-8859-8: iso_8859-8:1988 visual
iso-8859-8-i: csiso88598i iso-8859-8-i logical
iso-8859-10: csisolatin6 iso-8859-10 iso-ir-157 iso8859-10 iso885910 l6 latin6
iso-8859-13: iso-8859-13 iso8859-13 iso885913
iso-8859-14: iso-8859-14 iso8859-14 iso885914
iso-8859-15: csisolatin9 iso-8859-15 iso8859-15 iso885915 iso_8859-15 l9
iso-8859-16: iso-8859-16
koi8-r: cskoi8r koi koi8 koi8-r koi8_r
koi8-u: koi8-ru koi8-u
macintosh: csmacintosh mac macintosh x-mac-roman
windows-874: dos-874 iso-8859-11 iso8859-11 iso885911 tis-620 windows-874
windows-1250: cp1250 windows-1250 x-cp1250
windows-1251: cp1251 windows-1251 x-cp1251
windows-1252: ansi_x3.4-1968 ascii cp1252 cp819 csisolatin1 ibm819 iso-8859-1 iso-ir-100 iso8859-1 iso88591
windows-1252: iso_8859-1 iso_8859-1:1987 l1 latin1 us-ascii windows-1252 x-cp1252
windows-1253: cp1253 windows-1253 x-cp1253
windows-1254: cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9 iso_8859-9:1989 l5 latin5
windows-1254: windows-1254 x-cp1254
windows-1255: cp1255 windows-1255 x-cp1255
windows-1256: cp1256 windows-1256 x-cp1256
windows-1257: cp1257 windows-1257 x-cp1257
windows-1258: cp1258 windows-1258 x-cp1258
x-mac-cyrillic: x-mac-cyrillic x-mac-ukrainian
gbk: chinese csgb2312 csiso58gb231280 gb2312 gb_2312 gb_2312-80 gbk iso-ir-58 x-gbk
gb18030: gb18030
big5: big5 big5-hkscs cn-big5 csbig5 x-x-big5
euc-jp: cseucpkdfmtjapanese euc-jp x-euc-jp
iso-2022-jp: csiso2022jp iso-2022-jp
shift_jis: csshiftjis ms932 ms_kanji shift-jis shift_jis sjis windows-31j x-sjis
euc-kr: cseuckr csksc56011987 euc-kr iso-ir-149 korean ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949
replacement: csiso2022kr hz-gb-2312 iso-2022-cn iso-2022-cn-ext iso-2022-kr replacement
utf-16be: unicodefffe utf-16be
utf-16le: csunicode iso-10646-ucs-2 ucs-2 unicode unicodefeff utf-16 utf-16le
x-user-defined: x-user-defined
"""


def test_every_label_names_its_encoding_in_any_case_and_between_blanks() -> None:
    for line in LABELS.strip().splitlines():
        name, labels = line.split(": ")
        for label in labels.split():
            assert {encoding_name(form) for form in (label, label.upper(), f" \t{label}\r\n\f ")} == {name}, label


@pytest.mark.parametrize(
    "label",
    [
        "utf 8",
        "utf-8\u00a0",
        "\u2003utf-8",
        "utf-8\0",
        "\vutf-8",
        "ütf-8",
        "\u212aoi8-r",
        "utf\u20108",
        "latin-1",
        "gbk2312",
    ],
)
def test_a_label_with_any_other_character_names_no_encoding(label: str) -> None:
    assert encoding_name(label) is None


# The tables. A wrong character changes the checksum.


def pairs(leads: Iterable[int], trails: Iterable[int]) -> list[bytes]:
    return [bytes(pair) for pair in product(leads, trails)]


LEADS, HIGH_TRAILS, LOW_TRAILS = range(0x81, 0xFF), range(0xA1, 0xFF), range(0x40, 0x7F)
DIGITS = range(0x30, 0x3A)
TABLES = {
    "big5": ("big5", pairs(LEADS, [*LOW_TRAILS, *HIGH_TRAILS]), 18_594, 1368587073),
    "euc-kr": ("euc-kr", pairs(LEADS, range(0x41, 0xFF)), 17_048, 7215272),
    "gbk": ("gbk", pairs(LEADS, [*LOW_TRAILS, *range(0x80, 0xFF)]), 23_940, 1436891387),
    "shift_jis": (
        "shift_jis",
        pairs([*range(0x81, 0xA0), *range(0xE0, 0xFD)], [*LOW_TRAILS, *range(0x80, 0xFD)]),
        9_604,
        3135349011,
    ),
    "jis0208": ("euc-jp", pairs(HIGH_TRAILS, HIGH_TRAILS), 7_336, 4256499757),
    "jis0212": ("euc-jp", [b"\x8f" + pair for pair in pairs(HIGH_TRAILS, HIGH_TRAILS)], 6_067, 3084374402),
    "gb18030 ranges": (
        "gb18030",
        [first + second for first in pairs(range(0x81, 0x85), DIGITS) for second in pairs(LEADS, DIGITS)],
        39_419,
        4166335586,
    ),
}


@pytest.mark.parametrize("table", TABLES)
def test_every_character_of_several_bytes_is_that_of_the_standard(table: str) -> None:
    name, units, count, checksum = TABLES[table]
    texts = [decode(unit, name) for unit in units]
    assert sum(BAD not in text for text in texts) == count
    assert zlib.crc32("".join(texts).encode()) == checksum


@pytest.mark.parametrize(
    ("name", "undefined", "checksum"),
    [
        ("ibm866", "", 216035117),
        ("iso-8859-2", "", 2882560451),
        ("iso-8859-3", "a5 ae be c3 d0 e3 f0", 3471508833),
        ("iso-8859-4", "", 2439557934),
        ("iso-8859-5", "", 1001811772),
        ("iso-8859-7", "ae d2 ff", 2632929269),
        ("iso-8859-10", "", 3064519878),
        ("iso-8859-13", "", 3886811147),
        ("iso-8859-14", "", 3149322966),
        ("iso-8859-15", "", 3752440650),
        ("iso-8859-16", "", 2577539123),
        ("koi8-r", "", 916881493),
        ("koi8-u", "", 2435474466),
        ("macintosh", "", 2273417234),
        ("windows-874", "db dc dd de fc fd fe ff", 2578615369),
        ("windows-1250", "", 3228841373),
        ("windows-1251", "", 2600967230),
        ("windows-1252", "", 3710056619),
        ("windows-1253", "aa d2 ff", 3950868555),
        ("windows-1254", "", 2999830745),
        ("windows-1255", "d9 da db dc dd de df fb fc ff", 204541092),
        ("windows-1256", "", 3607716246),
        ("windows-1257", "a1 a5", 4084244197),
        ("windows-1258", "", 499102938),
        ("x-mac-cyrillic", "", 280407619),
        ("x-user-defined", "", 1062199475),
    ],
)
def test_every_byte_of_an_encoding_of_single_bytes_is_that_of_the_standard(
    name: str, undefined: str, checksum: int
) -> None:
    assert decode(bytes(range(128)), name) == bytes(range(128)).decode()
    text = decode(bytes(range(128, 256)), name)
    assert [byte for byte, character in enumerate(text, 128) if character == BAD] == list(bytes.fromhex(undefined))
    assert zlib.crc32(text.encode()) == checksum


# Bytes that are not text. "?" stands for U+FFFD.

BYTES = {
    # Together, the valid bytes of an incomplete character become one U+FFFD. So does a byte that begins no character.
    "utf-8": [
        ("c0 af", "??"),
        ("e0 80 80", "???"),
        ("ed a0 80 41", "???A"),
        ("f0 90 3c", "?<"),
        ("f0 9f 92", "?"),
        ("f4 90 80 80", "????"),
        ("e2 82 e2 82 ac", "?€"),
        ("ef bf bf f8 88", "\uffff??"),
        ("80 bf 41", "??A"),
    ],
    # Surrogates without their other half, and half a character at the end
    "utf-16le": [
        ("3d d8 a9 dc", "💩"),
        ("3d d8 41 00", "?A"),
        ("a9 dc 41 00", "?A"),
        ("3d d8 3d d8 a9 dc", "?💩"),
        ("41 00 42", "A?"),
        ("41 00 3d d8", "A?"),
        ("41 00 3d d8 a9", "A?"),
    ],
    "utf-16be": [("d8 3d dc a9", "💩"), ("dc a9 d8 3d 00 41", "??A"), ("00 41 d8", "A?")],
    # GB18030 has characters of one, two and four bytes
    "gbk": [
        ("80 ff 41", "€?A"),
        ("81 3c", "?<"),
        ("81 7f", "?\x7f"),
        ("ff 80 41", "?€A"),
        ("81 30 41 22", '?0A"'),
        ("81 30 84 36 a2 e3", "¥€"),
        ("a8 bf aa a1 fe 50", "ǹ\ue000⺁"),
    ],
    "gb18030": [
        ("81 30 81 30", "\x80"),
        ("84 31 a4 39 41", "\uffffA"),
        ("84 31 a5 30 41", "?A"),
        ("8f 39 fe 39 41", "?A"),
        ("90 30 81 30", "\U00010000"),
        ("e3 32 9a 35 41", "\U0010ffffA"),
        ("e3 32 9a 36 41", "?A"),
        ("fe 39 fe 39 41", "?A"),
        ("81 35 f4 37", "\ue7c7"),
        ("a8 bc a6 d9 fe 59 a3 a0", "ḿ︐龴\u3000"),
        ("82 35 90 37", "\u9fb4"),
        ("81 30 0a", "?0\n"),
        ("81 30 3c", "?0<"),
        ("81 30 81 3c", "?0?<"),
        ("81 30 81 41", "?0丄"),
        ("81 30 81", "?"),
        ("81 30", "?"),
        ("81", "?"),
    ],
    "big5": [
        ("88 62 88 64 88 a3 88 a5", "Ê̄Ê̌ê̄ê̌"),
        ("87 7a 87 df 8e 69", "㡵鿋箸"),
        ("a1 45 a1 4e a2 41 a2 44", "‧﹑∕￥"),
        ("c6 cf c6 de c6 df", "廴〃仝"),
        ("f9 d6 f9 fe a3 e1", "碁￭€"),
        ("80 41", "?A"),
        ("ff 41", "?A"),
        ("a1 3c", "?<"),
        ("a1 22", '?"'),
        ("81 40", "?@"),
        ("81 7e 3c", "?~<"),
        ("81 80 41", "?A"),
        ("81 ff 41", "?A"),
        ("81 a1 a4 a4", "?中"),
        ("a4 a4 a4", "中?"),
    ],
    "euc-jp": [
        ("8e b1 8f b0 a1 b0 a1", "ｱ丂亜"),
        ("8f a2 b7 a1 c1 a1 dd", "～～－"),
        ("ad a1 f9 a1 fc fe", "①纊＂"),
        ("b0 3c", "?<"),
        ("b0 21", "?!"),
        ("8e 41", "?A"),
        ("8e e0 41", "?A"),
        ("8e a0 41", "?A"),
        ("8f 41", "?A"),
        ("8f b0 41", "?A"),
        ("8f a1 a1 41", "?A"),
        ("8f b0 80 41", "?A"),
        ("80 a0 41", "??A"),
        ("a9 a1 b0 a1", "?亜"),
        ("b0 a1 b0", "亜?"),
        ("8f b0", "?"),
    ],
    "shift_jis": [
        ("b1 df 5c 7e", "ｱﾟ\\~"),
        ("80 a0 fd fe ff 41", "\x80????A"),
        ("f0 40 f0 80 f9 fc", "\ue000\ue03f\ue757"),
        ("81 5f 81 60 81 7c", "＼～－"),
        ("87 40 ed 40 fa 40 fc 4b", "①纊ⅰ黑"),
        ("81 3c", "?<"),
        ("81 7f", "?\x7f"),
        ("82 40", "?@"),
        ("82 41 3c", "?A<"),
        ("85 41", "?A"),
        ("85 9f 41", "?A"),
        ("81 fd 41", "?A"),
        ("fc fc 41", "?A"),
        ("88 9f 88", "亜?"),
    ],
    "euc-kr": [
        ("b0 a1 81 41 c6 52 fd fe", "가갂힣詰"),
        ("a2 e6 a2 e7", "€®"),
        ("81 3c", "?<"),
        ("81 5b", "?["),
        ("81 7b", "?{"),
        ("c6 53", "?S"),
        ("c9 a1 b0 a1", "?가"),
        ("80 ff 41", "??A"),
        ("81 80 41", "?A"),
        ("b0 a1 b0", "가?"),
    ],
    # Escape sequences change the meaning of the bytes after them
    "iso-2022-jp": [
        ("41 5c 7e", "A\\~"),
        ("1b 28 4a 41 5c 7e 1b 28 42 5c", "A¥‾\\"),
        ("1b 28 49 21 5f 1b 28 42 41", "｡ﾟA"),
        ("1b 28 49 20 60 0a 1b 28 42 41", "???A"),
        ("1b 24 40 30 21 1b 24 42 30 21", "亜亜"),
        ("1b 24 42 30 21 0a 1b 28 42 41", "亜?A"),
        ("1b 24 42 30 0a 1b 28 42 41", "?A"),
        ("1b 24 42 30 1b 28 42 41", "?A"),
        ("1b 24 42 29 21 1b 28 42 41", "?A"),
        ("1b 24 42 30 a1 30 21 1b 28 42 41", "?亜A"),
        ("1b 24 42 a1 30 21 1b 28 42 41", "?亜A"),
        ("1b 24 42 30 21", "亜"),
        ("1b 28 42 1b 28 42 41", "?A"),
        ("1b 24 42 1b 28 42 41", "?A"),
        ("1b 24 42 1b 28 42 1b 28 4a 5c", "??¥"),
        ("1b 28 42", ""),
        ("41 0e 42 0f 43 80 ff", "A?B?C??"),
        ("1b", "?"),
        ("1b 28", "?("),
        ("1b 24 28 44 41", "?$(DA"),
        ("1b 28 48 41", "?(HA"),
        ("1b 2e 41", "?.A"),
        ("1b 24 42 30 21 1b 24 44 30 21 1b 28 42", "亜?つ亜"),
    ],
    "windows-1252": [("80 81 8d 8f 90 9d 9f", "€\x81\x8d\x8f\x90\x9dŸ")],
    "windows-1255": [("ca d9 fd", "\u05ba?\u200e")],
    "windows-1253": [("81 aa b5 d2 ff", "\x81?µ??")],
    "windows-874": [("80 81 a1 db fc", "€\x81ก??")],
    "iso-8859-7": [("80 a4 a5 aa ae ff", "\x80€₯ͺ??")],
    "iso-8859-8-i": [("80 a1 aa e0 fd", "\x80?×א\u200e")],
    "iso-8859-6": [("a0 a1 ac c1", "\u00a0?،ء")],
    "koi8-u": [("ae be a4 b4", "ўЎєЄ")],
    "x-user-defined": [("41 80 ff", "A\uf780\uf7ff")],
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_decoded_as_the_standard_says(name: str) -> None:
    decoded_texts = [(body, decode(bytes.fromhex(body), name).replace(BAD, "?")) for body, _ in BYTES[name]]
    assert decoded_texts == BYTES[name]


MARKUP = "<>\"'&=/ \n0"


@pytest.mark.parametrize("name", ["big5", "euc-jp", "euc-kr", "gb18030", "gbk", "shift_jis", "utf-8", "windows-1252"])
def test_no_first_byte_of_a_character_eats_markup(name: str) -> None:
    for first in range(0x80, 0x100):
        for character in MARKUP:
            text = decode(bytes((first,)) + character.encode() + b"A", name)
            assert text.endswith(f"{character}A"), hex(first)


@pytest.mark.parametrize(
    ("charset", "attack"),
    [
        ("gbk", b"<p title='\x81'>seen</p>"),
        ("shift_jis", b"<p title='\x81'>seen</p>"),
        ("big5", b'<p title="\xa1">seen</p>'),
        ("euc-jp", b"<p title='\x8f\xb0'>seen</p>"),
        ("euc-jp", b"<b>\xb0</b><p>seen</p>"),
        ("euc-kr", b"<p title=\x81>seen</p>"),
        ("utf-8", b"<p title='\xf0\x9f'>seen</p>"),
        ("iso-2022-jp", b"<p title='\x1b$B\x1b(B'>seen</p>"),
    ],
)
def test_half_a_character_before_markup_hides_no_words(charset: str, attack: bytes) -> None:
    text = page_to_markdown(Page("https://example.org/", 200, f"text/html; charset={charset}", b"first " + attack))
    assert text.endswith("seen")


# The search for a page's encoding


WORD = "Привет"
KOI8, CP1251 = WORD.encode("koi8-r"), WORD.encode("cp1251")
FILL = b"<!-- " + b"x" * 900 + b" -->"  # a short declaration after it is still within the first 1024 bytes


@pytest.mark.parametrize(
    ("head", "text"),
    [
        # A byte order mark overrides the header. The header overrides the page.
        pytest.param((b"\xef\xbb\xbf", "koi8-r", b"<meta charset=koi8-r>", WORD.encode()), WORD, id="UTF-8 mark"),
        pytest.param((b"\xff\xfe", "koi8-r", b"", WORD.encode("utf-16-le")), WORD, id="UTF-16LE mark"),
        pytest.param((b"\xfe\xff", "utf-8", b"", WORD.encode("utf-16-be")), WORD, id="UTF-16BE mark"),
        pytest.param((b"\xff\xfe", "utf-16be", b"", WORD.encode("utf-16-le")), WORD, id="mark against the label"),
        pytest.param((b"\xef\xbb", "koi8-r", b"", KOI8), "О╩" + WORD, id="half a mark is text"),
        pytest.param((b"\xef\xbb\xbf\xef\xbb\xbf", "", b"", WORD.encode()), "\ufeff" + WORD, id="only one mark goes"),
        pytest.param((b" \xef\xbb\xbf", "windows-1252", b"", b"x"), " ï»¿x", id="a mark is at the start"),
        pytest.param((b"", "windows-1251", b"<meta charset=koi8-r>", CP1251), WORD, id="header before meta"),
        pytest.param((b"", "no-such", b"<meta charset=koi8-r>", KOI8), WORD, id="unknown header label"),
        pytest.param((b"", "'koi8-r'", b"", KOI8), WORD, id="header label in quotes"),
        # The page's own declaration
        *(
            pytest.param((b"", "", head, KOI8), WORD, id=head.decode()[-90:])
            for head in (
                b"<meta charset=koi8-r>",
                b"<meta charset='koi8-r'>",
                b'<meta charset=" KOI8-R ">',
                b"<meta charset = koi8-r >",
                b"<META CHARSET=koi8>",
                b"<meta\ncharset=koi8-r />",
                b"<meta/charset=koi8-r>",
                b"<meta a=1 b='>' charset=koi8-r>",
                b"<meta charset=koi8-r charset=utf-8>",
                b"<meta charset=no-such><meta charset=koi8-r>",
                b"<meta charset><meta charset=koi8-r>",
                b"<meta charset=''><meta charset=koi8-r>",
                b"<meta http-equiv=content-type content='text/html; charset=koi8-r'>",
                b"<meta content='charset=koi8-r' http-equiv=Content-Type>",
                b"<meta http-equiv=content-type content='charset koi; charset = \"koi8-r\"; x'>",
                b"<meta http-equiv=content-type content='text/html;charset=koi8-r;x=y'>",
                b"<meta http-equiv=content-type content='charset=no-such' charset=koi8-r>",
                b"<meta http-equiv=content-type><meta charset=koi8-r>",
                b"<!-- > <meta charset=gbk> --><meta charset=koi8-r>",
                b"<!--><meta charset=koi8-r>",
                b"<!x><meta charset=koi8-r>",
                b"</meta charset=gbk><meta charset=koi8-r>",
                b"</x><?x <meta charset=gbk ?><meta charset=koi8-r>",
                b"<x y='<meta charset=gbk>'><meta charset=koi8-r>",
                b"<metadata charset=gbk><meta charset=koi8-r>",
                b"<meta-x charset=gbk><meta charset=koi8-r>",
                b"<meta data-charset=gbk charset=koi8-r>",
                b"<meta name=description content='charset=gbk'><meta charset=koi8-r>",
                b"<meta http-equiv=refresh content='0; charset=gbk'><meta charset=koi8-r>",
                FILL + b"<meta charset=koi8-r>",
                b"<?xml version='1.0' encoding='koi8-r'?>",
                b"<?xml encoding='gbk'?><meta charset=koi8-r>",
            )
        ),
        # Declarations that are not valid, or that can't be true: the text is read as UTF-8
        *(
            pytest.param((b"", "", head, WORD.encode()), WORD, id=head.decode())
            for head in (
                b"<meta charset=utf-16>",
                b"<meta charset=utf-16be>",
                b"<meta charset=unicode>",
                b"<meta http-equiv=content-type content='text/html; charset=UTF-16LE'>",
                b"<?xml encoding='utf-16'?>",
                b"<meta charset=utf-7>",
                b"<meta charset=utf-32>",
                b"<meta http-equiv=content-type content='charset'>",
                b"<!x <meta charset=koi8-r>",
                b"<meta charset=koi8-r/>",
                b"<meta content='charset=koi8-r'>",
            )
        ),
        pytest.param((b"", "", b"<meta charset=x-user-defined>", b"caf\xe9"), "café", id="meta x-user-defined"),
        pytest.param((b"", "x-user-defined", b"", b"caf\xe9"), "caf\uf7e9", id="header x-user-defined"),
        pytest.param((b"", "", b"<meta charset=latin1>", b"\x93x\x94"), "“x”", id="latin1 is windows-1252"),
        pytest.param((b"", "", b"<meta charset=gb2312>", "€丂".encode("gb18030")), "€丂", id="gb2312 is gbk"),
    ],
)
def test_the_encoding_of_a_page_is_found_as_the_standard_says(head: tuple[bytes, str, bytes, bytes], text: str) -> None:
    mark, charset, declaration, body = head
    content_type = f"{HTML}; charset={charset}" if charset else HTML
    assert decoded(mark + declaration + body, content_type) == decode(declaration, "windows-1252") + text


@pytest.mark.parametrize("charset", ["iso-2022-kr", "hz-gb-2312", "ISO-2022-CN", "replacement"])
@pytest.mark.parametrize("where", ["header", "meta"])
def test_a_page_in_an_encoding_that_browsers_refuse_is_refused(charset: str, where: str) -> None:
    body, content_type = (b"x", f"{HTML}; charset={charset}") if where == "header" else (b"<meta charset=%b>x", HTML)
    with pytest.raises(ValueError, match="an encoding that browsers refuse"):
        decoded(body.replace(b"%b", charset.encode()), content_type)
