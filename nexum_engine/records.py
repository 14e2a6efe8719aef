"""The engine's data classes, all frozen. All times are milliseconds since 1970, UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum


class ExecutionStatus(str, Enum):
    """An execution's status. The values are the strings that gRPC messages contain."""

    RUNNING = "RUNNING"
    """The execution has nodes left to run."""
    COMPLETED = "COMPLETED"
    """Every node is COMPLETED or SKIPPED."""
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
    WAITING = "WAITING"
    """The node waits for something other than a worker: a time, a person, an event, or executions that it started."""
    COMPLETED = "COMPLETED"
    """The node's output is recorded and never changes."""
    SKIPPED = "SKIPPED"
    """The routers that could choose the node chose other nodes, or all its dependencies are SKIPPED, or the node waited
    for an event that did not come in time. A SKIPPED node has no output."""
    FAILED = "FAILED"
    """The node failed. It is retried only if its execution is retried."""
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
    """The worker's connection broke, and the worker did not reconnect. Its process probably crashed."""
    EXPIRED = "EXPIRED"
    """The worker sent no heartbeat for longer than its lease. Its process was probably suspended."""
    INTERRUPTED = "INTERRUPTED"
    """The server was restarted, and the worker did not reconnect. This does not count as a failed or lost attempt."""
    TIMED_OUT = "TIMED_OUT"
    """The attempt took longer than the time limit of its node. This counts as a failed attempt."""
    CANCELLED = "CANCELLED"
    """The execution ended while the attempt ran."""
    UNKNOWN = "UNKNOWN"
    """The effect may or may not have happened. The node waits for a person or a late report."""


class Effect(str, Enum):
    """What the server does if an effect that must happen only once may or may not have happened.

    An effect is unknown if the attempt may have begun but ended without a report, or if the worker reports that it
    can't tell.
    """

    ONCE = "ONCE"
    """The attempt is UNKNOWN, and the node waits for a person."""
    RECONCILE = "RECONCILE"
    """The node becomes MUST_RECONCILE and is handed out again."""
    MUST_RECONCILE = "MUST_RECONCILE"
    """Each attempt first finds out whether the effect has happened. If an attempt ends without a report, the node is
    handed out again. If its worker reports that it can't tell, the node waits for a person."""


class NodeType(str, Enum):
    """What a node does. Workers run the tasks of the types EFFECT to SUBWORKFLOW below. Other types have no tasks."""

    EFFECT = "EFFECT"
    """The node acts on the outside world."""
    COMPUTE = "COMPUTE"
    """The node only computes from its inputs."""
    ROUTER = "ROUTER"
    """The node's output names the target that runs. The other targets of its routes are skipped."""
    MAP = "MAP"
    """The node's task returns a list. Each item becomes a task. The node's output is the list of the tasks' results."""
    MAP_SUBTASK = "MAP_SUBTASK"
    """The task of one item of a MAP node. The engine makes such tasks: a workflow can't define a MAP_SUBTASK node."""
    REDUCE = "REDUCE"
    """The node computes from the results of a MAP node."""
    SUBWORKFLOW = "SUBWORKFLOW"
    """The node starts an execution of another workflow. The node's output is the output of the node that completed last
    in that execution."""
    TIMER = "TIMER"
    """The node completes after a delay."""
    HUMAN_APPROVAL = "HUMAN_APPROVAL"
    """The node completes when a person approves it, and fails when a person rejects it."""
    EVENT = "EVENT"
    """The node completes when an event of its name is sent to the execution."""

    @property
    def has_task(self) -> bool:
        """Whether a worker runs a task for a node of this type."""
        return self not in (NodeType.TIMER, NodeType.HUMAN_APPROVAL, NodeType.EVENT)

    @property
    def starts_executions(self) -> bool:
        """Whether the result of the node's task starts executions. The node completes when these have completed."""
        return self in (NodeType.MAP, NodeType.SUBWORKFLOW)


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
    """One attempt at a node. It begins when a worker or owner gets the task.

    A person's decision is stored as an attempt, too. So each attempt at a HUMAN_APPROVAL node is a decision, and so is
    an attempt that follows an UNKNOWN one. The `worker_id` of a decision is the person's name.
    """

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
    """Why the node FAILED, why no worker gets a READY node, or why an EVENT node was SKIPPED."""
    attempts: tuple[Attempt, ...] = ()
    progress_json: str = ""
    """The last progress that any attempt sent."""
    due_ms: int | None = None
    """The time at which the wait of a WAITING node is over. None if the node may wait for ever, or does not wait."""
    output_bytes: int = 0
    """If the output is left out: its size in bytes. Otherwise 0."""
    once: bool = False
    """Whether the effect of an EFFECT node must happen only once."""


@dataclass(frozen=True)
class SessionSummary:
    """A durable session, as a list of executions shows it.

    If no summary is recorded in the session's events, `question` is empty, and `calls` and `tokens` are 0.
    """

    session: str
    events: int
    """The number of recorded events."""
    is_running: bool
    """Whether a process runs the session now."""
    question: str
    calls: int
    """The number of recorded calls to models, tools and people."""
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
    """The names and values that the caller gave when it started the execution."""
    input_bytes: int = 0
    """If the input is left out: its size in bytes. Otherwise 0."""
    session: SessionSummary | None = None
    """In a list grouped by session: the run's session, if this is the session's latest run. Otherwise None."""
    parent_execution_id: str = ""
    """The execution whose node started this one; empty if a client started it."""
    parent_node_id: str = ""
    child_index: int | None = None
    """The number of the item, from 0, if the parent is a MAP node."""

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
    """The size of `input_json` in bytes. Only the server sets this: it needs the size before it reads the text."""
    timeout_ms: int | None = None
    """How long the attempt may take before the server ends it. Only the server sets this."""
    progress_json: str = ""
    """The last progress that an earlier attempt sent."""
    map_index: int = 0
    """The number of the item, from 0, in a task of type MAP_SUBTASK."""
    map_total: int = 0
    """The number of all items, in a task of type MAP_SUBTASK."""
    map_item_json: str = ""
    """The item, in a task of type MAP_SUBTASK."""
    must_reconcile: bool = False
    """Whether the effect of an earlier attempt is unknown: the worker must first find out if it has happened."""


@dataclass(frozen=True)
class WorkflowVersion:
    """One registered version of a workflow."""

    workflow_id: str
    version_hash: str
    compatibility: Compatibility
    registered_ms: int
    active_executions: int


@dataclass(frozen=True)
class PendingApproval:
    """A HUMAN_APPROVAL node that waits for a person."""

    execution_id: str
    node_id: str
    workflow_id: str
    since_ms: int
    input_json: str = ""
    """The execution's input, if it is short."""


@dataclass(frozen=True)
class UnknownNode:
    """An EFFECT node that waits for a person, because its effect may or may not have happened."""

    execution_id: str
    node_id: str
    workflow_id: str
    since_ms: int
    """When the attempt ended. Its effect is unknown."""
    error: str
    """Why the effect is unknown."""
    input_json: str
    """The execution's input, if it is short."""
    attempt: int
    """The number of the attempt whose effect is unknown."""
    worker_id: str
    started_ms: int
    """When that attempt began."""
    heartbeat_ms: int
    """When the worker last sent a heartbeat that named that attempt's task; 0 if it sent none."""


@dataclass(frozen=True)
class Pruned:
    """What was pruned or, in a dry run, would have been pruned: by one transaction, one call, or several of them."""

    executions: int = 0
    sessions: int = 0
    kept: int = 0
    """How many old executions are kept.

    An old execution is kept while it runs. It is also kept while another execution of its session runs, or if that one
    ended too recently.
    """
    after: int | None = None
    """Where to continue: the number of an execution. None if nothing is left to prune."""
    total_bytes: int = 0
    free_bytes: int = 0
    released_bytes: int = 0
    """The database's size, its free space, and the space released to the disk. All are 0 if something is left to prune,
    and in a dry run."""

    def __add__(self, later: Pruned) -> Pruned:
        """Return the result of this part and the part that continued after it."""
        return replace(
            later,
            executions=self.executions + later.executions,
            sessions=self.sessions + later.sessions,
            kept=self.kept + later.kept,
        )


@dataclass(frozen=True)
class DeclaredTool:
    """A tool that a connected worker or owner has declared to the server, with its policy."""

    name: str
    signature: str
    """How a model calls the tool. Empty if that isn't declared."""
    policy_json: str
    """The policy as a JSON object: the fields that differ from their defaults. Functions are given by name."""
    session: str = ""
    """The durable session to whose calls the policy applies. Empty for a worker's tool."""
    senders: int = 0
    """In a list: how many connected workers or owners have declared the tool in this way."""
