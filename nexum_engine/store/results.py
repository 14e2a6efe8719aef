"""The results of transitions. The store returns a result only after the commit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime, timezone

from nexum_engine.records import Execution, ExecutionStatus, Task


@dataclass(frozen=True)
class ReadyTask:
    """The version and size of a task that became due. The server offers the task to a waiting poll."""

    version_hash: str
    task_bytes: int = 0
    """With 0, any poll is woken, whatever it can receive. The claim of the poll checks the true size."""


@dataclass
class Changes:
    """The effects of a transition: the tasks that became due, the executions that ended, and when a node is due.

    The transition adds them while it runs.
    """

    ready: list[ReadyTask] = field(default_factory=list)
    ended: list[Execution] = field(default_factory=list)
    ended_items: list[str] = field(default_factory=list)
    """The ids of the executions of MAP nodes' items that ended. A MAP node may have 10,000 items, so only their ids."""
    due_ms: int | None = None
    """When the next retry is due, or the next wait is over."""

    def due_at(self, due_ms: int) -> None:
        """Remember that a node is due at `due_ms`. The earliest time counts."""
        self.due_ms = due_ms if self.due_ms is None else min(self.due_ms, due_ms)


@dataclass(frozen=True)
class StoredStart:
    """The result of `executions.start_execution` or `tasks.start_owned`."""

    execution_id: str
    status: ExecutionStatus
    existing: bool
    ended: Execution | None = None
    """The found execution, if it has ended. Its input and nodes are missing if they are large."""
    task: Task | None = None
    """The owner's task, if an owner started the execution."""
    lease_ends_ms: int | None = None
    """When the lease of `task` ends; None if the owner held the task already."""
    changed: Changes = field(default_factory=Changes)
    """The effects of the start: the tasks with which the execution began, and the effects of an owner's output."""
    unknown: bool = False
    """Whether the effect of the owned node is unknown. Then the execution waits for a person, without a task."""
    held: Gate | None = None
    """The gate of the owned node, if it is closed. There is no task then."""
    held_version: str = ""
    """The version of the node that `held` holds back. A start may name another version than its key's execution has."""


@dataclass(frozen=True)
class Claim:
    """The result of `claim`: a task, or the version and size of a task that is too large for the worker, or neither."""

    task: Task | None = None
    oversized: ReadyTask | None = None
    opening: tuple[tuple[str, int], ...] = ()
    """Versions whose tasks a rate may hold back, each with the time at which the rate lets the next task pass."""


@dataclass(frozen=True)
class Gate:
    """Whether the limits of a node let it be handed out now."""

    held_by: str = ""
    """The limit that holds the node back. Empty if the node may be handed out."""
    opens_ms: int | None = None
    """When the rate lets the next node pass. If the rate holds this node back, that is this node itself.

    None if the node has no rate, or if the concurrency limit holds the node back.
    """
    full_ms: float | None = None
    """When the rate's bucket will be full again, if the node passes now."""

    @property
    def is_open(self) -> bool:
        """Whether the node may be handed out."""
        return not self.held_by

    @property
    def why(self) -> str:
        """Why the node isn't handed out, for a person."""
        if self.opens_ms is None:
            return f"held back by its {self.held_by}"
        moment = datetime.fromtimestamp(math.ceil(self.opens_ms / 1000), tz=timezone.utc)
        return f"held back by its {self.held_by}, until {moment:%Y-%m-%d %H:%M:%S} UTC"


@dataclass(frozen=True)
class Renewed:
    """The result of `renew`."""

    unnamed: frozenset[str]
    """The tasks that the heartbeat did not name, although they have had time to reach the worker."""
    lost: tuple[str, ...] = ()
    """The tasks that the heartbeat named, although the worker no longer holds them."""
    resumed: bool = False
    """Whether an attempt whose lease had run out has a lease again."""


@dataclass(frozen=True)
class Swept:
    """The result of `sweep`."""

    changed: Changes
    next_ms: int | None
    """When the next lease runs out, the next retry is due, or the next wait is over."""
    is_late: bool = False
    """Whether the sweep came too late to end anything (see `sweep`)."""


@dataclass(frozen=True)
class News:
    """What this server must know of the changes that another server on the same database has made."""

    ready: tuple[str, ...] = ()
    """The version hash of each task that became due."""
    ended: tuple[str, ...] = ()
    """The ids of the executions that ended."""
    due_ms: int | None = None
    """The earliest time at which a lease may run out, a retry may be due, or a wait may be over."""
    anything: bool = False
    """Whether the other server may have made more changes than those above."""
