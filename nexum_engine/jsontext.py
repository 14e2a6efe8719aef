"""Strict JSON for data from outside: no NaN, and limits for depth, integers and size. Each error names its limit."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from nexum_engine.errors import InvalidRequest, TooLarge

MAX_PAYLOAD_BYTES = 16 * 1024 * 1024
"""The size limit of an input or output, in bytes."""
MAX_VALUES = 200_000
"""A text with more values, or more strings and names, is refused: parsing it would block all other threads."""


def parse(text: str, what: str, *, max_bytes: int = MAX_PAYLOAD_BYTES) -> Any:
    """Parse `text`. Errors call the text `what`.

    Raises InvalidRequest if `text` isn't JSON (RFC 8259: no NaN, no Infinity) or is nested more than about 200 levels
    deep. Raises TooLarge if `text` takes more than `max_bytes` of UTF-8, or has more than MAX_VALUES values.
    """
    check_size(text, what, max_bytes=max_bytes)
    _check_count(text, what)
    try:
        return from_json(text.encode(), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"{what} is not valid JSON: {error}") from error


def _check_count(text: str, what: str) -> None:
    """Raise TooLarge if `text` has too many values. Takes little time and memory, unlike the parser."""
    if len(text) <= MAX_VALUES or _structure(text) <= MAX_VALUES:
        return
    # Count only the commas and brackets outside of strings. Without escapes, a quote begins or ends a string. So if the
    # text is split at the quotes, the parts with an odd index are strings.
    text = text.replace("\\\\", "").replace('\\"', "")
    if text.count('"') > 2 * MAX_VALUES or sum(map(_structure, text.split('"')[::2])) > MAX_VALUES:
        raise TooLarge(f"{what} has more than {MAX_VALUES:,} values: put them into a file, or into one string")


def _structure(text: str) -> int:
    """Return the number of commas and opening brackets. In a text without strings, there are about as many values."""
    return text.count(",") + text.count("[") + text.count("{")


def check_size(text: str, what: str, *, max_bytes: int = MAX_PAYLOAD_BYTES) -> None:
    """Raise TooLarge if `text` takes more than `max_bytes` of UTF-8."""
    # Encode only long texts: a character takes at most four bytes, so a short text can't exceed the limit.
    if len(text) * 4 > max_bytes and (size := size_of(text)) > max_bytes:
        raise TooLarge(f"{what} is {size:,} bytes; the limit is {max_bytes:,} bytes")


def size_of(text: str) -> int:
    """Return the size of `text` in bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def dump(value: object, what: str) -> str:
    """Return `value`, which may be or contain pydantic models, as compact JSON text.

    Raises InvalidRequest if `value` has, for example, NaN or a cycle.
    """
    try:
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
            # For long texts, `to_json` is much faster than `json.dumps`. But if the text contains NaN or Infinity, use
            # `json.dumps`: it accepts the word in a string, and refuses the number.
            text = to_json(value, inf_nan_mode="constants").decode()
            if "NaN" not in text and "Infinity" not in text:
                return text
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_fields)
        text.encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"{what} can't be written as JSON: {error}") from error
    return text


def _fields(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")  # the words of json.dumps


def escaped(text: str) -> str:
    """Escape the unprintable characters of a text for people, such as marks that reverse a text's direction."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def same(one: str, other: str) -> bool:
    """Return whether two texts that `parse` has accepted have the same value. 1, 1.0 and true are three values."""
    return one == other or _is_same(from_json(one), from_json(other))


def _is_same(one: object, other: object) -> bool:
    # Don't use `==`: on large values, it would block all other threads. A loop in Python lets them run.
    pairs = [(one, other)]
    while pairs:
        one, other = pairs.pop()
        if type(one) is not type(other):
            return False
        if isinstance(one, dict) and isinstance(other, dict):
            if one.keys() != other.keys():
                return False
            pairs += [(value, other[name]) for name, value in one.items()]
        elif isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return False
            pairs += zip(one, other, strict=True)
        elif one != other:
            return False
    return True
