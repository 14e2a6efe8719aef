"""The limits of nodes: how often a node is handed out, and how many attempts at it run at the same time.

A limit belongs to a node of a workflow. The limit counts over all executions of the workflow, over all versions of the
workflow that have limits, and over all servers of the database. A limit delays the hand-out: it holds back a node that
is READY.

The concurrency limits the number of RUNNING nodes. The rate is a token bucket, of which one number is stored: the time
at which the bucket will be full again (GCRA, the generic cell rate algorithm).
"""

from __future__ import annotations

from functools import lru_cache

from pydantic import BaseModel, ConfigDict

from nexum_engine.store.db import Db, Row, row_of
from nexum_engine.store.results import Changes, Gate, ReadyTask
from nexum_engine.workflow import Concurrency, NodeDefinition, Rate


class NodeLimits(BaseModel):
    """The limits of one node, as the column `limits` stores them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: Rate | None = None
    concurrency: Concurrency | None = None


_parse = lru_cache(maxsize=256)(NodeLimits.model_validate_json)


def limits_of(node: NodeDefinition) -> str | None:
    """Return the limits of a node as JSON, for the column `limits`. Return None if it has no limits."""
    if not node.is_limited:
        return None
    return NodeLimits(rate=node.rate, concurrency=node.concurrency).model_dump_json(exclude_none=True)


def gate_of(db: Db, node: Row, *, lock: bool = False) -> Gate:
    """Return the gate of a READY node: whether the limits of the node let it be handed out now.

    `node` has the columns execution, node_id and limits. With `lock`, no other server hands out a node under the same
    limits before the commit.
    """
    if node["limits"] is None:
        return Gate()
    limits = _parse(node["limits"])
    of_node = {"execution": node["execution"], "node_id": node["node_id"]}
    bucket = db.one("lock_limit" if lock else "limit", **of_node)
    most = limits.concurrency
    if most is not None and row_of(db, "running_under_limit", **of_node)["running"] >= most:
        return Gate(f"concurrency of {most}")
    if limits.rate is None:
        return Gate()
    length_ms = 1000 * limits.rate.seconds
    interval_ms = length_ms / limits.rate.calls
    burst_ms = length_ms - interval_ms
    full_ms = float(db.now_ms if bucket is None else max(bucket["next_ms"], db.now_ms))
    if full_ms > db.now_ms + length_ms + 1:  # plus 1, because of the rounding below
        # The rate was changed, or the clock was set back. Treat the bucket as empty: it is full again after length_ms.
        full_ms = db.now_ms + length_ms
        if lock:
            db.run("set_bucket", **of_node, next_ms=full_ms)
    opens_ms = round(full_ms - burst_ms)  # rounded, because a sum of intervals is not exact
    if opens_ms > db.now_ms:
        return Gate(f"rate of {limits.rate}", opens_ms)
    full_ms += interval_ms
    return Gate(opens_ms=max(round(full_ms - burst_ms), db.now_ms), full_ms=full_ms)


def pass_through(db: Db, node: Row, gate: Gate) -> None:
    """Count the hand-out of a node in the bucket of its rate, if it has a rate. The gate must be open."""
    if gate.full_ms is not None:
        db.run("set_bucket", execution=node["execution"], node_id=node["node_id"], next_ms=gate.full_ms)


def slot_freed(db: Db, node: Row, changes: Changes) -> None:
    """Announce the tasks that the limits of `node` may have held back until now.

    Call this when an attempt at `node` has ended, after the statement that ends it.
    """
    if node["limits"] is None:
        return
    # Take the lock. Otherwise another server's transaction could still count this attempt, and hold back a task. The
    # next query would not see that task yet, so nobody would announce it.
    db.run("lock_limit", execution=node["execution"], node_id=node["node_id"])
    waiting = db.all("versions_of_limit", execution=node["execution"], now=db.now_ms)
    changes.ready += [ReadyTask(row["version_hash"]) for row in waiting]
