"""Rules for executions: which nodes are ready, and when a retry is due. This module uses no database."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nexum_engine.records import NodeStatus

MAX_FAILED_ATTEMPTS = 4
"""The number of reported failures after which a node is FAILED."""
MAX_LOST_ATTEMPTS = 10
"""The number of lost attempts (a crash, an expired lease) after which a node is FAILED."""
FIRST_RETRY_DELAY_MS = 1000
LONGEST_RETRY_DELAY_MS = FIRST_RETRY_DELAY_MS << (MAX_FAILED_ATTEMPTS - 2)


def ready_nodes(dependencies: Mapping[str, Collection[str]], status: Mapping[str, NodeStatus]) -> list[str]:
    """Return the PENDING nodes, in the order of `dependencies`, whose dependencies all have a recorded output."""
    return [
        node_id
        for node_id, needed in dependencies.items()
        if status[node_id] is NodeStatus.PENDING
        and all(status[dependency] is NodeStatus.COMPLETED for dependency in needed)
    ]


def retry_delay_ms(failed_attempts: int) -> int | None:
    """Return the wait before the next attempt (1 s, 2 s, 4 s). Return None after the last attempt."""
    if failed_attempts >= MAX_FAILED_ATTEMPTS:
        return None
    return FIRST_RETRY_DELAY_MS << (failed_attempts - 1)
