"""The work for a page is linear in the page's size.

These tests measure no time. They count the calls of functions and patterns, once for a page and once for a page of four
times the size. The work inside a pattern is not counted. So each pattern is also checked for repeats that make its work
quadratic.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tools.web import Page
from support.tools.web.html import attributes, hooks, paragraphs, style, tree
from support.tools.web.html.attributes import names
from support.tools.web.page import page_to_markdown

URL = "https://example.org/dir/page"
SMALL = 150  # repeated pieces of HTML in the smaller page
GROWTH = 4  # the larger page has this many times as many

PAGES: dict[str, Callable[[int], str]] = {
    "list": lambda n: f"<ol>{'<li>a</li> ' * n}</ol>",
    "lists in a list": lambda n: f"<ul>{'<ul><li>a</li></ul>' * n}</ul>",
    "nested lists": lambda n: "<ul><li>a" * n,
    "nested quotes": lambda n: "<blockquote>a" * n,
    "lines in quotes": lambda n: "<blockquote>" * 30 + "a<br>" * n,
    "nested boxes": lambda n: "<div>a" * n,
    "nested emphasis": lambda n: "<b>a<i>b" * n,
    "nested powers": lambda n: "<sup>2" * n,
    "neighbours": lambda n: "<b>a</b><i>b</i>" * n,
    "line breaks": lambda n: "<p>" + "a<br>" * n,
    "links": lambda n: "<p>" + "<a href=x>a</a>" * n,
    "links without an end": lambda n: "<a href=x>a" * n,
    "hidden": lambda n: "<p>a" + "<b hidden>b</b>" * n,
    "forms": lambda n: f"<p>{'a' * 1000}</p>" + "<form>b</form>" * n,
    "headers": lambda n: f"<p>{'a' * 1000}</p>" + "<header>b</header>" * n,
    "articles": lambda n: "<article>a</article>" * n,
    "rows": lambda n: f"<table>{'<tr><td>a<td>b' * n}</table>",
    "head rows": lambda n: f"<table><thead>{'<tr><th>a<td>b' * n}</table>",
    "bodies": lambda n: f"<table>{'<tbody><tr><td>a<td>b' * n}</table>",
    "columns": lambda n: f"<table><tr>{'<td>a' * n}<tr><td>b</table>",
    "tables": lambda n: "<table><tr><th>a</table>" * n,
    # With fewer tables, the work for each table would hide the work for the nesting.
    "nested tables": lambda n: "<table><tr><td>a<td>b" * 5 * n,
    "items outside lists": lambda n: "<li><span>a<thead>" * n,
    "terms": lambda n: f"<dl>{'<dt>a<dd>b' * n}</dl>",
    "preformatted": lambda n: "<pre><code>a</code></pre>" * n,
    "boxes in preformatted": lambda n: f"<pre>{'<div>a</div>' * n}</pre>",
    "nested code": lambda n: "<code>a" * n + "<br>",
    "classes": lambda n: f"<div class='{'a ' * n}'>{'<pre>a</pre>' * n}</div>",
    "empty nested tables": lambda n: "a" + "<table><tr><td>" * n,
    "options": lambda n: f"a<select>{'<option>a' * n}</select>",
    "readings": lambda n: "<ruby>a<rt>b" * n,
    "formula": lambda n: "<math>" + "<msup><mi>a</mi><mn>2</mn></msup>" * n,
    "nested formula": lambda n: "<math>" + "<msup><mi>a" * n,
    "nested scripts": lambda n: "<math>" + "<msup><mi>a</mi>" * n,
    "texts in drawings": lambda n: "a" + "<svg><text>b</text>" * n,
    "nested terms": lambda n: "<dl>" + "<dd>a" * n,
    "custom elements": lambda n: "".join(f"<x-{number}>a" for number in range(n)),
    "soft breaks": lambda n: "a<wbr>" * n,
    "rules of sheets": lambda n: f"<style>{'.a .b,p{display:none}' * n}</style>a" + "<p class=a>b" * n,
    "sheets": lambda n: "<style>.a{display:none}</style><p class=a>a<b>" * n,
    "scripts": lambda n: "<script>x</script>a" * n,
    "drawings": lambda n: "a" + "<svg><desc>" * n + "</title>" * n,
    "drawings left": lambda n: "a" + "<svg><p>b" * n,
    "comments": lambda n: "a<!-- <script> -->" * n,
    "attributes": lambda n: f"<p {' '.join(f'a{number}=x' for number in range(n))}>a",
}


def calls(html: str) -> int:
    """Return the number of Python and C function calls while the page is read."""
    counted = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        page_to_markdown(Page(URL, 200, "text/html; charset=utf-8", html.encode()))
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.parametrize("name", PAGES)
def test_work_grows_linearly_with_the_page(name: str) -> None:
    page = PAGES[name]
    calls(page(1))  # import modules and compile patterns first
    # Linear work makes four times as many calls, quadratic work sixteen times. Eight leaves room for a constant part.
    assert calls(page(GROWTH * SMALL)) < 2 * GROWTH * calls(page(SMALL))


NESTABLE = sorted(
    names("a b blockquote code dd div form h2 i li main math msup ol p pre q select span sup table td tr")
)
TAGS = st.builds(
    "<{}{}>{}".format, st.sampled_from(["", "", "/"]), st.sampled_from(NESTABLE), st.sampled_from(["", "a"])
)


@settings(deadline=None, max_examples=20)
@given(st.lists(TAGS, min_size=1, max_size=5).map("".join), st.lists(TAGS, max_size=2).map("".join))
def test_work_grows_linearly_with_the_repeats_of_any_piece(piece: str, around: str) -> None:
    calls(f"seen{around}{piece}")
    assert calls(f"seen{around}{piece * GROWTH * SMALL}") < 2 * GROWTH * calls(f"seen{around}{piece * SMALL}")


PATTERNS = sorted(
    {
        (module.__name__, pattern.pattern)
        for module in (attributes, hooks, paragraphs, style, tree)
        for value in vars(module).values()
        for pattern in (value.values() if isinstance(value, dict) else [value])
        if isinstance(pattern, re.Pattern)
    }
)


@pytest.mark.parametrize(("module", "pattern"), PATTERNS)
def test_no_pattern_has_two_adjacent_repeats_of_the_same_characters(module: str, pattern: str) -> None:
    """Adjacent repeats of one character are quadratic: on n blanks, `[ ]*[ \\n]*x` tries n² ways to split them."""
    repeated = [set(run) for run in repeated_neighbours(pattern)]
    assert all(not run for run in repeated), (module, pattern)


def repeated_neighbours(pattern: str) -> list[str]:
    """Return, for each pair of adjacent unbounded repeats in a pattern, the characters that both repeats accept."""
    parts = re.findall(r"(\[(?:\\.|[^\]\\])+\]|\\?.)([*+])(?=(\[(?:\\.|[^\]\\])+\]|\\?.)[*+])", pattern)
    candidates = " \t\n\f\r/=>abc019\"'-<"
    return [
        "".join(char for char in candidates if re.fullmatch(first, char) and re.fullmatch(second, char))
        for first, _, second in parts
    ]


@pytest.mark.parametrize("run", [" ", "\n", "\n ", "&nbsp;", "\t", "`", "<", "-", "&#x2028;", ">", "/", "=", "'", '"'])
@pytest.mark.parametrize(
    "around", ["<pre>a|b</pre>", "<p>a|b</p>", "<p style='transform:scale(|x'>a</p>", "<a |>b</a>"]
)
def test_400_kilobytes_of_one_character_are_read(run: str, around: str) -> None:
    """Each page takes under a second. Quadratic work would take hours, and pytest's time limit would end the test."""
    html = "<h1>head</h1>" + around.replace("|", run * (400_000 // len(run)))
    assert page_to_markdown(Page(URL, 200, "text/html; charset=utf-8", html.encode())).startswith("# head")


def test_200_kilobytes_of_nested_elements_are_read() -> None:
    """This page takes a few seconds. Quadratic work in Python, such as a walk up all ancestors, would take minutes."""
    html = "<h1>head</h1>" + "<div><br>a" * 20_000
    assert page_to_markdown(Page(URL, 200, "text/html; charset=utf-8", html.encode())).startswith("# head")
