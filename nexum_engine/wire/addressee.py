"""Metadata in which a client names the database that the server must have open.

Another server can get the same port between two calls. So a run's client sends the metadata with every call.
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
    """Return metadata that makes a server with another database refuse the call.

    With `embedded_only`, a server that is not embedded answers all the same.
    """
    named = ((_DATABASE, os.fsencode(database)),)
    return (*named, (_EMBEDDED_ONLY, "1")) if embedded_only else named


def refusal(metadata: Iterable[Any], database: str, *, embedded: bool) -> str | None:
    """Return why a server with this database must refuse a call with this metadata; None if it may answer."""
    found = dict(metadata)
    wanted = found.get(_DATABASE)
    if wanted is None or (_EMBEDDED_ONLY in found and not embedded):
        return None
    name = os.fsdecode(wanted)
    if is_same_database(name, database):
        return None
    return f"the server has {database} open{' for runs of another folder' if embedded else ''}, not {name}"
