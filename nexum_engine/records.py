"""The engine's data classes, all frozen. All times are milliseconds since 1970, UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class ExecutionStatus(str, Enum):
    """An execution's status. The values are the strings that gRPC messages contain."""

    RUNNING = "RUNNING"
    """The execution has nodes left to run."""
    COMPLETED = "COMPLETED"
    """Every node's output is recorded."""
    FAILED = "FAILED"
    """A node is FAILED."""
    CANCELLED = "CANCELLED"
    """A caller cancelled the execution."""

    @property
    def ended(self) -> bool:
        return self is not ExecutionStatus.RUNNING


class NodeStatus(str, Enum):
    """A node's status within its execution."""

    PENDING = "PENDING"
    """The node waits for the nodes that it depends on."""
    READY = "READY"
    """The node is a task that no worker holds."""
    RUNNING = "RUNNING"
    """A worker or owner holds the node."""
    COMPLETED = "COMPLETED"
    """The node's output is recorded and never changes."""
    FAILED = "FAILED"
    """The node failed and is not retried, unless its execution is."""
    CANCELLED = "CANCELLED"
    """The execution ended before this node ended."""


class Outcome(str, Enum):
    """How one attempt at a node ended."""

    RUNNING = "RUNNING"
    """The attempt has not ended."""
    COMPLETED = "COMPLETED"
    """The attempt's output is the node's output."""
    FAILED = "FAILED"
    """The worker reported a failure."""
    LOST = "LOST"
    """The worker's connection broke, and the worker did not reconnect. It probably crashed."""
    EXPIRED = "EXPIRED"
    """The worker sent no heartbeat for longer than its lease. Its process was probably stopped."""
    INTERRUPTED = "INTERRUPTED"
    """The server was restarted, and the worker did not reconnect. This does not count as a failed or lost attempt."""
    CANCELLED = "CANCELLED"
    """The execution ended while the attempt ran."""


class NodeType(str, Enum):
    """A node's purpose. Nodes of both types run in a worker and are retried in the same way."""

    EFFECT = "EFFECT"
    """The node acts on the outside world."""
    COMPUTE = "COMPUTE"
    """The node only computes from its inputs."""


class Compatibility(str, Enum):
    """How a newly registered version relates to the version registered before it."""

    NEW = "NEW"
    IDENTICAL = "IDENTICAL"
    SAFE = "SAFE"
    """Only nodes were added."""
    BREAKING = "BREAKING"
    """A node was removed, or its type or dependencies changed."""


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
    """Why the node FAILED, or what a READY node waits for."""
    attempts: tuple[Attempt, ...] = ()
    output_bytes: int = 0
    """The size of an output that is left out; else 0."""


@dataclass(frozen=True)
class SessionSummary:
    """What a list says of a session. Question, calls and tokens are empty if its events have no summary."""

    session: str
    events: int
    """The number of recorded events."""
    is_running: bool
    """Whether a process has the session's latest run."""
    question: str
    calls: int
    """The recorded calls of models, tools and people."""
    tokens: int


@dataclass(frozen=True)
class Execution:
    """One instance of a workflow version, with one input."""

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
    """The nodes, dependencies first."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """The names and values that were given at the start."""
    input_bytes: int = 0
    """The size of an input that is left out; else 0."""
    session: SessionSummary | None = None
    """The session that this execution stands for in a list: the execution is the session's latest run."""

    def outputs(self) -> dict[str, str]:
        """Return the recorded output of each node, as JSON text, by node id."""
        return {node.node_id: node.output_json for node in self.nodes if node.output_json is not None}


@dataclass(frozen=True)
class Task:
    """One attempt at a node, in the form that a worker or owner gets."""

    task_id: str
    """The id of the attempt. Each attempt at a node has its own id."""
    execution_id: str
    node_id: str
    node_type: str
    version_hash: str
    attempt: int
    idempotency_key: str
    """The key that is the same for every attempt at this node."""
    input_json: str
    """`{"input": the execution's input, "deps": {direct dependency: its output}}`"""
    input_bytes: int = 0
    """The size of `input_json` in bytes, even while that text is only in the store. Only the server sets this."""


@dataclass(frozen=True)
class WorkflowVersion:
    """One registered version of a workflow."""

    workflow_id: str
    version_hash: str
    compatibility: Compatibility
    registered_ms: int
    active_executions: int
