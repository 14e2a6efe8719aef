"""The function `request_of`, which builds a request."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from nexum_engine.errors import InvalidRequest

P = ParamSpec("P")
Request = TypeVar("Request")
SHOWN = 60  # characters of a text in an error


def request_of(kind: Callable[P, Request], *args: P.args, **fields: P.kwargs) -> Request:
    """Return a message with these fields. Raises InvalidRequest for a value that can't be sent.

    Such a value has a wrong type, is too large for its field, or is a text with a lone surrogate.
    """
    try:
        return kind(*args, **fields)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text {error.object[:SHOWN]!a} can't be sent: it is not text in UTF-8") from error
    except (TypeError, ValueError) as error:
        # protobuf doesn't say which field has the wrong value.
        name = next(name for name, value in fields.items() if not _takes(kind, **{name: value}))
        raise InvalidRequest(f"{name} can't be {reprlib.repr(fields[name])}: {error}") from error


def _takes(kind: Callable[..., object], **field: object) -> bool:
    try:
        kind(**field)
    except (TypeError, ValueError):
        return False
    return True
