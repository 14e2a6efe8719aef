"""JSON-like values in a form that every database can store.

`encoded` writes a value, and `decoded` restores it. `representable` changes a text for good: it replaces the lone
surrogates. These are halves of surrogate pairs, which Python makes, for example, from a file's name that isn't UTF-8.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from nexum_engine.errors import InvalidRequest

MAX_DEPTH = 100  # levels of nesting at most; a value with more levels is recorded as a text

_LONE = re.compile("[\ud800-\udfff]")


def representable(value: Any) -> Any:
    """Return a JSON-like value with each lone surrogate replaced: databases can't store lone surrogates."""
    if isinstance(value, str):
        return _LONE.sub("\ufffd", value) if not value.isascii() else value
    if isinstance(value, dict):
        return {representable(key): representable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [representable(item) for item in value]
    return value


_FLOAT, _TEXT, _DICT = "$float", "$json", "$dict"


def encoded(value: Any) -> Any:
    """Return a JSON-like value in a form that every database can store. `decoded` restores the value.

    Infinite numbers and NaN, which JSON lacks, are replaced by tagged values. So are values that are nested too deeply.
    Raises InvalidRequest if the value can't be written as JSON.
    """
    try:
        return _encoded(value, MAX_DEPTH)
    except RecursionError:
        pass
    try:
        return {_TEXT: json.dumps(value, ensure_ascii=False, separators=(",", ":"))}
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the value can't be written as JSON: {error}") from error


def _encoded(value: Any, levels: int) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if levels == 0:
        raise RecursionError
    if isinstance(value, Mapping):
        items = {key: _encoded(item, levels - 1) for key, item in value.items()}
        return {_DICT: items} if items.keys() & {_FLOAT, _TEXT, _DICT} else items
    if isinstance(value, (list, tuple)):
        return [_encoded(item, levels - 1) for item in value]
    raise InvalidRequest(f"a {type(value).__name__} can't be written as JSON")


def decoded(value: Any) -> Any:
    """Return the original of a value that `encoded` returned."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _FLOAT in value:
        return float(value[_FLOAT])
    if _TEXT in value:
        return json.loads(value[_TEXT])
    return {key: decoded(item) for key, item in value.get(_DICT, value).items()}
