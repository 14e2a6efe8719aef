"""The rules of an execution's nodes: when a node runs, and when it is skipped."""

from __future__ import annotations

from collections.abc import Mapping

from nexum_engine.records import NodeStatus
from nexum_engine.workflow import NodeDefinition

DONE = frozenset({NodeStatus.COMPLETED, NodeStatus.SKIPPED})
"""The statuses in which a node no longer keeps other nodes waiting."""


def settle(
    definitions: Mapping[str, NodeDefinition], statuses: Mapping[str, NodeStatus], chosen: Mapping[str, str]
) -> dict[str, NodeStatus]:
    """Return the new status of each PENDING node that no longer has to wait for other nodes.

    `definitions` has the nodes in an order in which each node follows those that it waits for. `chosen` has the target
    that each router chose. A node waits until all its dependencies, and all routers that may choose the node, are done.
    The node is SKIPPED if none of these routers chose it, or if it has no router and all its dependencies are SKIPPED.
    Otherwise the node becomes READY if a worker runs it, else WAITING.
    """
    routers: dict[str, list[str]] = {}
    for node in definitions.values():
        for target in node.targets:
            routers.setdefault(target, []).append(node.node_id)
    now, settled = dict(statuses), {}
    for node_id, node in definitions.items():
        deciders = routers.get(node_id, ())
        if now[node_id] is not NodeStatus.PENDING or not all(
            now[other] in DONE for other in (*node.dependencies, *deciders)
        ):
            continue
        if deciders:
            is_skipped = all(chosen.get(router) != node_id for router in deciders)
        else:
            needed = [now[dependency] for dependency in node.dependencies]
            is_skipped = bool(needed) and all(status is NodeStatus.SKIPPED for status in needed)
        if is_skipped:
            settled[node_id] = NodeStatus.SKIPPED
        else:
            settled[node_id] = NodeStatus.READY if node.node_type.has_task else NodeStatus.WAITING
        now[node_id] = settled[node_id]
    return settled
