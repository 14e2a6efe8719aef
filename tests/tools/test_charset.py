"""The encoding of a page is found as the HTML standard says, and decoded as the WHATWG Encoding standard says."""

from __future__ import annotations

import codecs
from contextlib import suppress

import pytest
import webencodings
from hypothesis import given
from hypothesis import strategies as st

from support.tools.web.charset import decoded
from support.tools.web.decoders import REPLACEMENT, decode, encoding_name

HTML, TEXT = "text/html", "text/plain"
KANJI, KANJI_JIS = "日本語", b"\x1b$BF|K\\8l\x1b(B"
CYRILLIC = "Привет"


@pytest.mark.parametrize(
    ("label", "body", "text"),
    [
        # Labels that Python doesn't have, or has for another encoding
        ("x-sjis", KANJI.encode("cp932"), KANJI),
        ("windows-31j", KANJI.encode("cp932"), KANJI),
        ("ms_kanji", KANJI.encode("cp932"), KANJI),
        ("x-gbk", "中文".encode("gbk"), "中文"),
        ("csgb2312", "中文".encode("gbk"), "中文"),
        ("x-x-big5", "中文".encode("big5"), "中文"),
        ("ks_c_5601-1987", "한국어".encode("cp949"), "한국어"),
        ("windows-874", "ภาษาไทย".encode("cp874"), "ภาษาไทย"),
        ("dos-874", "ภาษาไทย".encode("cp874"), "ภาษาไทย"),
        ("x-mac-cyrillic", CYRILLIC.encode("mac_cyrillic"), CYRILLIC),
        ("x-mac-ukrainian", CYRILLIC.encode("mac_cyrillic"), CYRILLIC),
        ("x-cp1251", CYRILLIC.encode("cp1251"), CYRILLIC),
        ("iso-8859-8-i", "שלום".encode("iso-8859-8"), "שלום"),
        ("unicode-1-1-utf-8", CYRILLIC.encode(), CYRILLIC),
        ("x-user-defined", b"a\xe9", "a\uf7e9"),
        ("utf-16", CYRILLIC.encode("utf-16-le"), CYRILLIC),
        ("utf-16be", CYRILLIC.encode("utf-16-be"), CYRILLIC),
        ("iso-8859-1", b"\x93caf\xe9\x94 \x80", "“café” €"),
        ("us-ascii", b"\x93caf\xe9\x94", "“café”"),
        ("iso-8859-9", b"\x80 \xfd", "€ ı"),
        (" UTF-8 ", CYRILLIC.encode(), CYRILLIC),
        # For these labels, browsers decode a superset of the named encoding. These bytes are only in the superset.
        ("shift_jis", b"\x87\x40\xfa\x40\xb1", "①ⅰｱ"),
        ("euc-jp", b"\xad\xa1\xfc\xa1 \xb0\xa1", "①釗 亜"),
        ("iso-2022-jp", KANJI_JIS, KANJI),
        ("iso-2022-jp", b"\x1b$B-!0!\x1b(B \x1b(I1\x1b(B \x1b(J\\\x1b(B", "①亜 ｱ ¥"),
        ("euc-kr", b"\x8c\x63 \xb0\xa1", "똠 가"),
        ("big5", b"\xf9\xd6 \xa3\xe1 \xa4\xa4 \x88\x62", "碁 € 中 Ê̄"),
        ("gb2312", b"\x80 \x81\x40 \xd6\xd0", "€ 丂 中"),
        ("gbk", b"\x81\x30\x84\x36 \xa2\xe3", "¥ €"),
        ("gb18030", b"\x80\x94\x39\xda\x33", "€💩"),
    ],
)
def test_text_is_decoded_as_in_a_browser(label: str, body: bytes, text: str) -> None:
    assert decoded(body, f"text/plain; charset={label.strip()}") == text
    assert decode(body, str(encoding_name(label))) == text


@pytest.mark.parametrize("label", ["unicode_escape", "zip", "punycode", "utf-7", "utf-32", "cp037", "no-such", ""])
def test_labels_that_the_standard_lacks_are_ignored(label: str) -> None:
    assert encoding_name(label) is None
    assert decoded(CYRILLIC.encode(), f"text/plain; charset={label}") == CYRILLIC


@pytest.mark.parametrize("label", ["hz-gb-2312", "iso-2022-kr", "iso-2022-cn-ext"])
def test_encoding_that_browsers_refuse_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="an encoding that browsers refuse"):
        decoded(b"~{<:Ky2;~}", f"text/html; charset={label}")


@pytest.mark.parametrize("body", [b"\xff", b"\x81", b"\x81\xff", b"\x1b$B\x7f", b"\x8f\xa1", b"\x80"])
def test_undecodable_bytes_leave_the_text_after_them(body: bytes) -> None:
    for name in set(webencodings.labels.LABELS.values()) - {REPLACEMENT, "utf-16le", "utf-16be"}:
        text = decode(body + b"\x1b(B" * (name == "iso-2022-jp") + b"\nafter", name)
        assert text.endswith("\nafter"), name


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        # A byte order mark overrides everything else
        (codecs.BOM_UTF8 + CYRILLIC.encode(), "text/html; charset=windows-1251", CYRILLIC),
        (codecs.BOM_UTF16_BE + CYRILLIC.encode("utf-16-be"), "text/html; charset=utf-8", CYRILLIC),
        (codecs.BOM_UTF16_LE + b"<\0", HTML, "<"),
        # The header overrides the page
        (b"<meta charset=koi8-r>" + CYRILLIC.encode("cp1251"), "text/html; charset=windows-1251", CYRILLIC),
        (b"<meta charset=koi8-r>" + CYRILLIC.encode("koi8-r"), "text/html; charset=no-such", CYRILLIC),
        (CYRILLIC.encode("cp1251"), "text/html; Charset = 'windows-1251'; x=y", CYRILLIC),
        # The page's declaration
        (b"<META CHARSET='koi8-r'>" + CYRILLIC.encode("koi8-r"), HTML, CYRILLIC),
        (b"<meta content='x; charset=koi8-r' http-equiv=Content-Type>" + CYRILLIC.encode("koi8-r"), HTML, CYRILLIC),
        (b"<!-- <meta charset=gbk> --><meta charset=koi8-r>" + CYRILLIC.encode("koi8-r"), HTML, CYRILLIC),
        (b"<p title='<meta charset=gbk>'><meta charset=koi8-r>" + CYRILLIC.encode("koi8-r"), HTML, CYRILLIC),
        (b"<meta name=x charset=no-such><meta/charset='koi8-r'/>" + CYRILLIC.encode("koi8-r"), HTML, CYRILLIC),
        (b"<meta charset=koi8-r charset=gbk>" + CYRILLIC.encode("koi8-r"), HTML, CYRILLIC),
        (b"<meta name=charset content='charset=gbk'>" + CYRILLIC.encode(), HTML, CYRILLIC),
        (b"<metadata charset=gbk>" + CYRILLIC.encode(), HTML, CYRILLIC),
        (b"<meta charset=utf-16le>" + CYRILLIC.encode(), HTML, CYRILLIC),
        (b"<meta charset=x-user-defined>caf\xe9", HTML, "café"),
        (b"<meta charset=koi8-r>" + CYRILLIC.encode(), TEXT, f"<meta charset=koi8-r>{CYRILLIC}"),
        (b"<?xml version='1.0' encoding='koi8-r'?>" + CYRILLIC.encode("koi8-r"), "text/xml", CYRILLIC),
        (b"<?xml version='1.0' encoding='koi8-r'?>" + CYRILLIC.encode("koi8-r"), "application/xhtml+xml", CYRILLIC),
        (b"<meta charset=iso-2022-jp>" + KANJI_JIS, HTML, KANJI),
        # Nothing is declared
        (CYRILLIC.encode(), HTML, CYRILLIC),
        (b"caf\xe9 cr\xe8me", HTML, "café crème"),
        (CYRILLIC.encode() + b"\xff", HTML, CYRILLIC + "\ufffd"),
        ("<p>wörds</p>".encode("utf-16-le"), HTML, "<p>wörds</p>"),
        ("<p>wörds</p>".encode("utf-16-be"), HTML, "<p>wörds</p>"),
        ("<?xml version='1.0'?><a/>".encode("utf-16-be"), "text/xml", "<?xml version='1.0'?><a/>"),
    ],
)
def test_the_encoding_is_sniffed_in_the_order_of_the_standard(body: bytes, content_type: str, text: str) -> None:
    assert decoded(body, content_type).endswith(text)


@pytest.mark.parametrize("body", [b"a\0\0b\0", b"\x7fELF\0\0\0", b"words words words words\0"])
@pytest.mark.parametrize("content_type", [TEXT, HTML, "text/html; charset=utf-8"])
def test_a_body_with_nuls_is_binary(body: bytes, content_type: str) -> None:
    with pytest.raises(ValueError, match="holds binary data"):
        decoded(body, content_type)


LABELS = st.sampled_from([*sorted(webencodings.labels.LABELS), "", "no-such"])
PIECES = st.sampled_from(
    [b"<meta ", b"charset", b"=", b"'", b">", b"<!--", b"<?xml encoding='", b"\x1b$B", b"\x80", b"\x8f"]
)


@given(LABELS, st.binary() | st.lists(PIECES | st.binary(max_size=3)).map(b"".join), st.sampled_from([TEXT, HTML, ""]))
def test_any_bytes_are_text_or_a_reason_in_words(label: str, body: bytes, media: str) -> None:
    with suppress(ValueError):
        decoded(body, f"{media}; charset={label}").encode("utf-8", "surrogatepass")
