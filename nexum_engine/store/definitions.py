"""The definitions of workflows in the store, and the columns of a node that come from its definition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from nexum_engine.errors import WorkflowNotFound
from nexum_engine.records import Effect
from nexum_engine.store.db import Db, Row
from nexum_engine.store.limits import limits_of
from nexum_engine.store.reading import MAX_INLINE_BYTES
from nexum_engine.workflow import DEFAULT_RETRY_POLICY, NodeDefinition, RetryPolicy, parse_ir

TIMEOUT_GRACE_MS = 1000
"""How long the server waits beyond a node's time limit, so that the worker can report the timeout first."""

# Remember only a few long definitions: the memory must stay small whatever clients register.
_parse_short = lru_cache(maxsize=256)(parse_ir)
_parse_long = lru_cache(maxsize=4)(parse_ir)


def parsed(ir_json: str) -> Mapping[str, NodeDefinition]:
    """Return the nodes of an IR in an order in which each node comes after the nodes that it waits for."""
    return _parse_short(ir_json) if len(ir_json) <= MAX_INLINE_BYTES else _parse_long(ir_json)


def definition_of(db: Db, workflow_id: str, version_hash: str) -> Mapping[str, NodeDefinition]:
    """Return the nodes of a registered version."""
    row = db.one("version", workflow_id=workflow_id, version_hash=version_hash)
    if row is None:
        raise WorkflowNotFound(workflow_id, version_hash)
    return parsed(row["ir_json"])


def columns_of(node: NodeDefinition) -> dict[str, object]:
    """Return a node's columns for its time limit, retry policy, effect and limits."""
    limited = node.timeout_seconds is not None and node.node_type.has_task
    return {
        "timeout_ms": milliseconds(node.timeout_seconds or 0) + TIMEOUT_GRACE_MS if limited else None,
        "retry": None if node.retry == DEFAULT_RETRY_POLICY else node.retry.model_dump_json(),
        "effect": (Effect.RECONCILE if node.reconcile else Effect.ONCE).value if node.once else None,
        "limits": limits_of(node),
    }


def retry_of(row: Row) -> RetryPolicy:
    """Return a node's retry policy."""
    return DEFAULT_RETRY_POLICY if row["retry"] is None else RetryPolicy.model_validate_json(row["retry"])


def milliseconds(seconds: float) -> int:
    """Return a delay or time limit in whole milliseconds."""
    # Round up: a timer must never be early.
    return math.ceil(seconds * 1000)
