"""What the engine records, as frozen objects. All times are milliseconds since 1970, UTC."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ExecutionStatus(str, Enum):
    """An execution's state, with the strings of the wire."""

    RUNNING = "RUNNING"
    """It has work left."""
    COMPLETED = "COMPLETED"
    """Every node is recorded."""
    FAILED = "FAILED"
    """A node failed for good."""
    CANCELLED = "CANCELLED"
    """Somebody cancelled it."""

    @property
    def ended(self) -> bool:
        return self is not ExecutionStatus.RUNNING


class NodeStatus(str, Enum):
    """A node's state within its execution."""

    PENDING = "PENDING"
    """It waits for the nodes it depends on."""
    READY = "READY"
    """It is a task that no worker holds."""
    RUNNING = "RUNNING"
    """A worker holds it."""
    COMPLETED = "COMPLETED"
    """Its output is recorded and never changes."""
    FAILED = "FAILED"
    """It failed for good."""
    CANCELLED = "CANCELLED"
    """Its execution ended without it."""


class Outcome(str, Enum):
    """How one attempt at a node ended."""

    RUNNING = "RUNNING"
    """It has not ended."""
    COMPLETED = "COMPLETED"
    """Its output is the node's."""
    FAILED = "FAILED"
    """The worker reported a failure."""
    LOST = "LOST"
    """The worker's connection broke and did not come back: the worker crashed."""
    EXPIRED = "EXPIRED"
    """The worker fell silent for longer than its lease: the worker hangs."""
    INTERRUPTED = "INTERRUPTED"
    """The server itself was restarted and the worker did not come back; this counts for nothing."""
    CANCELLED = "CANCELLED"
    """The execution ended while it ran."""


class NodeType(str, Enum):
    """What a node is for. Both run in a worker and are retried alike."""

    EFFECT = "EFFECT"
    """Acts on the outside world."""
    COMPUTE = "COMPUTE"
    """Computes from its inputs alone."""


class Compatibility(str, Enum):
    """A newly registered version beside the one registered before it."""

    NEW = "NEW"
    IDENTICAL = "IDENTICAL"
    SAFE = "SAFE"
    """Only nodes were added."""
    BREAKING = "BREAKING"
    """A node is gone, or has another type or other dependencies."""


@dataclass(frozen=True)
class Attempt:
    """One hand-out of a task to a worker."""

    attempt: int
    worker_id: str
    started_ms: int
    ended_ms: int | None
    outcome: Outcome
    error: str


@dataclass(frozen=True)
class Node:
    """One node of one execution."""

    node_id: str
    node_type: str
    status: NodeStatus
    output_json: str | None
    error: str
    """Why it FAILED, or what a READY one waits for."""
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True)
class Execution:
    """One run of a workflow."""

    execution_id: str
    workflow_id: str
    version_hash: str
    status: ExecutionStatus
    input_json: str
    idempotency_key: str
    created_ms: int
    ended_ms: int | None
    error: str
    nodes: tuple[Node, ...] = ()
    """Dependencies first."""

    def outputs(self) -> dict[str, str]:
        """The recorded outputs, as JSON text, by node."""
        return {node.node_id: node.output_json for node in self.nodes if node.output_json is not None}


@dataclass(frozen=True)
class Task:
    """A node as it is handed to a worker: one attempt."""

    task_id: str
    """Names the attempt, not the node: a later attempt has another one."""
    execution_id: str
    node_id: str
    node_type: str
    version_hash: str
    attempt: int
    idempotency_key: str
    """The same for every attempt at this node."""
    input_json: str
    """`{"input": the execution's, "deps": {direct dependency: its output}}`"""


@dataclass(frozen=True)
class WorkflowVersion:
    """One registered version of a workflow."""

    workflow_id: str
    version_hash: str
    compatibility: Compatibility
    registered_ms: int
    active_executions: int
