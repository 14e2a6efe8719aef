"""Generated and odd pages: only the project's errors are raised, no visible word is lost, no hidden word is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from random import Random

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from selectolax.lexbor import LexborHTMLParser, LexborNode

from nexum_engine.errors import FinalError
from support.tools.web import Page, WebError
from support.tools.web.html.attributes import names
from support.tools.web.page import page_to_markdown

URL = "https://example.org/dir/page"
ODD_VALUES = ["½", "²", "-1", "9" * 5000, "1e9", "", " 7 ", "+3", "٣", "0"]
ODD_VALUES += ["http://[", "//", "a\nb", "'", "<", "&#0;", "%"]

# Elements whose words a person sees. `main` and `article` are missing: if one of them holds most of a page, the words
# beside it are not read.
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


# Random pages of any markup, compared with the tree that the HTML standard makes of them

RANDOM_PAGES = 1_000
NAMES = sorted(
    (SHOWN | names("a b s button nobr select option textarea template svg text g desc foreignObject dialog applet xmp"))
    - {"main", "article", "rb"}
)
ODD_TAGS = [
    "<br>",
    "<hr>",
    "<img alt=|>",
    "<input value=|>",
    "<input type=hidden value=|>",
    "<col>",
    "<!--|-->",
    "<embed>",
]
ODD_TAGS += ["<col>", "</br>", "</p>", "<![CDATA[|]]>", "<?|>", "</ |>", "<script>|</script>", "<iframe>|</iframe>"]
HIDING = [
    "hidden",
    "style='display:none'",
    "style='visibility:hidden'",
    "style='visibility:visible'",
    "style='font-size:0'",
]
NEVER_SHOWN = names("head title script style noscript template iframe rp datalist") | {"desc"}


def random_page(random: Random) -> str:
    names_here = random.sample(NAMES, random.randint(3, 12))
    opened: list[str] = []
    html = ["w0w"]
    for number in range(1, random.randint(3, 24)):
        kind = random.random()
        if kind < 0.4:
            html.append(f"w{number}w{random.choice(['', '', ' '])}")
        elif kind < 0.7:
            opened.append(random.choice(names_here))
            html.append(f"<{opened[-1]} {random.choice(HIDING) if random.random() < 0.25 else ''}>")
        elif kind < 0.93:
            html.append(f"</{opened.pop() if opened and random.random() < 0.7 else random.choice(names_here)}>")
        else:
            html.append(random.choice(ODD_TAGS).replace("|", f"w{number}w"))
    return "".join(html)


def shown_words(node: LexborNode, *, visible: bool = True, sized: bool = True, drawn: bool = False) -> Iterator[str]:
    """Yield the words that a browser shows of a parsed page, without those in `select` elements."""
    if node.is_text_node:
        yield from re.findall(r"w\d+w", node.text_content or "") if visible and sized and not drawn else ()
        return
    tag = (node.tag or "").lower()
    attributes = node.attributes
    style = attributes.get("style") or ""
    is_closed_dialog = tag == "dialog" and "open" not in attributes
    if not node.is_element_node or "hidden" in attributes or style == "display:none" or is_closed_dialog:
        return
    if tag in NEVER_SHOWN - ({"desc"} if not drawn else set()) or tag == "select":
        return
    visible = style == "visibility:visible" or (visible and style != "visibility:hidden")
    sized = sized and style != "font-size:0"
    drawn = tag == "svg" or (drawn and tag not in ("text", "foreignobject"))
    if tag in ("img", "input") and attributes.get("type") != "hidden" and visible and sized and not drawn:
        yield from re.findall(r"w\d+w", attributes.get("alt") or attributes.get("value") or "")
    for child in node.iter(include_text=True):
        yield from shown_words(child, visible=visible, sized=sized, drawn=drawn)


def test_the_words_of_random_pages_are_those_of_the_standards_tree() -> None:
    random = Random(11)
    for _ in range(RANDOM_PAGES):
        html = random_page(random)
        tree = LexborHTMLParser(html, scripting=True)
        assert tree.root is not None
        chosen = {word for select in tree.css("select") for word in re.findall(r"w\d+w", select.html or "")}
        shown = set(shown_words(tree.root))
        read_words: set[str] = set()
        with suppress(FinalError):  # the page shows no words
            read_words.update(re.findall(r"w\d+w", read(html)))
        assert read_words - chosen == shown, html
