"""JSON from outside: strict parsing, limits, and comparison by value."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from nexum_engine import jsontext
from nexum_engine.errors import InvalidRequest, TooLarge

pytestmark = pytest.mark.every_python


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_dumped_text_parses_to_the_same_value(value: object) -> None:
    text = jsontext.dump(value, "value")
    parsed = jsontext.parse(text, "value")
    assert parsed == value
    assert json.dumps(parsed) == json.dumps(value)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_two_spellings_of_one_value_are_the_same(value: object) -> None:
    assert jsontext.same(json.dumps(value, indent=3, ensure_ascii=True), jsontext.dump(value, "value"))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(_text, st.integers(), min_size=2, max_size=5))
def test_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert jsontext.same(json.dumps(value), json.dumps(dict(reversed(value.items()))))


@settings(max_examples=200, deadline=None)
@given(JSON, JSON)
def test_values_are_the_same_only_if_their_canonical_texts_are(one: object, other: object) -> None:
    equal = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert jsontext.same(json.dumps(one), json.dumps(other)) is equal


@pytest.mark.parametrize(("one", "other"), [("1", "1.0"), ("1", "true"), ("0", "false"), ('"1"', "1"), ("[]", "{}")])
def test_values_of_different_types_are_never_the_same(one: str, other: str) -> None:
    assert not jsontext.same(one, other)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        jsontext.parse(text, "it")
    except InvalidRequest as error:
        refusal = str(error)
    else:
        refusal = ""
        json.loads(text)
    assert not refusal or refusal.startswith("it is not valid JSON")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nul",
        "NaN",
        "[Infinity]",
        "-Infinity",
        "01",
        "'a'",
        '{"a":1,}',
        '{"a" 1}',
        '"\\ud800"',
        pytest.param('"\ud800"', id="a lone surrogate"),
        "\x00",
        "1 2",
        "﻿1",
    ],
)
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="the thing is not valid JSON"):
        jsontext.parse(text, "the thing")


def test_parse_limits_depth_and_integers() -> None:
    assert jsontext.parse("[" * 100 + "]" * 100, "it") is not None
    for endless in ("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 100_000):
        with pytest.raises(InvalidRequest, match="recursion limit"):
            jsontext.parse(endless, "it")
    assert jsontext.parse("9" * 4000, "it") == int("9" * 4000)
    with pytest.raises(InvalidRequest, match="number out of range"):
        jsontext.parse("9" * 5000, "it")


def test_size_limit_is_exact_and_counts_bytes() -> None:
    text = '"é"'
    assert jsontext.parse(text, "it", max_bytes=4) == "é"
    with pytest.raises(TooLarge, match="it is 4 bytes; the limit is 3 bytes"):
        jsontext.parse(text, "it", max_bytes=3)


@pytest.mark.parametrize(
    "value",
    [float("nan"), [float("inf")], {1, 2}, "\ud800", {("a", "b"): 1}],
    ids=["nan", "infinity", "a set", "a lone surrogate", "a tuple as key"],
)
def test_dump_refuses_values_that_json_lacks(value: object) -> None:
    with pytest.raises(InvalidRequest, match="the result can't be written as JSON"):
        jsontext.dump(value, "the result")


def test_dump_refuses_a_cycle() -> None:
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(InvalidRequest, match="can't be written as JSON"):
        jsontext.dump(circle, "the result")


class Holder(BaseModel):
    value: Any = None
    number: float = 0.5


@settings(max_examples=200, deadline=None)
@given(JSON | st.sampled_from(["NaN", "to Infinity", {"NaN": [1.0]}]))
def test_model_is_dumped_like_its_fields(value: object) -> None:
    parsed = jsontext.parse(jsontext.dump(Holder(value=value), "it"), "it")
    assert json.dumps(parsed) == json.dumps({"value": value, "number": 0.5})


@pytest.mark.parametrize(
    "model",
    [Holder(number=float("nan")), Holder(number=float("-inf")), Holder(value="\ud800"), Holder(value=object())],
    ids=["nan", "infinity", "a lone surrogate", "an object"],
)
def test_dumping_a_model_refuses_values_that_json_lacks(model: Holder) -> None:
    with pytest.raises(InvalidRequest, match="the result can't be written as JSON"):
        jsontext.dump(model, "the result")


def test_models_within_a_value_are_dumped_like_their_fields() -> None:
    assert jsontext.dump({"all": [Holder(value=Holder())]}, "it") == (
        '{"all":[{"value":{"value":null,"number":0.5},"number":0.5}]}'
    )
