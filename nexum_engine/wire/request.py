"""The function `request_of`, which builds a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from nexum_engine.errors import InvalidRequest

P = ParamSpec("P")
Request = TypeVar("Request")
SHOWN = 60  # characters of a text in an error


def request_of(kind: Callable[P, Request], *args: P.args, **fields: P.kwargs) -> Request:
    """Return a message with these fields. Raises InvalidRequest for a text with a lone surrogate: it can't be sent."""
    try:
        return kind(*args, **fields)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text {error.object[:SHOWN]!a} can't be sent: it is not text in UTF-8") from error
