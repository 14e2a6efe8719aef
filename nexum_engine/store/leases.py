"""Transitions of leases: renewed, shortened, run out.

A function is one change of state inside one transaction, the same for every database. It checks the state that it
expects and raises an error of `nexum_engine.errors` where it finds another; the transaction is then rolled back.
"""

from __future__ import annotations

from nexum_engine import scheduling
from nexum_engine.records import Outcome
from nexum_engine.store.db import Db, Row
from nexum_engine.store.results import Changed, Changes, ReadyTask, Swept
from nexum_engine.store.tasks import fail_node

OWNER_RESTART_GRACE_MS = 500
"""After a restart, how long an owner has to come back before another one may take its place. It knocks several times a
second, and a late one loses nothing unless another one came."""
SLOW_LINE = 250  # bytes a millisecond
"""How slowly a task may travel to its worker. Beats overtake a large one."""


def renew(db: Db, worker_id: str, task_ids: tuple[str, ...], lease_ms: int) -> frozenset[str]:
    """Extend the leases of what a worker says that it holds; the ids of what else it must have by now."""
    until_ms = db.now_ms + lease_ms
    for task_id in task_ids:
        db.run("renew_lease", task_id=task_id, worker_id=worker_id, lease_expires_ms=until_ms)
    return frozenset(row["task_id"] for row in _handed_out(db, worker_id)).difference(task_ids)


def lose(db: Db, worker_id: str, task_ids: frozenset[str]) -> Changed:
    """End attempts that a worker was handed and does not have."""
    changes = Changes()
    reason = f"worker {worker_id} does not have the task: two of its signs of life in a row did not name it"
    for row in _handed_out(db, worker_id):
        if row["task_id"] in task_ids:
            _lose(db, row, Outcome.LOST, reason, changes)
    return changes.freeze()


def _handed_out(db: Db, worker_id: str) -> list[Row]:
    return db.all("handed_out", worker_id=worker_id, bytes_per_ms=SLOW_LINE, now=db.now_ms)


def disconnect(db: Db, worker_id: str, grace_ms: int) -> None:
    """A worker's stream broke: what it holds is lost unless it comes back within the grace."""
    db.run("shorten_leases", worker_id=worker_id, lease_expires_ms=db.now_ms + grace_ms)


def restart(db: Db, grace_ms: int, unstreamed_ms: int) -> None:
    """The server starts: workers get time to come back to what they hold."""
    db.run("restart_leases", streamed=1, lease_expires_ms=db.now_ms + grace_ms)
    db.run("restart_leases", streamed=0, lease_expires_ms=db.now_ms + unstreamed_ms)
    db.run("restart_owned_leases", lease_expires_ms=db.now_ms + min(grace_ms, OWNER_RESTART_GRACE_MS))
    # The wall clock may have been set back while no server ran: no task waits for longer than its retry.
    db.run("restart_tasks", latest=db.now_ms + scheduling.LONGEST_RETRY_DELAY_MS)


def sweep(db: Db, since_ms: int) -> Swept:
    """End the attempts whose lease has run out, and find the retries that became due after `since_ms`."""
    # Before the expired ones, which become due at this very moment and announce themselves.
    retries = db.all("due_tasks", since=since_ms, now=db.now_ms)
    changes = Changes([ReadyTask(row["version_hash"], row["task_bytes"]) for row in retries])
    for row in db.all("expired_attempts", now=db.now_ms):
        _expire(db, row, changes)
    due = [
        row["due"]
        for row in (db.one("next_lease"), db.one("next_retry", now=db.now_ms))
        if row is not None and row["due"] is not None
    ]
    return Swept(changes.freeze(), min(due, default=None))


def _expire(db: Db, row: Row, changes: Changes) -> None:
    outcome = Outcome(row["lease_loss"])
    worker_id = row["worker_id"]
    reason = {
        Outcome.LOST: f"worker {worker_id} disconnected and did not come back",
        Outcome.EXPIRED: f"worker {worker_id} gave no sign of life for longer than its lease",
        Outcome.INTERRUPTED: f"the server was restarted and worker {worker_id} did not come back",
    }[outcome]
    _lose(db, row, outcome, reason, changes)


def _lose(db: Db, row: Row, outcome: Outcome, reason: str, changes: Changes) -> None:
    if not db.run("lose_attempt", task_id=row["task_id"], outcome=outcome.value, error=reason, now=db.now_ms):
        return  # another attempt that was lost just now has ended the execution, and this one with it
    # Nobody takes an owned node over unless a person starts it again, so it can't kill one worker after the other.
    lost = 0 if outcome is Outcome.INTERRUPTED or row["owned"] else 1
    counts = {"failed": 0, "lost": lost}
    if row["lost_attempts"] + lost >= scheduling.MAX_LOST_ATTEMPTS:
        last = f"{row['lost_attempts'] + lost} attempts were lost, the last because {reason}"
        fail_node(db, row, f"{last}; the task may be what kills its workers", counts, changes)
        return
    node = {"execution_id": row["execution_id"], "node_id": row["node_id"]}
    db.run("retry_node", **node, ready_ms=db.now_ms, attempt=row["attempt"], **counts)
    if not row["owned"]:
        changes.ready.append(ReadyTask(row["version_hash"], row["task_bytes"]))
