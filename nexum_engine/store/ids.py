"""The ids of executions and tasks.

An id contains the number of its row, so that no index is needed to find the row: an index would cost each tool call a
page of the write-ahead log. The rest of the id is random, so that no two databases have an id in common.
"""

from __future__ import annotations

import re
import secrets

from nexum_engine.store.db import Db

_ID = re.compile(r"(?:exec|task)-([0-9]{1,15})-[0-9a-f]{24}")


def random_part() -> str:
    """Return the random part of a new id."""
    return secrets.token_hex(12)


def node_number(execution: int, position: int) -> int:
    """Return the number of a node. queries.sql relies on this formula."""
    return 1000 * execution + position


def new_task_id(node: int) -> str:
    """Return a new id for an attempt at the node."""
    return f"task-{node}-{random_part()}"


def number_of(db: Db, given: str) -> int:
    """Return the number of the only row that can have the id `given`.

    For an execution's id, the row is the execution; for a task's id, it is the task's node. The row may be missing or
    have another id: compare its id with `given`.
    """
    if (match := _ID.fullmatch(given)) is not None:
        return int(match[1])
    former = db.one("former_id", id=given)
    return -1 if former is None else int(former["number"])
