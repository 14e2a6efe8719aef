"""The rules of an execution, without a database: what is ready, when it is done, when a retry is due."""

from __future__ import annotations

from collections.abc import Mapping

from nexum_engine.model import NodeStatus
from nexum_engine.workflow import NodeDefinition

MAX_FAILED_ATTEMPTS = 4
"""Reported failures after which a node is FAILED."""
MAX_LOST_ATTEMPTS = 10
"""Attempts lost to a crash or an expired lease after which a node is FAILED."""
FIRST_RETRY_DELAY_MS = 1000


def ready_nodes(definition: Mapping[str, NodeDefinition], status: Mapping[str, NodeStatus]) -> list[str]:
    """The PENDING nodes whose dependencies are all recorded, in the definition's order."""
    return [
        node_id
        for node_id, node in definition.items()
        if status[node_id] is NodeStatus.PENDING
        and all(status[dependency] is NodeStatus.COMPLETED for dependency in node.dependencies)
    ]


def is_complete(status: Mapping[str, NodeStatus]) -> bool:
    """Whether every node is recorded."""
    return all(state is NodeStatus.COMPLETED for state in status.values())


def retry_delay_ms(failed_attempts: int) -> int | None:
    """How long to wait after the n-th reported failure (1 s, 2 s, 4 s); None when there is no further attempt."""
    if failed_attempts >= MAX_FAILED_ATTEMPTS:
        return None
    return FIRST_RETRY_DELAY_MS << (failed_attempts - 1)
