"""page_to_markdown: the conversion of a response to the text that a model reads."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from nexum_engine.errors import FinalError
from support.tools.web import Page, WebError
from support.tools.web.page import page_to_markdown

URL = "https://example.org/dir/page"


def read(
    body: bytes | str, content_type: str = "text/html; charset=utf-8", *, status: int = 200, **more: object
) -> str:
    limit = more.pop("limit", 20_000)
    truncated = bool(more.pop("truncated", False))
    assert not more
    assert isinstance(limit, int)
    body = body.encode() if isinstance(body, str) else body
    return page_to_markdown(Page(URL, status, content_type, body, truncated), limit=limit)


PAGE = """<!DOCTYPE html><html><head><title>A &amp; B
  title</title><style>p{}</style></head><body>
<header>SITE HEADER</header><nav><a href="/n">NAV</a></nav><!-- COMMENT -->
<article><header><p>By somebody</p></header>
<h2>Part</h2><p>Tokyo had 14,187,000
   people_here *today* in&nbsp;2024 [1] #1 &lt;b&gt;.</p>
<p hidden>HIDDEN1</p><p aria-hidden="true">HIDDEN2</p><p style="color:red; DISPLAY : none">HIDDEN3</p>
<script>SCRIPT1 < "</p>"</script><noscript>NOSCRIPT</noscript><template>TEMPLATE</template>
<svg><title>SVG</title></svg><iframe src="x">IFRAME</iframe><form><p>FORM</p></form>
<ul><li>one<ul><li>inner</li></ul></li><li>two</li></ul>
<pre><code>def f():
    return  1
</code></pre>
<table><tr><th>City</th><th>People</th></tr><tr><td>Tokyo</td><td>14</td></tr></table>
</article><aside>ASIDE</aside><footer>FOOTER</footer></body></html>"""


def test_content_is_kept_and_its_surroundings_dropped() -> None:
    assert read(PAGE) == (
        "# A & B title\n\nBy somebody\n\n## Part\n\n"
        "Tokyo had 14,187,000 people_here *today* in 2024 [1] #1 <b>.\n\n"
        "- one\n  - inner\n- two\n\n"
        "```\ndef f():\n    return  1\n```\n\n"
        "| City | People |\n| --- | --- |\n| Tokyo | 14 |"
    )


def test_a_title_is_not_added_to_a_page_that_has_a_first_heading() -> None:
    assert read("<title>Title</title><h1>Heading</h1><p>Text</p>") == "# Heading\n\nText"


def test_the_main_part_is_preferred_if_it_holds_most_of_the_text() -> None:
    rest = "<div>rest of the page</div>"
    assert read(f"{rest}<main><p>{'long text ' * 9}</p></main>") == ("long text " * 9).strip()
    assert "rest of the page" in read(f"{rest}<main><p>short</p></main>")
    assert read(f"{rest}<div role=main><p>{'long text ' * 9}</p></div>") == ("long text " * 9).strip()


def test_a_form_around_the_whole_page_is_kept() -> None:
    assert read("<body><form><p>All of the text</p></form><p>x</p></body>") == "All of the text\n\nx"


def test_links_are_absolute_web_addresses() -> None:
    html = """<p><a href="/a b(c)">one</a> <a href="next?x=1#y" title="t">two</a> <a href="javascript:x()">three</a>
    <a href="#part">four</a> <a href="http://[bad">five</a> <a href="mailto:a@b.c">six</a> <a href="/e"> </a>
    <a href="https://user:pw@example.org/">seven</a></p>"""
    assert read(html) == (
        "[one](https://example.org/a%20b%28c%29) [two](https://example.org/dir/next?x=1#y) three four five six seven"
    )


def test_links_are_resolved_against_the_pages_own_base() -> None:
    html = '<head><base href="https://other.org/x/"></head><a href="y">link</a>'
    assert read(html) == "[link](https://other.org/x/y)"


def test_images_without_text_or_with_inline_data_are_dropped() -> None:
    html = '<p>a<img src="data:image/png;base64,AAAA" alt="inline">b<img src="/i.png">c<img src="/j.png" alt="J"></p>'
    assert read(html) == "ainlinebc![J](https://example.org/j.png)"


def test_invisible_characters_are_dropped() -> None:
    hidden = "a\u200bb\u202ec\u2066d\ufeffe\x01f\x1b[31mg\u00adh\U000e0041i\ufe0fj"
    assert read(hidden, "text/plain; charset=utf-8").replace("[31m", "") == "abcdefghij"
    assert "\u200b" not in read("<p>a&#8203;b &#x202E;c &#xD800;d</p>")


def test_text_keeps_all_lines_but_extra_empty_ones() -> None:
    assert read("  a  b \r\nc\rd\n\n\n\n\ne\n\n", "text/plain") == "  a  b\nc\nd\n\ne"


def test_json_is_indented_if_no_value_changes() -> None:
    assert read('{"a":[1,2.5,"\u00fc"]}', "application/json") == '{\n  "a": [\n    1,\n    2.5,\n    "ü"\n  ]\n}'
    assert json.loads(read('{"a": 1}', "application/ld+json; charset=utf-8")) == {"a": 1}
    same = ['{"price":1.10}', '{"a":1,"a":2}', '{"a":NaN}', '{"a":', "[" * 50_000, f"[{'9' * 5000}]"]
    for text in same:
        assert read(text, "application/json", limit=100_000) == text
    assert read(r'["\ud800"]', "application/json").encode()


@pytest.mark.parametrize(
    "content_type", ["text/xml", "application/xml", "application/atom+xml", "text/csv", "Text/Markdown; x=y"]
)
def test_xml_and_other_text_is_unchanged(content_type: str) -> None:
    assert read("<a>\n <b>1</b>\n</a>", content_type) == "<a>\n <b>1</b>\n</a>"


@pytest.mark.parametrize(
    "content_type",
    ["image/png", "application/pdf", "application/octet-stream", "video/mp4", "image/svg+xml", "nonsense", "a\u200b/b"],
)
def test_unreadable_type_is_a_final_error_with_the_readable_types(content_type: str) -> None:
    with pytest.raises(FinalError, match="only HTML, text, JSON and XML can be read"):
        read(b"%PDF", content_type)


def test_binary_data_with_a_text_type_is_refused() -> None:
    with pytest.raises(FinalError, match="holds binary data"):
        read(b"\x7fELF\0\0\0", "text/plain")


def test_response_without_a_type_is_read_as_html() -> None:
    assert read("<h1>Hello</h1>", "") == "# Hello"
    assert read("plain words", "") == "plain words"
    with pytest.raises(FinalError, match="binary"):
        read(b"PK\3\4\0\0", "")


GREEK = "Καλημέρα κόσμε"


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        (GREEK.encode("iso-8859-7"), "text/html; charset=ISO-8859-7", GREEK),
        (GREEK.encode("iso-8859-7"), 'text/plain; charset="iso-8859-7"', GREEK),
        (b"<meta charset=iso-8859-7>" + GREEK.encode("iso-8859-7"), "text/html", GREEK),
        (
            b'<meta http-equiv=content-type content="text/html; charset=windows-1253">' + GREEK.encode("cp1253"),
            "text/html",
            GREEK,
        ),
        (GREEK.encode("utf-16"), "text/plain", GREEK),
        (GREEK.encode("utf-8-sig"), "text/plain; charset=iso-8859-1", GREEK),
        (GREEK.encode("utf-16-le"), "text/plain; charset=utf-16le", GREEK),
        (GREEK.encode(), "text/plain", GREEK),
        (GREEK.encode(), "text/plain; charset=no-such-charset", GREEK),
        (GREEK.encode(), "text/plain; charset=unicode_escape", GREEK),
        (GREEK.encode(), "text/plain; charset=zip", GREEK),
        (b"<meta charset=utf-16>" + GREEK.encode(), "text/html", GREEK),
        ("日本語".encode("shift_jis"), "text/html; charset=Shift_JIS", "日本語"),
        ("中文".encode("gb18030"), "text/plain; charset=gb2312", "中文"),
        ("\u201cquoted\u201d".encode("cp1252"), "text/plain; charset=iso-8859-1", "\u201cquoted\u201d"),
        (b"caf\xe9", "text/plain", "café"),
        (GREEK.encode()[:-1], "text/plain", GREEK[:-1] + "\ufffd"),
        (
            b'<?xml version="1.0" encoding="iso-8859-7"?><a>' + GREEK.encode("iso-8859-7") + b"</a>",
            "application/xml",
            f'<?xml version="1.0" encoding="iso-8859-7"?><a>{GREEK}</a>',
        ),
    ],
)
def test_the_charset_is_found(body: bytes, content_type: str, text: str) -> None:
    assert read(body, content_type) == text


def test_a_long_page_is_cut_with_a_note() -> None:
    assert read("x" * 83_112, "text/plain") == f"{'x' * 20_000}\n\n[cut: the first 20,000 of 83,112 characters]"
    assert read("x" * 20_000, "text/plain") == "x" * 20_000
    assert len(read("<p>word</p>" * 10_000)) < 20_100


def test_truncated_body_has_a_note() -> None:
    assert read("abc", "text/plain", truncated=True) == "abc\n\n[cut: the first 3 characters; the page continues]"
    assert read("x" * 30, "text/plain", limit=10, truncated=True).endswith(
        "[cut: the first 10 characters; the page continues]"
    )


def test_html_beyond_the_limit_has_a_note() -> None:
    text = read("<p>start</p><p hidden>" + "x" * 600_000 + "</p><p>end</p>")
    assert text == "start\n\n[cut: the first 5 characters; the page continues]"


def test_scripts_do_not_use_up_the_size_that_is_converted() -> None:
    html = f"<script>{'x' * 600_000}</script><STYLE>{'y' * 600_000}</STYLE ><p>content</p>"
    assert read(html) == "content"
    assert read("<p>before</p><script>never closed" + "x" * 600_000) == "before"


@pytest.mark.parametrize("tag", ["div", "b", "header", "form", "main", "ul><li", "a href=/x", "table><tr><td"])
def test_deeply_nested_html_is_read_as_flat_text(tag: str) -> None:
    assert "the innermost" in read(f"<p>outer</p>{f'<{tag}>' * 5000}the innermost")


def test_nesting_up_to_the_limit_is_converted() -> None:
    assert read("<div>" * 240 + "<h2>deep</h2>" + "</div>" * 240) == "## deep"


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 425, 429])
def test_temporary_status_may_be_retried(status: int) -> None:
    with pytest.raises(WebError, match=f"{URL}.*HTTP {status}"):
        read("x", status=status)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 410, 418, 451, 304, 300, 199])
def test_another_status_is_final(status: int) -> None:
    with pytest.raises(FinalError, match=f"{URL}.*HTTP {status}"):
        read("x", status=status)


@pytest.mark.parametrize("body", ["", "  \n ", "<title>App</title><div id=root></div><script>run()</script>"])
def test_page_without_text_is_a_final_error_with_a_likely_cause(body: str) -> None:
    with pytest.raises(FinalError, match="holds no text; it may need a browser"):
        read(body)


def test_sentences_stay_in_their_order_and_verbatim() -> None:
    sentences = [f"Sentence {n} has_under_scores, 2*{n} stars & a [bracket]." for n in range(50)]
    text = read("".join(f"<p>{sentence.replace('&', '&amp;')}</p>\n" for sentence in sentences))
    positions = [text.index(sentence) for sentence in sentences]
    assert all(first < second for first, second in pairwise(positions))
