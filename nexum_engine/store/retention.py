"""Transitions of retention: delete the executions that ended long ago. Run them with `Store.run_alone`.

An execution is deleted with all that belongs to it. The executions of a session are deleted together, in one
transaction: a replay of half a session would make the calls of the other half again. A session's id is the part of the
keys of owned executions before the first `/`. Every execution whose key begins with this id and a `/` or `:` belongs to
the session, whether it is owned or not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from nexum_engine.errors import InvalidRequest, NotFound
from nexum_engine.records import ExecutionStatus, Pruned
from nexum_engine.store.db import Db, Row
from nexum_engine.workflow import check_id

MAX_EXECUTIONS = 200
MAX_SECONDS = 0.005
"""A transaction ends after MAX_EXECUTIONS executions or MAX_SECONDS. But it never deletes only a part of a session."""
PAGE = 20
"""How many executions are read at once.

The number is small, because SQLite also reads the inputs (up to 16 MB each) to reach the columns behind them.
"""
_SEPARATORS = "/:"
_SESSION = re.compile(rf"([^{_SEPARATORS}]+)[{_SEPARATORS}]")
_DELETIONS = (
    "prune_former_ids",
    "prune_events",
    "prune_attributes",
    "prune_attempts",
    "prune_nodes",
    "prune_executions",
)
"""The queries that delete executions, in this order. If a new table has rows of executions, it needs a query here."""


@dataclass(frozen=True)
class Verdict:
    """Whether a session may be pruned, and the number of its first execution."""

    is_old: bool
    first: int


Verdicts = dict[str, Verdict | None]
"""The verdicts about the beginnings of keys. None for one that is not a session's id, because no owned execution has
such a key."""


def prune(
    db: Db,
    older_than_ms: int,
    *,
    session: str = "",
    after: int = 0,
    dry_run: bool = False,
    verdicts: Verdicts | None = None,
) -> Pruned:
    """Delete executions that ended at least `older_than_ms` ago, the oldest first.

    Begin after the execution with the number `after`. With `session`, only that session is considered. With `dry_run`,
    executions are only counted. Give the same `verdicts`, at first an empty dict, to all transactions of one run: a
    session that is kept, or other executions whose keys have the same beginning, are then read only once.
    Raises InvalidRequest for a wrong argument, and NotFound if the session has no executions.
    """
    if older_than_ms < 0:
        raise InvalidRequest("older_than_ms can't be negative")
    if after < 0:
        raise InvalidRequest("after can't be negative")
    pruning = _Pruning(db, db.now_ms - older_than_ms, dry_run, {} if verdicts is None else verdicts)
    if session:
        pruning.prune_session(session)
        return pruning.result(None)
    return pruning.result(pruning.prune_from(after))


class _Pruning:
    """One transaction that prunes."""

    def __init__(self, db: Db, cutoff_ms: int, dry_run: bool, verdicts: Verdicts) -> None:
        self._db = db
        self._cutoff_ms = cutoff_ms
        self._dry_run = dry_run
        self._end = time.monotonic() + MAX_SECONDS
        self._verdicts = verdicts
        self._chosen: list[int] = []
        """The numbers of the executions to delete next."""
        self._gone: set[int] = set()
        self._executions = self._sessions = self._kept = 0

    def result(self, after: int | None) -> Pruned:
        if self._gone:
            self._db.run("note_pruned", number=max(self._gone))
        return Pruned(self._executions, self._sessions, self._kept, after)

    def prune_session(self, session: str) -> None:
        """Prune one session, or count it as kept."""
        check_id(session, "session")
        if any(separator in session for separator in _SEPARATORS):
            raise InvalidRequest(
                f"{session!r} is not a session: give the part of its keys before the first / or :, because a session "
                "is pruned as a whole"
            )
        members = self._with_prefix(session)
        if not members:
            raise NotFound(f"no execution has a key that begins with {session}/ or {session}:")
        if all(map(self._is_old, members)):
            self._sessions += 1
            self._choose(members)
            self._delete_chosen()
        else:
            self._kept += len(members)

    def prune_from(self, after: int) -> int | None:
        """Prune the executions after a number. Return where to continue, or None after the last old execution."""
        while page := self._db.all("oldest_executions", after=after, limit=PAGE):
            for row in page:
                is_new = row["created_ms"] > self._cutoff_ms
                if is_new and row["created_ms"] <= self._db.now_ms:
                    self._delete_chosen()
                    return None  # the executions with larger numbers were created even later
                after = row["sequence"]
                # An execution that seems to be created later than now was created before the clock was set back.
                if not is_new and after not in self._gone:
                    self._judge(row)
                    if len(self._chosen) > PAGE:  # a session was chosen
                        break
            self._delete_chosen()
            if self._executions + self._kept >= MAX_EXECUTIONS or time.monotonic() > self._end:
                return after
        return None

    def _judge(self, row: Row) -> None:
        """Choose the execution, or its whole session, for deletion; else count the execution as kept."""
        session = self._session_of(row)
        if session is None:
            if self._is_old(row):
                self._choose([row])
            else:
                self._kept += 1
            return
        if session not in self._verdicts:
            members = self._with_prefix(session)
            is_old = all(map(self._is_old, members))
            if is_old and not self._dry_run:
                self._sessions += 1
                self._choose(members)
                return
            self._verdicts[session] = Verdict(is_old, min(member["sequence"] for member in members))
        verdict = self._verdicts[session]
        assert verdict is not None
        if verdict.is_old:
            self._executions += 1
            self._sessions += row["sequence"] == verdict.first
        else:
            self._kept += 1

    def _is_old(self, row: Row) -> bool:
        # Check the status as well, although a RUNNING execution should have no end time.
        is_running = row["status"] == ExecutionStatus.RUNNING
        return not is_running and row["ended_ms"] is not None and bool(row["ended_ms"] <= self._cutoff_ms)

    def _session_of(self, row: Row) -> str | None:
        match = _SESSION.match(row["idempotency_key"] or "")
        if match is None:
            return None
        session = match[1]
        if session not in self._verdicts:
            first, end = f"{session}/", f"{session}{chr(ord('/') + 1)}"
            if self._db.one("is_session", first=first, end=end) is not None:
                return session
            self._verdicts[session] = None
        return None if self._verdicts[session] is None else session

    def _with_prefix(self, session: str) -> list[Row]:
        return [
            row
            for separator in _SEPARATORS
            for row in self._db.all(
                "executions_of_keys", first=f"{session}{separator}", end=f"{session}{chr(ord(separator) + 1)}"
            )
        ]

    def _choose(self, rows: list[Row]) -> None:
        self._executions += len(rows)
        if not self._dry_run:
            for row in rows:
                children = self._db.all("descendants", execution=row["sequence"]) if row["has_children"] else []
                self._chosen += [row["sequence"], *(child["number"] for child in children)]
            self._gone.update(self._chosen)

    def _delete_chosen(self) -> None:
        for first, last in _runs(self._chosen):
            for query in _DELETIONS:
                self._db.run(query, first=first, last=last)
        self._chosen = []


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield consecutive numbers as ranges (first, last), because one statement deletes a whole range."""
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda one: one[1] - one[0]):
        members = [number for _, number in run]
        yield members[0], members[-1]
