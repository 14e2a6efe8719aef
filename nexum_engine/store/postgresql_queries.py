"""The queries of the store as PostgreSQL needs them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from nexum_engine.store.db import load_queries

_LOCKS = {"oldest_task": "FOR UPDATE OF nodes SKIP LOCKED", "lock_limit": "FOR UPDATE"}
"""By query of queries.sql: the text that `dialect` adds. It makes the query lock the rows that it finds."""
_BY_SERVER = ("take_task", "renew_lease", "resume_node")
"""The statements that also store that the attempt's worker is connected to this server."""
_OF_NO_OTHER = ("restart_leases", "restart_owned_leases", "shorten_leases")
"""The statements that must not change the leases of workers that are connected to another server."""
_NO_OTHER = "NOT EXISTS (SELECT 1 FROM servers WHERE id = server AND id <> :server)"
"""The condition that `dialect` adds to the statements of _OF_NO_OTHER: no other server in the table has the worker.

It doesn't matter whether that server has said lately that it is alive. Perhaps it could not, because the database
didn't answer. The statement `take_over` decides about such a server.
"""


@cache
def dialect() -> Mapping[str, str]:
    """Return the queries by name: those of postgresql.sql, and translations of all others in queries.sql."""
    queries = {**load_queries(), **load_queries("postgresql.sql")}
    for name in _BY_SERVER:
        queries[name] = _edited(queries[name], "UPDATE nodes SET ", "UPDATE nodes SET server = :server, ")
    for name in _OF_NO_OTHER:
        queries[name] = _edited(queries[name], ";", f" AND {_NO_OTHER};")
    return {name: _translated(text, _LOCKS.get(name, "")) for name, text in queries.items()}


def _edited(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is not in this query exactly once: {text}"
    return text.replace(old, new)


def _translated(text: str, lock: str) -> str:
    text = re.sub(r"^--.*\n", "", text, flags=re.MULTILINE).strip().removesuffix(";")
    text = re.sub(r"length\(CAST\(([\w.]+) AS BLOB\)\)", r"octet_length(\1)", text)
    text = text.replace("json_group_object(name, value)", "coalesce(json_object_agg(name, value), '{}')::text")
    listed = r"(SELECT json_array_elements_text(CAST(:\1 AS json)))"
    text = re.sub(r"\(SELECT value FROM json_each\(:(\w+)\)\)", listed, text)
    text = re.sub(r"(?<!:):(\w+)", r"%(\1)s", text.replace("%", "%%"))
    return f"{text} {lock}" if lock else text
