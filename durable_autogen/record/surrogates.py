"""Lone surrogates: halves of surrogate pairs in texts. Databases can't store them.

Python makes them, for example, from a file's name that isn't UTF-8.
"""

from __future__ import annotations

import re
from typing import Any

_LONE = re.compile("[\ud800-\udfff]")


def has_surrogates(text: str) -> bool:
    """Return whether a text holds a lone surrogate."""
    return not text.isascii() and _LONE.search(text) is not None


def representable(value: Any) -> Any:
    """Return a JSON-like value with each lone surrogate replaced: databases can't store lone surrogates."""
    if isinstance(value, str):
        return _LONE.sub("\ufffd", value) if not value.isascii() else value
    if isinstance(value, dict):
        return {representable(key): representable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [representable(item) for item in value]
    return value
