"""Lists of executions: filters, sessions, and pages.

To make a list, choose a condition that few executions meet. The index of this condition gives the candidates, newest
first. The query `matching` then checks the other conditions. So a list takes little time even in a large database.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from pydantic import BaseModel, ConfigDict, ValidationError

from nexum_engine.errors import ExecutionNotFound, InvalidRequest
from nexum_engine.records import Execution, ExecutionStatus, SessionSummary
from nexum_engine.store.db import Db, Row, of_one_snapshot, row_of
from nexum_engine.store.ids import number_of
from nexum_engine.store.reading import execution_of, get_execution, payload_bytes
from nexum_engine.workflow import MAX_ATTRIBUTES

MAX_LIST_BYTES = 16 * 1024 * 1024
"""The largest total size of the inputs and outputs in one list of executions.

Server and client hold the whole list in memory.
"""
_CANDIDATES = 1000
"""How many candidates one query reads."""
_RARE = 50_000
"""If a workflow or an attribute has fewer executions than this, its executions are the candidates.

If it has more of them, a search through all executions, beginning at the newest one, soon finds enough matches.
"""
_OUT_OF_ORDER_MS = 10_000
"""If several servers start executions, the executions are not always numbered in the order of their starts.

An execution may have started up to this much earlier than an execution with a smaller number.
"""
_END = 2**53  # above every number of an execution; 1000 * _END is still a 64-bit number


@dataclass(frozen=True)
class _Filter:
    """The conditions of a list. A condition that is empty or 0 matches all executions."""

    workflow_id: str
    status: str
    key_prefix: str
    since_ms: int
    until_ms: int
    attributes: Mapping[str, str]
    group_sessions: bool
    parent: str

    def check(self) -> None:
        """Raise InvalidRequest for an unknown status or a value out of range."""
        if self.status and self.status not in ExecutionStatus.__members__:
            raise InvalidRequest(f"unknown status {self.status!r}: use one of {', '.join(ExecutionStatus.__members__)}")
        if self.since_ms < 0 or self.until_ms < 0:
            raise InvalidRequest("since_ms and until_ms can't be negative")
        if len(self.attributes) > MAX_ATTRIBUTES:
            raise InvalidRequest(
                f"the filter has {len(self.attributes)} attributes; an execution has at most {MAX_ATTRIBUTES}"
            )


@of_one_snapshot
def list_executions(
    db: Db,
    workflow_id: str,
    status: str,
    limit: int,
    *,
    key_prefix: str = "",
    since_ms: int = 0,
    until_ms: int = 0,
    attributes: Mapping[str, str] | None = None,
    group_sessions: bool = False,
    before: str = "",
    with_nodes: bool = False,
    parent: str = "",
) -> list[Execution]:
    """Return the newest executions, newest first, that meet all conditions. An empty condition matches all.

    `since_ms` and `until_ms` compare the time of the start. `parent` is an execution's id, and selects the executions
    that its nodes started. Without `parent`, the executions of MAP nodes' items are left out. With `group_sessions`, a
    session is one item: its latest run, with the session's summary. `before` is an execution's id, and selects older
    executions. With `with_nodes`, the list may end early, after MAX_LIST_BYTES; only an empty list means that there are
    no older executions. Raises ExecutionNotFound for an unknown `before`, and InvalidRequest for a wrong condition.
    """
    wanted = _Filter(workflow_id, status, key_prefix, since_ms, until_ms, attributes or {}, group_sessions, parent)
    wanted.check()
    last = _END
    if before:
        oldest = db.one("sequence", execution=number_of(db, before), execution_id=before)
        if oldest is None:
            raise ExecutionNotFound(before)
        last = oldest["sequence"]
    rows = _matching(db, wanted, last, limit)
    if with_nodes:
        return _with_nodes(db, rows)
    found = [execution_of(row) for row in rows]
    return [_as_session(db, one, row) for one, row in zip(found, rows, strict=True)] if wanted.group_sessions else found


def _matching(db: Db, wanted: _Filter, before: int, limit: int) -> list[Row]:
    candidates, is_exact = _candidates(db, wanted)
    first = _first_since(db, wanted.since_ms - _OUT_OF_ORDER_MS) if wanted.since_ms else 1
    before = min(before, _first_since(db, wanted.until_ms + _OUT_OF_ORDER_MS) if wanted.until_ms else before)
    narrow = {
        "workflow_id": wanted.workflow_id,
        "status": wanted.status,
        "since_ms": wanted.since_ms,
        "until_ms": wanted.until_ms,
        "attributes": json.dumps(dict(wanted.attributes)),
        "grouped": wanted.group_sessions,
        "with_items": bool(wanted.parent),
    }
    size = limit if is_exact else max(limit, _CANDIDATES)
    found: list[Row] = []
    while len(found) < limit:
        sequences = [row["sequence"] for row in candidates(first=first, before=before, limit=size)]
        if not sequences:
            break
        before = sequences[-1]
        found += db.all("matching", sequences=json.dumps(sequences), **narrow)
        if len(sequences) < size:
            break
    return found[:limit]


def _candidates(db: Db, wanted: _Filter) -> tuple[Callable[..., list[Row]], bool]:
    """Return the query that finds candidates, and whether every candidate matches.

    The query looks for one of the wanted conditions, one that few executions meet. If there is no such condition, all
    executions are candidates.
    """
    conditions = [wanted.workflow_id, wanted.status, *wanted.attributes, wanted.group_sessions]
    is_only = sum(map(bool, conditions)) <= 1
    if wanted.parent:
        return partial(db.all, "newest_of_parent", parent=number_of(db, wanted.parent)), not any(conditions)
    if wanted.key_prefix:
        keys = {"first_key": wanted.key_prefix, "end_key": wanted.key_prefix + chr(sys.maxunicode)}
        if wanted.workflow_id:
            return partial(db.all, "newest_of_keys", workflow_id=wanted.workflow_id, **keys), is_only
        return partial(db.all, "newest_of_keys_of_all", **keys), not any(conditions)
    counts = {
        one: _count(db, "how_many_with_attribute", name=one[0], value=one[1]) for one in wanted.attributes.items()
    }
    name, value = min(counts, key=lambda one: counts[one], default=("", ""))
    with_attribute = partial(db.all, "newest_with_attribute", name=name, value=value)
    if counts and counts[name, value] < _RARE:
        return with_attribute, is_only
    if wanted.status == ExecutionStatus.RUNNING:
        return partial(db.all, "newest_running"), is_only
    if wanted.status in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
        return partial(db.all, "newest_without_result", status=wanted.status), is_only
    if wanted.workflow_id and _count(db, "how_many_of_workflow", workflow_id=wanted.workflow_id) < _RARE:
        return partial(db.all, "newest_of_workflow", workflow_id=wanted.workflow_id), is_only
    return (with_attribute, is_only) if counts else (partial(db.all, "newest"), not any(conditions))


def _count(db: Db, query: str, **parameters: str) -> int:
    return int(row_of(db, query, **parameters, limit=_RARE)["number"])


def _first_since(db: Db, ms: int) -> int:
    """Return the number of the first execution that was started at or after `ms`.

    Executions are numbered in the order of their starts, so bisect. If the clock was set back, the start times
    may cross `ms` more than once. In that case, return the first execution after any one of these crossings.
    """
    newest = db.all("newest", first=0, before=_END, limit=1)
    low, high = 1, newest[0]["sequence"] + 1 if newest else 1
    while low < high:
        middle = (low + high) // 2
        row = db.one("started_up_to", sequence=middle)
        if row is None or row["created_ms"] < ms:
            low = middle + 1
        else:
            high = middle
    return low


def _with_nodes(db: Db, rows: list[Row]) -> list[Execution]:
    whole: list[Execution] = []
    left = MAX_LIST_BYTES
    for row in rows:
        left -= payload_bytes(db, row["execution_id"])
        if whole and left < 0:
            break
        whole.append(get_execution(db, row["execution_id"]))
    return whole


# ---- Sessions --------------------------------------------------------------------------------------------------------


class _Summary(BaseModel):
    """The field `summary` of an event's output. Other outputs have no such field, or a field of another form."""

    model_config = ConfigDict(extra="ignore", strict=True)

    question: str = ""
    calls: int = 0
    tokens: int = 0


def _as_session(db: Db, run: Execution, listed: Row) -> Execution:
    """If `run` is the latest run of a session, add the session's summary. Return any other execution unchanged."""
    session, slash, _ = run.idempotency_key.partition("/")
    latest = db.one("latest_run", execution=listed["sequence"]) if slash else None
    if latest is None:
        return run
    keys = {"first_key": f"{session}/", "end_key": f"{session}0"}  # "0" is the character after "/"
    found: list[tuple[int, int, _Summary | None]] = []  # of each workflow: the last time, the number, and the summary
    for workflow in db.all("workflow_ids"):
        row = row_of(db, "session_events", workflow_id=workflow["workflow_id"], **keys)
        if row["number"]:
            last = db.one("session_summary", workflow_id=workflow["workflow_id"], last_ms=row["last_ms"], **keys)
            found.append((row["last_ms"], row["number"], _summary_of(last)))
    # Executions without a summary, such as events that others have sent to the session, are not its recorded events.
    found = [one for one in found if one[2] is not None] or found
    _, _, newest = max(found, key=lambda one: one[0], default=(0, 0, None))
    events, summary = sum(number for _, number, _ in found), newest or _Summary()
    return replace(
        run,
        session=SessionSummary(
            session, events, bool(latest["is_running"]), summary.question, summary.calls, summary.tokens
        ),
    )


def _summary_of(row: Row | None) -> _Summary | None:
    try:
        return None if row is None or row["summary"] is None else _Summary.model_validate_json(row["summary"])
    except ValidationError:
        return None
