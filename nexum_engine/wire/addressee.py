"""Metadata in which a client names the database that the server must have open.

A run's client sends the metadata with every call, because another server can get the same port between two calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nexum_engine.location import place_of, place_of_url

_DATABASE = "nexum-database-bin"
_PLACE = "nexum-place-bin"
_EMBEDDED_ONLY = "nexum-embedded-only"

Metadata = tuple[tuple[str, str | bytes], ...]


def metadata_for(database: Path, *, embedded_only: bool = False) -> Metadata:
    """Return metadata that makes a server refuse the call unless the server has `database` open.

    With `embedded_only`, only an embedded server refuses. Any other server answers, even if it has another database
    open. If the database's folder doesn't exist, no server has the database open.
    """
    named = ((_DATABASE, os.fsencode(database)), (_PLACE, place_of(database)))
    return (*named, (_EMBEDDED_ONLY, "1")) if embedded_only else named


def metadata_for_url(url: str) -> Metadata:
    """Return metadata that makes an embedded server refuse the call unless it has the database of `url` open.

    `url` names no file on this machine: any other server answers, even if it has another database open.
    """
    name = b"the database that DATABASE_URL names"  # the URL may hold a password
    return (_DATABASE, name), (_PLACE, place_of_url(url)), (_EMBEDDED_ONLY, "1")


def refusal(metadata: Iterable[Any], database: str, place: bytes, *, embedded: bool) -> str | None:
    """Return why a server must refuse a call with `metadata`, or None if it may answer.

    The server has `database` open, which is at `place` (see `place_of` and `place_of_url`).
    """
    found = dict(metadata)
    wanted = found.get(_DATABASE)
    if wanted is None or (place and found.get(_PLACE) == place) or (_EMBEDDED_ONLY in found and not embedded):
        return None
    name = os.fsdecode(wanted)
    other = "another file of that path, perhaps in another container" if name == database else name
    return f"the server has {database} open{' for runs of another folder' if embedded else ''}, not {other}"
