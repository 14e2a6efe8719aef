"""Words that a page's own style sheets hide are not read. Words that may be shown are read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tools.web import Page
from support.tools.web.html.attributes import names
from support.tools.web.html.sheets import MAX_SHEETS, Sheets
from support.tools.web.page import page_to_markdown


def read(sheet: str, body: str) -> str:
    html = f"<style>{sheet}</style><p>first</p>{body}"
    return page_to_markdown(Page("https://example.org/", 200, "text/html; charset=utf-8", html.encode()))


@pytest.mark.parametrize(
    ("sheet", "body"),
    [
        (".x{display:none}", "<p class=x>no"),
        (".x{visibility:hidden}", "<p class='a x b'>no"),
        ("p.x{display:none!important}", "<p class=x style='display:block'>no"),
        (".x{display:none}", "<p class=x style='display:block'>yes"),
        ("#i{display:none}", "<p id=i>no"),
        (".x.y{display:none}", "<p class='x y'>no<p class=x>yes"),
        (".x{display:none}.x{display:block}", "<p class=x>yes"),
        ("p.x{display:none}.x{display:block}", "<p class=x>no"),
        (".x{display:none} .open .x{display:block}", "<div class=open><p class=x>yes</div>"),
        (".x{display:none} .x:first-child{display:block}", "<p class=x>yes"),
        (".x{display:none} .x:hover{display:block}", "<p class=x>no"),
        (".x::before{display:none}", "<p class=x>yes"),
        ("@media print{.x{display:none}}", "<p class=x>yes"),
        ("@media screen{.x{display:none}}", "<p class=x>no"),
        ("@media (max-width:600px){.x{display:none}}", "<p class=x>yes"),
        (".x{display:none}@media (min-width:600px){.x{display:block}}", "<p class=x>yes"),
        ("body{display:none}", "<p>yes"),
        ("div{display:none}", "<div>no</div>"),
        ("/* .x */ .x /* c */ , .z { display : none }", "<p class=x>no<p class=z>no"),
        (".a > .x, .x + .x{display:none}", "<p class=x>yes"),
        (".x{font-size:0}.y{font-size:12px}", "<p class=x>no <b class=y>yes</b>"),
        (".x{font-size:0}.q .y{font-size:12px}", "<p class=x>no <b class=y>yes</b>"),
        (".sr{position:absolute;width:1px;height:1px;overflow:hidden;clip:rect(0,0,0,0)}", "<p class=sr>no"),
        (".sr{position:absolute;left:-9999px}", "<p class=sr>no"),
        (".f{opacity:0;transition:opacity 1s}", "<p class=f>yes"),
        (".x{.x{display:none}}", "<p class=x>yes"),
        (".x{display:none;&.y{display:block}}", "<p class='x y'>yes<p class=x>no"),
        (
            "@import url(x);@charset 'x';@font-face{display:none}@keyframes k{from{display:none}}.x{display:none",
            "<p class=x>no",
        ),
        ("<!-- .x{display:none} -->", "<p class=x>no"),
        (".x{visibility:hidden}.y{visibility:visible}", "<p class=x>no <b class=y>yes</b>"),
        ("[hidden],template{display:none}p[data-x]{display:none}", "<p data-x>yes"),
        ("*{display:none}", "<p>yes"),
        (".x\\:y{display:none}", "<p class='x:y'>no"),
        ("a{}}}}{{{;;;@@ .x{display:none}", "<p class=x>yes"),
        ("P.X{display:none}", "<p class=X>no<p class=x>yes"),
        (".x{display:var(--a)}", "<p class=x>yes"),
        ("@layer a{.x{display:none}}", "<p class=x>yes"),
        ("@media screen, print{.x{display:none}}", "<p class=x>no"),
        (".hidden{display:none}", "<table><tr><td>yes<td class=hidden>no</table>"),
        (".x{position:relative;left:-9999px}.x.y{left:0}", "<p class='x y'>yes<p class=x>no"),
    ],
)
def test_words_are_read_unless_a_sheet_certainly_hides_them(sheet: str, body: str) -> None:
    """The word `yes` is seen, the word `no` is not."""
    text = read(sheet, body)
    assert "first" in text
    assert ("yes" in text) == ("yes" in body)
    assert "no" not in text


@pytest.mark.parametrize(
    "tag", ["style media=print", "style media='speech'", "noscript><style", "script type=text/css"]
)
def test_a_sheet_for_others_hides_nothing(tag: str) -> None:
    html = f"<{tag}>.x{{display:none}}</style></noscript></script><p class=x>words"
    assert page_to_markdown(Page("https://example.org/", 200, "text/html", html.encode())) == "words"


def test_page_that_its_sheets_hide_as_a_whole_is_read() -> None:
    """A page that hides all its content is shown by its scripts, so its words are read."""
    html = "<style>#app{visibility:hidden}</style><div id=app><h1>Title</h1><p>words</div>"
    assert page_to_markdown(Page("https://example.org/", 200, "text/html", html.encode())) == "# Title\n\nwords"


def test_large_sheets_hide_nothing() -> None:
    assert read(".x{display:none}" + " " * MAX_SHEETS, "<p class=x>words") == "first\n\nwords"


def test_checks_of_a_hostile_page_are_bounded() -> None:
    sheets = Sheets(["".join(f".a.b{number}{{display:none}}" for number in range(3000))])
    hidden = [sheets.style_of("p", str(number), ["a", "b7"], {}) for number in range(1000)]
    assert hidden[0] == {"display": "none"}
    assert hidden[-1] == {}


FRAGMENTS = names(
    ". # .x p * , > + ~ : :: ( ) [ ] { } ; \" ' \\ /* */ <!-- --> @media @import @layer & | = ! !important display none"
    " :not( :hover font-size visibility url( -- 1e 0 é @charset :is(.x) var(--a)"
)


@given(st.lists(st.sampled_from([" ", "\n", *sorted(FRAGMENTS)]) | st.text(max_size=3), max_size=40).map("".join))
@settings(max_examples=200, deadline=None)
def test_any_sheet_leaves_the_page_readable(sheet: str) -> None:
    assert read(sheet.replace("\0", ""), "<p class=x>words")
