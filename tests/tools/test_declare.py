"""The declaration of a tool, the check of its arguments, and its result."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from planned_web import PlannedWeb, context
from pydantic import BaseModel, Field

from nexum_engine.errors import FinalError, UnknownEffect
from nexum_engine.policy import NOT_DONE, Policy
from support.tools import TOOLS, Page, SearchHit, Tool, ToolContext, find_tool, tool, web_search
from support.tools.web.url import checked_url

pytestmark = pytest.mark.every_python


ROOT = Path(__file__).resolve().parents[2]


class Place(BaseModel):
    city: str


def everything(
    text: str,
    count: Annotated[int, Field(ge=1, le=9, description="how many")] = 3,
    share: float = 0.5,
    exact: bool = False,
    tags: list[str] | None = None,
    pair: tuple[int, int] = (1, 2),
    mode: Literal["a", "b"] = "a",
    place: Place | None = None,
    *,
    call: ToolContext,
) -> str:
    """Show what was given.

    Twice.
    """
    return repr((text, count, share, exact, tags, pair, mode, place, call.idempotency_key, call.attempt))


EVERYTHING = Tool.from_function(everything, time_limit=5)


def test_tool_is_made_from_its_function() -> None:
    assert EVERYTHING.name == "everything"
    assert EVERYTHING.description == "Show what was given.\n\nTwice."
    assert EVERYTHING.time_limit == 5.0
    assert EVERYTHING.signature.startswith(
        "everything(text: str, count: int = 3, share: float = 0.5, exact: bool = False"
    )
    schema = EVERYTHING.arguments.model_json_schema()
    assert schema["required"] == ["text"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["count"]["description"] == "how many"
    assert "call" not in schema["properties"]


async def test_arguments_and_context_reach_the_function() -> None:
    given = {"text": "t", "count": 9, "share": 1, "exact": True, "tags": ["x"], "pair": [3, 4], "place": {"city": "C"}}
    expected = ("t", 9, 1.0, True, ["x"], (3, 4), "a", Place(city="C"), "key-1", 2)
    assert await EVERYTHING.run(given, context()) == repr(expected)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"count": "5"}, {"count": 5}),
        ({"count": 5.0}, {"count": 5}),
        ({"count": " 5.0 "}, {"count": 5}),
        ({"count": None}, {"count": 3}),
        ({"share": "0.25"}, {"share": 0.25}),
        ({"share": None, "exact": None, "pair": None, "mode": None}, {}),
        ({"exact": "True"}, {"exact": True}),
        ({"exact": "false"}, {"exact": False}),
        ({"tags": '["x", "y"]'}, {"tags": ["x", "y"]}),
        ({"tags": None}, {"tags": None}),
        ({"pair": ["3", 4.0]}, {"pair": (3, 4)}),
        ({"pair": '["3", 4]', "count": "2"}, {"pair": (3, 4), "count": 2}),
        ({"place": '{"city": "C"}'}, {"place": Place(city="C")}),
    ],
)
def test_a_value_that_loses_nothing_is_converted(given: dict[str, Any], read: dict[str, Any]) -> None:
    defaults = {"count": 3, "share": 0.5, "exact": False, "tags": None, "pair": (1, 2), "mode": "a", "place": None}
    checked = EVERYTHING.validate({"text": "t", **given})
    assert checked == {"text": "t", **defaults, **read}
    assert all(type(checked[name]) is type(value) for name, value in read.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "text is missing"),
        ({"text": 5}, "text: Input should be a valid string (given: 5)"),
        ({"text": None}, "text: Input should be a valid string (given: None)"),
        ({"text": "t", "count": "five"}, "count: Input should be a valid integer (given: 'five')"),
        ({"text": "t", "count": "10"}, "count: Input should be less than or equal to 9 (given: 10)"),
        ({"text": "t", "count": "5.5"}, "count: Input should be a valid integer (given: '5.5')"),
        ({"text": "t", "count": "٣"}, "count: Input should be a valid integer (given: '٣')"),
        ({"text": "t", "count": 1e300}, "count: Input should be a valid integer (given: 1e+300)"),
        ({"text": "t", "share": "1e999"}, "share: Input should be a valid number (given: '1e999')"),
        ({"text": "t", "share": True}, "share: Input should be a valid number (given: True)"),
        ({"text": "t", "tags": "x"}, "tags: Input should be a valid array (given: 'x')"),
        ({"text": "t", "place": "{'city': 'C'}"}, "place: "),
        ({"text": "t", "pair": [1, None]}, "pair.1: Input should be a valid integer (given: None)"),
        ({"text": "t", "count": 2.5}, "count: Input should be a valid integer"),
        ({"text": "t", "count": True}, "count: Input should be a valid integer"),
        ({"text": "t", "count": 10}, "count: Input should be less than or equal to 9 (given: 10)"),
        ({"text": "t", "exact": "yes"}, "exact: Input should be a valid boolean"),
        ({"text": "t", "tags": ["x", 1]}, "tags.1: Input should be a valid string (given: 1)"),
        ({"text": "t", "mode": "c"}, "mode: Input should be 'a' or 'b' (given: 'c')"),
        ({"text": "t", "max": 1}, "there is no argument 'max'"),
        ({"text": "t", "call": {}}, "there is no argument 'call'"),
        ({"count": 0}, "text is missing; count: Input should be greater than or equal to 1"),
        ({"text": "t", "share": float("nan")}, "Out of range float values"),
        ({"text": "\ud800"}, "surrogate"),
        ({"text": object()}, "not JSON serializable"),
        (["t"], "the arguments must be a JSON object (given: ['t'])"),
        (None, "the arguments must be a JSON object"),
        ("text", "the arguments must be a JSON object"),
    ],
)
async def test_a_wrong_argument_is_a_final_error_that_says_what_to_do(arguments: object, words: str) -> None:
    with pytest.raises(FinalError) as refused:
        await EVERYTHING.run(arguments, context())
    assert words in str(refused.value)
    assert str(refused.value).endswith(f"Call it as {EVERYTHING.signature}")


def test_a_deeply_nested_argument_is_refused() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(FinalError, match="wrong arguments"):
        EVERYTHING.validate({"text": "t", "tags": nested})


def test_a_long_wrong_value_is_shortened() -> None:
    with pytest.raises(FinalError) as refused:
        EVERYTHING.validate({"text": "t", "count": "x" * 100_000})
    assert len(str(refused.value)) < 1000


def without_docstring(text: str) -> str:
    return text


def without_hint(text) -> str:  # type: ignore[no-untyped-def]
    """A docstring."""
    return str(text)


def with_the_rest(*texts: str) -> str:
    """A docstring."""
    return "".join(texts)


def with_positional_context(call: ToolContext) -> str:
    """A docstring."""
    return call.idempotency_key


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (without_docstring, "needs a docstring"),
        (without_hint, "parameter text needs a type hint"),
        (with_the_rest, "can't be passed by name"),
        (with_positional_context, "keyword-only"),
    ],
)
def test_a_function_that_no_model_could_call_is_refused(function: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Tool.from_function(function)


def test_a_time_limit_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Tool.from_function(everything, time_limit=0)


def test_heartbeat_that_the_time_limit_cuts_off_is_refused() -> None:
    policy = Policy(heartbeat=60)
    with pytest.raises(ValueError, match="heartbeat=60 has no effect, because time_limit is 60 s: give a longer"):
        Tool.from_function(everything, policy=policy)
    assert Tool.from_function(everything, policy=policy, time_limit=61).time_limit == 61


@pytest.fixture
def registry() -> Iterator[None]:
    """Remove the tools that a test has declared."""
    before = dict(TOOLS)
    yield
    TOOLS.clear()
    TOOLS.update(before)


@pytest.mark.usefixtures("registry")
async def test_a_third_tool_takes_five_lines_and_is_found_by_name() -> None:
    @tool(time_limit=10)
    def word_count(text: str) -> str:
        """Count the words of a text."""
        return str(len(text.split()))

    assert TOOLS["word_count"] is find_tool("word_count") is word_count
    assert await find_tool("word_count").run({"text": "a b c"}, context()) == "3"
    with pytest.raises(ValueError, match="two tools are named word_count"):
        tool()(word_count.function)


def test_an_unknown_tool_is_a_final_error_that_names_the_known_ones() -> None:
    with pytest.raises(FinalError, match=f"no tool named 'rm'; the tools are {', '.join(sorted(TOOLS))}$"):
        find_tool("rm")


def returning(value: object) -> Tool:
    def give() -> object:
        """Give."""
        return value

    return Tool.from_function(give)


@pytest.mark.parametrize(
    ("value", "text"),
    [("é", "é"), ({"a": [1, None, "é"]}, '{"a": [1, null, "é"]}'), (None, "null"), ("a\ud800b", "a\ufffdb"), ("", "")],
)
async def test_a_result_is_text_or_becomes_json(value: object, text: str) -> None:
    result = await returning(value).run({}, context())
    assert result == text
    result.encode()


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}, b"bytes"])
async def test_a_result_that_is_neither_text_nor_json_is_a_final_error(value: object) -> None:
    with pytest.raises(FinalError, match=r"give returned a .*, which is neither text nor JSON"):
        await returning(value).run({}, context())


def test_importing_the_tools_imports_none_of_the_libraries_that_they_use() -> None:
    program = (
        "import support.tools, support.tools.web.live, sys;"
        "used = {'ddgs', 'primp', 'httpx2', 'httpcore2', 'bs4', 'selectolax', 'markdownify', 'autogen_core'};"
        "print(sorted(used & set(sys.modules)), 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[] True\n", done.stderr


async def test_web_search_returns_the_webs_hits_as_json() -> None:
    web = PlannedWeb(*(SearchHit(title=f"T{n}", href=f"https://example.org/{n}", body="ü") for n in range(3)))
    result = await web_search.run({"query": " q ", "max_results": 2}, context(web))
    assert web.asked == [("q", 2)]
    assert result == (
        '[{"title": "T0", "href": "https://example.org/0", "body": "ü"}, '
        '{"title": "T1", "href": "https://example.org/1", "body": "ü"}]'
    )


async def test_visit_webpage_checks_the_address_before_it_asks_the_web() -> None:
    web = PlannedWeb(page=Page("https://example.org/", 200, "text/plain", b"hello"))
    visit = find_tool("visit_webpage")
    assert await visit.run({"url": " https://EXAMPLE.org "}, context(web)) == "hello"
    for url in ("file:///etc/hostname", "example", "http://localhost/"):
        with pytest.raises(FinalError, match="was not visited"):
            await visit.run({"url": url}, context(web))
    assert web.asked == ["https://example.org/"]


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("example.org", "https://example.org/"),
        ("<https://example.org>", "https://example.org/"),
        ("<example.org/a?b=c#d>", "https://example.org/a?b=c#d"),
        ('"https://example.org/"', "https://example.org/"),
        ("`http://example.org/a_(b)`\n", "http://example.org/a_(b)"),
        ("www.Example.co.uk:8443/x", "https://www.example.co.uk:8443/x"),
        ("münchen.de", "https://xn--mnchen-3ya.de/"),
        ("https://example.org/%00?q=a b", "https://example.org/%00?q=a%20b"),
    ],
)
def test_an_address_without_scheme_or_in_brackets_is_read(given: str, address: str) -> None:
    assert checked_url(given) == address


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("population of Tokyo", "it has no scheme; write the full address, beginning with https://"),
        ("/wiki/Tokyo", "it has no scheme"),
        ("Tokyo", "it has no scheme"),
        ("localhost:8000/x", "only http:// and https:// addresses can be visited"),
        ("user@example.org", "it has no scheme"),
        ("mailto:user@example.org", "only http:// and https://"),
        ("javascript:alert(1)", "only http:// and https://"),
        ("10.0.0.1/", "it has no scheme"),
        ("", "it is not a web address (Input should be a valid URL, input is empty)"),
        ("<>", "it is not a web address"),
        ("[text](https://example.org)", "it has no scheme"),
        ("https://", "it is not a web address"),
        ("example.org:99999", "it is not a web address (Input should be a valid URL, invalid port number)"),
    ],
)
def test_another_text_is_no_address(given: str, words: str) -> None:
    with pytest.raises(FinalError) as refused:
        checked_url(given)
    assert f"was not visited: {words}" in str(refused.value)


@pytest.mark.parametrize("href", ["javascript:alert(1)", "/x", "ftp://example.org/", "http://localhost/", ""])
def test_a_search_hit_has_an_address_that_can_be_visited(href: str) -> None:
    with pytest.raises(ValueError, match="href"):
        SearchHit(title="t", href=href, body="b")


# ---- Policies --------------------------------------------------------------------------------------------------------


def found(arguments: Mapping[str, Any], idempotency_key: str) -> Any:
    """Return what the test has put into `answers`."""
    asked.append((dict(arguments), idempotency_key))
    answer = answers.pop(0)
    if isinstance(answer, Exception):
        raise answer
    return answer


asked: list[tuple[dict[str, Any], str]] = []
answers: list[Any] = []


def charge(cents: int, to: str = "c-17") -> str:
    """Charge a customer."""
    return f"charged {cents}"


ONCE = Tool.from_function(charge, policy=Policy(effect="once", reconcile=found))


def test_complete_arguments_have_the_defaults_and_are_json() -> None:
    assert ONCE.complete({"cents": "5"}) == {"cents": 5, "to": "c-17"}
    complete = EVERYTHING.complete({"text": "t", "pair": [3, 4], "place": {"city": "C"}})
    assert complete["pair"] == [3, 4]
    assert complete["place"] == {"city": "C"}


@pytest.mark.parametrize(
    ("answer", "result"),
    [("receipt 7", "receipt 7"), ({"number": 7}, '{"number": 7}'), (NOT_DONE, "charged 5")],
    ids=["text", "JSON", "not done"],
)
async def test_reconcile_decides_whether_the_tool_runs(answer: Any, result: str) -> None:
    answers[:], asked[:] = [answer], []
    assert await ONCE.run({"cents": 5}, context(), must_reconcile=True) == result
    assert asked == [({"cents": 5, "to": "c-17"}, "key-1")]


async def test_effect_is_unknown_if_reconcile_fails() -> None:
    answers[:] = [ConnectionError("no answer")]
    with pytest.raises(UnknownEffect, match=r"reconcile of charge failed: ConnectionError: no answer"):
        await ONCE.run({"cents": 5}, context(), must_reconcile=True)


@pytest.mark.parametrize(
    ("answer", "result"),
    [("receipt 7", "receipt 7"), (NOT_DONE, "sleep took longer than its time limit of 0.01 s, and may still have its")],
    ids=["found", "not found"],
)
async def test_late_once_tool_is_looked_up(answer: Any, result: str) -> None:
    async def sleep() -> str:
        """Take too long."""
        await asyncio.sleep(3600)
        return "late"

    answers[:] = [answer]
    late = Tool.from_function(sleep, time_limit=0.01, policy=ONCE.policy)
    try:
        said = await late.run({}, context())
    except UnknownEffect as error:
        said = str(error)
    assert said.startswith(result)


async def test_final_errors_are_not_retried() -> None:
    def refuse() -> str:
        """Raise an error."""
        raise PermissionError("not yours")

    with pytest.raises(PermissionError):
        await Tool.from_function(refuse).run({}, context())
    with pytest.raises(FinalError, match=r"PermissionError: not yours"):
        await Tool.from_function(refuse, policy=Policy(final=(OSError,))).run({}, context())


def test_wrong_policy_names_the_tool() -> None:
    with pytest.raises(ValueError, match=r"^tool charge: .*reconcile needs effect=\"once\""):
        tool(reconcile=found)(charge)
    assert "charge" not in TOOLS


def test_declaration_is_shown_as_it_is_written() -> None:
    assert ONCE.declaration == "time_limit=60, effect=once, reconcile=found"
