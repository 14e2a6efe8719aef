"""Metadata in which a client names the database that the server must have open.

A run's client sends the metadata with every call, because another server can get the same port between two calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from nexum_engine.location import is_same_database

_DATABASE = "nexum-database-bin"
_EMBEDDED_ONLY = "nexum-embedded-only"

Metadata = tuple[tuple[str, str | bytes], ...]


def metadata_for(database: str, *, embedded_only: bool = False) -> Metadata:
    """Return metadata that makes a server refuse the call unless the server has `database` open.

    With `embedded_only`, only an embedded server refuses. Any other server answers, even if it has another database
    open.
    """
    named = ((_DATABASE, os.fsencode(database)),)
    return (*named, (_EMBEDDED_ONLY, "1")) if embedded_only else named


def is_meant_for(metadata: Iterable[Any], database: str) -> bool:
    """Return whether a call names no database, or names exactly the path `database`."""
    wanted = dict(metadata).get(_DATABASE)
    return wanted is None or wanted == os.fsencode(database)


def refusal(metadata: Iterable[Any], database: str, *, embedded: bool) -> str | None:
    """Return why a server that has `database` open must refuse a call with `metadata`, or None if it may answer.

    The check follows links in the file system, which can take long.
    """
    found = dict(metadata)
    wanted = found.get(_DATABASE)
    if wanted is None or (_EMBEDDED_ONLY in found and not embedded):
        return None
    name = os.fsdecode(wanted)
    if is_same_database(name, database):
        return None
    return f"the server has {database} open{' for runs of another folder' if embedded else ''}, not {name}"
