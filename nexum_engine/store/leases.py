"""Transitions of leases: renew, shorten, expire."""

from __future__ import annotations

from collections.abc import Mapping

from nexum_engine import jsontext
from nexum_engine.records import Effect, ExecutionStatus, Outcome
from nexum_engine.store.db import Db, Row, row_of
from nexum_engine.store.definitions import TIMEOUT_GRACE_MS, retry_of
from nexum_engine.store.ids import number_of
from nexum_engine.store.results import Changes, ReadyTask, Renewed, Swept
from nexum_engine.store.tasks import (
    AttemptEnd,
    counted_as_lost,
    fail_node,
    find_attempt,
    retry_node,
    retry_or_fail,
    wait_for_person,
)
from nexum_engine.store.waits import end_waits

MAX_LOST_ATTEMPTS = 10
"""The number of lost attempts (a crash, an expired lease) after which a node is FAILED."""
OWNER_RESTART_GRACE_MS = 500
"""How long an owner has to reconnect after a restart of the server, before another owner may take over. A running owner
tries to reconnect several times a second. A late owner loses its task only if another owner wants the task."""
MAX_SWEPT = 500
"""How many expired attempts one transaction ends. If there are more, the next transaction follows at once."""
MAX_PROGRESS_BYTES = 16 * 1024
"""The largest progress of a task that the server stores."""
SLOW_LINE = 250  # bytes per millisecond
"""The speed of the slowest connection that a worker may have.

This speed tells how long a large task may be on its way to the worker. During that time, the worker's heartbeats can't
name the task.
"""


def renew(
    db: Db, worker_id: str, task_ids: tuple[str, ...], lease_ms: int, progress: Mapping[str, str] | None = None
) -> Renewed:
    """Extend the leases of `task_ids`, the tasks that a heartbeat named, and store the `progress` of some of them.

    An attempt whose lease has run out is resumed if no newer attempt was handed out: its worker is still at work.
    """
    until_ms = db.now_ms + lease_ms
    lapsed = [task_id for task_id in task_ids if not _renewed(db, worker_id, task_id, until_ms)]
    lost = tuple(task_id for task_id in lapsed if not _resume(db, worker_id, task_id, until_ms))
    for task_id, progress_json in (progress or {}).items():
        jsontext.parse(progress_json, "progress_json", max_bytes=MAX_PROGRESS_BYTES)
        task = {"node": number_of(db, task_id), "task_id": task_id, "worker_id": worker_id}
        db.run("store_progress", **task, progress_json=progress_json)
    unnamed = frozenset(row["task_id"] for row in _handed_out(db, worker_id)).difference(task_ids)
    return Renewed(unnamed, lost, resumed=len(lost) < len(lapsed))


def _renewed(db: Db, worker_id: str, task_id: str, until_ms: int) -> bool:
    task = {"node": number_of(db, task_id), "task_id": task_id, "worker_id": worker_id}
    return bool(db.changes("renew_lease", **task, lease_expires_ms=until_ms, now=db.now_ms))


def _resume(db: Db, worker_id: str, task_id: str, until_ms: int) -> bool:
    row = find_attempt(db, task_id)
    if (
        row is None
        or row["worker_id"] != worker_id
        or row["outcome"] not in (Outcome.LOST, Outcome.EXPIRED, Outcome.INTERRUPTED, Outcome.UNKNOWN)
        or row["attempt"] != row["newest_attempt"]
        or row["execution_status"] != ExecutionStatus.RUNNING
    ):
        return False
    attempt = {"node": row["node"], "attempt": row["attempt"], "lost": counted_as_lost(row)}
    resumed = db.changes("resume_node", **attempt, lease_expires_ms=until_ms, now=db.now_ms)
    return resumed > 0  # a claim of another server may have been first


def lose(db: Db, worker_id: str, task_ids: frozenset[str]) -> Changes:
    """End the attempts at tasks that never reached the worker."""
    changes = Changes()
    reason = f"the task did not reach worker {worker_id}: two heartbeats in a row did not name it"

    def found() -> list[Row]:
        return [row for row in _handed_out(db, worker_id) if row["task_id"] in task_ids]

    for row in found():
        db.lock(row["execution"])
    for row in found():  # another server may have ended some of the attempts before this server had the locks
        _lose(db, row, Outcome.LOST, reason, changes, may_have_begun=False)
    return changes


def _handed_out(db: Db, worker_id: str) -> list[Row]:
    return db.all("handed_out", worker_id=worker_id, bytes_per_ms=SLOW_LINE, now=db.now_ms)


def disconnect(db: Db, worker_id: str, grace_ms: int) -> None:
    """Shorten the leases of a worker whose stream broke. If it reconnects within `grace_ms`, it keeps its tasks."""
    db.run("shorten_leases", worker_id=worker_id, lease_expires_ms=db.now_ms + grace_ms)


def restart(db: Db, grace_ms: int, unstreamed_ms: int, dead_process: str = "") -> None:
    """Reset all leases at the server's start, so that workers have time to reconnect and keep their tasks.

    `grace_ms` is the new lease of workers that had a worker stream, and `unstreamed_ms` that of workers without one.
    The leases of workers and owners in `dead_process` end at once (see `process_name`).
    """
    db.run("restart_leases", streamed=True, lease_expires_ms=db.now_ms + grace_ms)
    db.run("restart_leases", streamed=False, lease_expires_ms=db.now_ms + unstreamed_ms)
    db.run("restart_owned_leases", lease_expires_ms=db.now_ms + min(grace_ms, OWNER_RESTART_GRACE_MS))
    if dead_process:
        db.run("end_leases", process=dead_process, now=db.now_ms)
    # The clock may have been set back while no server ran. Let no wait be longer than a wait that begins now.
    db.run("restart_tasks", now=db.now_ms)
    for row in db.all("waiting_retries", now=db.now_ms):
        delay_ms = retry_of(row).delay_ms(row["failed_attempts"]) or 0
        db.run("restart_retry", node=row["node"], latest=db.now_ms + delay_ms)
    db.run("restart_waits", now=db.now_ms)


def sweep(db: Db, since_ms: int, latest_ms: int | None = None) -> Swept:
    """End the attempts whose lease has run out, and complete or fail the nodes that have waited as long as they may.

    Also find the retries that became due after `since_ms`. If it is later than `latest_ms`, change nothing.
    """
    if latest_ms is not None and db.now_ms > latest_ms:
        return Swept(Changes(), None, is_late=True)
    # Query the due retries before `_expire` ends attempts. `_expire` announces the nodes that it makes due, and a later
    # query would announce these nodes a second time.
    retries = db.all("due_retries", since=since_ms, now=db.now_ms)
    changes = Changes([ReadyTask(row["version_hash"], row["task_bytes"]) for row in retries])
    for found in db.all("expired_leases", now=db.now_ms, limit=MAX_SWEPT):
        db.lock(found["execution"])
        row = db.one("expired_lease", node=found["node"], now=db.now_ms)
        if row is not None:  # else another server was first, or an earlier pass of this loop has ended the execution
            _expire(db, row, changes)
    end_waits(db, changes)
    nexts = row_of(db, "next_lease"), row_of(db, "next_retry", now=db.now_ms), row_of(db, "next_wait")
    return Swept(changes, min((row["due"] for row in nexts if row["due"] is not None), default=None))


def _expire(db: Db, row: Row, changes: Changes) -> None:
    limit_ms = row["timeout_ms"]
    if limit_ms is not None and row["started_ms"] + limit_ms <= db.now_ms:
        reason = f"the attempt took longer than its time limit of {(limit_ms - TIMEOUT_GRACE_MS) / 1000:g} s"
        if row["effect"] is None:
            retry_or_fail(db, row, AttemptEnd(Outcome.TIMED_OUT, reason, failed=1), False, changes)
        else:
            _lose(db, row, Outcome.TIMED_OUT, reason, changes)
        return
    outcome = Outcome(row["lease_loss"])
    # A node that its program owns has no worker: the program's process does the work.
    who = f"{'process' if row['owned'] else 'worker'} {row['worker_id']}"
    gone = "ended, or lost its connection" if row["owned"] else "disconnected and did not reconnect"
    reason = {
        Outcome.LOST: f"{who} {gone}",
        Outcome.EXPIRED: f"{who} sent no heartbeat for longer than its lease",
        Outcome.INTERRUPTED: f"the server was restarted and {who} did not reconnect",
    }[outcome]
    _lose(db, row, outcome, reason, changes)


def _lose(db: Db, row: Row, outcome: Outcome, reason: str, changes: Changes, *, may_have_begun: bool = True) -> None:
    """End an attempt without a report. `may_have_begun` is False if the task never reached the worker."""
    runs_once = row["effect"] is not None
    # Count losses, because a task that kills one worker after another must fail in the end. Don't count an INTERRUPTED
    # attempt: the server's restart ended it, not its task. Don't count the losses of an owned node: it is never handed
    # to workers.
    counts = outcome is not Outcome.INTERRUPTED and not row["owned"]
    end = AttemptEnd(outcome, reason, lost=int(counts))
    losses = row["lost_attempts"] + end.lost
    is_last = losses >= MAX_LOST_ATTEMPTS
    if (row["effect"] == Effect.ONCE and may_have_begun) or (runs_once and is_last):
        wait_for_person(db, row, reason, changes, None if outcome is Outcome.TIMED_OUT else outcome)
    elif is_last:
        last = f"{losses} attempts were lost, the last because {reason}"
        fail_node(db, row, f"{last}; the task itself may kill its workers", end, changes)
    # If another loss in this transaction has ended the execution, `retry_node` returns False.
    elif retry_node(db, row, 0, end, changes) and runs_once and may_have_begun:
        db.run("must_reconcile", node=row["node"])
