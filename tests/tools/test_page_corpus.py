"""Generated and odd pages: no error but ours, no visible word lost, and no hidden word read."""

from __future__ import annotations

import re
from contextlib import suppress

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nexum_engine.errors import FinalError
from support.tools.web import Page, WebError
from support.tools.web.html.attributes import names
from support.tools.web.page import page_to_markdown

URL = "https://example.org/dir/page"
ODD_VALUES = ["½", "²", "-1", "9" * 5000, "1e9", "", " 7 ", "+3", "٣", "0"]
ODD_VALUES += ["http://[", "//", "a\nb", "'", "<", "&#0;", "%"]

# Elements whose words a person sees. Words beside a `main` or an `article` that holds most of a page are left out.
SHOWN = names(
    "p div span b i em strong u s del ins sup sub code pre kbd samp tt a q h1 h3 h6 ul ol li dl dt dd blockquote"
    " table tr td th thead tbody tfoot caption section figure figcaption address center font big small label button"
    " fieldset legend details summary ruby rb abbr cite time mark bdo nobr listing x-y script-x style-guide template-z"
    " menu dir hgroup output var dfn data body html math mi mn mrow msup"
)
VOID = ["<br>", "<hr>", "<wbr>", "<img src=x>", "<input type=hidden>", "<col>"]
VOID += ["<!-- <script> -->", "<!doctype html>", "<?x?>", "<embed src=x>", "<div/>", "<!-->", "</br>"]
HIDDEN = ["<!--|-->", "</|>", "<script>|</script>", "<style>|</style>", "<template>|</template>", "<p title='|'>x</p>"]
HIDDEN += ["<template><td>|</template>", "<template><div>|<b></template>", "<script><!--<script></script>|--></script>"]
HIDDEN += ["<p hidden>|</p>", "<noscript>|</noscript>", "<iframe>|</iframe>", "<b style='display:none'>|</b>"]
ATTRIBUTES = [
    "start",
    "colspan",
    "rowspan",
    "value",
    "href",
    "class",
    "style",
    "span",
    "width",
    "type",
    "title",
    "lang",
]
FRAGMENTS = names(
    "< <! <? </ <!-- --> ]]> <![CDATA[ & &# &lt; > / = ' \" a 0 -1 99999999999 ; <td <ol <li <a <img <base <input"
    " <script colspan=' rowspan= start= value= href= alt= src=/x style='font-size: http://[ <title> <textarea> <svg>"
    " <plaintext> <math> <mfrac> <msup> <select> <option> <form> <main> <header> <body> <style> </style> <x-y>"
)


@st.composite
def tags(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from(sorted(SHOWN)))
    if draw(st.booleans()):
        return f"</{name}>"
    attributes = "".join(
        f' {draw(st.sampled_from(ATTRIBUTES))}="{draw(st.sampled_from(ODD_VALUES))}"'
        for _ in range(draw(st.integers(0, 2)))
    )
    return f"<{draw(st.sampled_from([name, name.upper()]))}{attributes}>"


WORD, UNSEEN = "word", "unseen"
PIECES = st.sampled_from([WORD] * 3 + [UNSEEN]) | st.sampled_from(VOID) | tags()


def read(html: str | bytes, content_type: str = "text/html; charset=utf-8") -> str:
    body = html if isinstance(html, bytes) else html.encode("utf-8", "replace")
    return page_to_markdown(Page(URL, 200, content_type, body), limit=1_000_000)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PIECES, min_size=1, max_size=40), st.data())
def test_every_visible_word_of_tag_soup_is_read_and_no_hidden_word(pieces: list[str], data: st.DataObject) -> None:
    html, words = [], []
    for number, piece in enumerate(pieces):
        if piece == WORD:
            words.append(f"seen{number}x")
            html.append(f"{words[-1]} ")
        elif piece == UNSEEN:
            html.append(data.draw(st.sampled_from(HIDDEN)).replace("|", f"hidden{number}x"))
        else:
            html.append(piece)
    assume(words)
    text = read("".join(html))
    assert [word for word in words if word not in text] == []
    assert re.findall(r"hidden\d+x", text) == []


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([" ", "\0", "\r", *sorted(FRAGMENTS)]) | tags() | st.text(max_size=4)).map("".join),
    st.sampled_from(["text/html", "", "application/xhtml+xml", "application/json", "text/xml", "text/plain", "x"]),
)
def test_any_page_is_text_or_one_of_our_errors(text: str, content_type: str) -> None:
    with suppress(WebError):
        try:
            assert read(text, content_type)
        except FinalError as error:
            assert re.search("holds no text|binary data|is not a page", str(error)), error  # noqa: PT017


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.sampled_from(["text/html", "text/html; charset=gb18030", "text/plain", "text/xml"]))
def test_any_bytes_are_text_or_one_of_our_errors(body: bytes, content_type: str) -> None:
    with suppress(FinalError):
        assert read(body, content_type)
