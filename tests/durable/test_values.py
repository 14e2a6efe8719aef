"""Recorded values are rebuilt with their classes; if a class is not loaded, as the declared type or plain values."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from typing import Any

import pytest
from autogen_core import FunctionCall
from autogen_core.models import CreateResult, RequestUsage
from pydantic import BaseModel

from durable_autogen.autogen.values import pieces_again, reply_again, value_again, written_pieces, written_reply

MOVED = {"$class": ["module_that_was_renamed", "Point"], "$value": {"x": 1}}


class Point(BaseModel):
    """The class of the recorded values. Its module was renamed after they were recorded."""

    x: int


class Line(BaseModel):
    """A class that is still loaded, with a field of the class that was renamed."""

    begin: Any


@pytest.mark.parametrize(
    ("written", "declared", "expected"),
    [
        (MOVED, Point, Point(x=1)),
        ([MOVED, MOVED], list[Point], [Point(x=1), Point(x=1)]),
        ({"a": MOVED}, dict[str, Point], {"a": Point(x=1)}),
        ([MOVED], None, [{"x": 1}]),
        ({"a": [MOVED, 2]}, Any, {"a": [{"x": 1}, 2]}),
        ({"$class": ["builtins", "tuple"], "$value": [MOVED]}, tuple[Point], (Point(x=1),)),
        ({"$class": [__name__, "Line"], "$value": {"begin": MOVED}}, Line, Line(begin={"x": 1})),
    ],
)
def test_value_of_class_that_is_not_loaded_has_the_declared_type(written: Any, declared: Any, expected: Any) -> None:
    assert value_again(written, declared) == expected


class Priced(CreateResult):
    """A reply of a client that adds fields of its own."""

    cents: float
    when: datetime
    raw: Any = None


def test_reply_of_own_class_keeps_class_and_fields() -> None:
    usage, call = RequestUsage(prompt_tokens=1, completion_tokens=2), FunctionCall(id="1", name="note", arguments="{}")
    now = datetime.now(timezone.utc)
    reply = Priced(content=[call], usage=usage, finish_reason="function_calls", cached=False, cents=0.5, when=now)
    assert reply_again(json.loads(json.dumps(written_reply(reply)[0]))) == reply
    reply.raw = object()  # can't be recorded: the replay has the fields of every reply
    found = reply_again(json.loads(json.dumps(written_reply(reply)[0])))
    assert (type(found), found.content, found.usage) == (CreateResult, [call], usage)


@pytest.mark.parametrize(
    "pieces", [["a\r", "\nb", "", "\u2028\ud83d", "\udc00"], ["a piece of a long reply"] * 100_000]
)
def test_pieces_of_a_stream_come_back_in_linear_time(pieces: list[str]) -> None:
    usage = RequestUsage(prompt_tokens=0, completion_tokens=0)
    reply = CreateResult(content="".join(pieces), usage=usage, finish_reason="stop", cached=False)
    written = written_pieces(pieces, reply)
    assert all(isinstance(one, int) for one in written)
    begun = time.monotonic()
    assert pieces_again(written, reply) == pieces
    assert time.monotonic() - begun < 2
